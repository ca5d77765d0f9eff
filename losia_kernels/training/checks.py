"""What a first step shows: whether the loss reaches every subnet."""

import warnings
from collections.abc import Collection, Iterable

from ..layers.linear import LoSiALinear


def check_gradients(layers: Iterable[LoSiALinear], updated: Collection[LoSiALinear] = ()) -> None:
    """Warn of subnets that the first backward has left without a gradient; RuntimeError if the
    output layer's is one.

    Costs nothing but a look at each ``grad``. A layer that a batch does not use (an expert that got
    no token) is no mistake, an output layer without a gradient always is: the loss reads its weight
    past it. ``updated`` have had one.
    """
    layers = [layer for layer in layers if layer.subnet.requires_grad]
    without = [layer for layer in layers if layer.subnet.grad is None and layer not in updated]
    if len(without) == len(layers):
        warnings.warn(
            "LoSiA: no subnet has a gradient in the first step: was there a backward before it, and is the "
            "loss one of this model's?",
            stacklevel=4,
        )
        return
    for layer in without:
        if layer.losia.is_output:
            raise RuntimeError(
                f"{layer.name}: the loss gave the output layer's subnet no gradient, so it reads {layer.name}.weight "
                f"past the layer, as fused losses do, SFTTrainer's and Liger's among them. Turn that off (Liger: "
                f"fused_linear_cross_entropy=False; apply_losia's own fused loss needs no logits either), or set "
                f"output_dim_factor=0 to leave the layer frozen"
            )
    if without:
        names = ", ".join(layer.name for layer in without[:5]) + (
            ", ..." if len(without) > 5 else ""
        )
        warnings.warn(
            f"LoSiA: {len(without)} of {len(layers)} subnets got no gradient in the first step: {names}. They train "
            f"only if later batches reach them; a kernel that reads weight itself, or a loss that leaves part of the "
            f"model out, never will",
            stacklevel=4,
        )
