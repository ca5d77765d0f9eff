"""Place the initial subnets from data, before the first step, without any state of a weight's
size."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import LoSiAConfig
from ..layers.convert import trained_parameters
from ..layers.cross_entropy import WeightGradient, gradient_blocks
from ..layers.module import SubnetModule, losia_layers
from ..layers.subnet import Subnet
from ..parallel.placement import Placement, find_placement
from ..parallel.ranks import Ranks
from .checks import SCALED_THOUGH_CALIBRATED
from .importance import Observer, make_observer, new_subnet
from .selection import NonFiniteScoreError, top_neurons


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    steps: int = 4,
    loss_fn: Callable[[nn.Module, Any], Tensor | None] | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    loss_divisor: float = 1.0,
) -> nn.Module:
    """Move every subnet to the neurons of largest summed importance over the first batches.

    At random, a layer learns in the wrong place until its first turn, up to a whole cycle later.
    Each batch is one forward and backward of all layers; the row and column sums of I (Eq. 3) are
    smoothed over the batches as in the timeline: ``out + in`` floats a layer, and one dense weight
    gradient at a time. Call it before the first optimizer step. Leaves gradients None and the
    training mode as it was. A layer that no batch reaches stays where it is.

    Args:
        batches: dicts of the model's arguments, or what ``loss_fn`` takes. Of several processes
            each brings its own, as many on each, and the importance is that of their averaged
            gradients.
        steps: how many of them.
        loss_fn: ``(model, batch)`` -> the mean loss divided by ``loss_divisor``; by default
            ``model(**batch).loss``. None says that it has run the backward itself.
        process_group: by default as in ``LoSiAAdamW``.
        loss_divisor: in float16 1/scale, for importance is not linear in the gradient.

    Returns:
        The model.

    Raises:
        ValueError: there is nothing to calibrate, no batch, no loss, or a non-finite importance
            (naming the layer); the subnets are then where they were.
        TypeError: a batch is no mapping, without ``loss_fn``.
    """
    layers = [layer for _, layer in losia_layers(model) if layer.subnet.shape != layer.matrix.shape]
    if not layers:
        raise ValueError(
            "calibrate: the model has no LoSiALinear with a subnet to place; call apply_losia first"
        )
    if steps < 1:
        raise ValueError(f"calibrate: steps must be at least 1, got {steps}")
    member = next((layer.membership for layer in layers if layer.membership), None)
    if member and member.config.lr_of == "auto" and member.config.scales_lr:
        warnings.warn(f"LoSiA: {SCALED_THOUGH_CALIBRATED}", stacklevel=2)
    placement = find_placement(model, layers, Ranks.of(model, process_group))
    config = LoSiAConfig(importance="marginal")
    observers = {layer: make_observer(config) for layer in layers}
    observing_before = {layer: layer.observe_callback for layer in layers}
    for layer, observer in observers.items():
        layer.observe_(partial(_observed, placement, layer, observer, loss_divisor))
    try:
        seen = 0
        for batch in batches:
            loss = _model_loss(model, batch) if loss_fn is None else loss_fn(model, batch)
            if loss is not None:
                loss.backward()
            _drop_gradients(model)
            seen += 1
            if seen == steps:
                break
        if seen == 0:
            raise ValueError("calibrate: there is no batch to calibrate with")
        for layer, observer in observers.items():
            if getattr(observer, "left_out", False):
                raise NonFiniteScoreError(f"{layer.name}: importance is not finite in some batch")
        found = [
            (layer, new_subnet(layer, observer, placement.rows(layer)))
            for layer, observer in observers.items()
        ]
    finally:
        for layer, callback in observing_before.items():
            layer.observe_(callback)
        _drop_gradients(model)
    placement.move_([(layer, subnet) for layer, subnet in found if subnet is not None])
    for layer, _ in found:
        layer.note_calibrated_()
    return model


def start_from_frequency(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    process_group: "dist.ProcessGroup | None" = None,
) -> nn.Module:
    """Move the output layer's subnet to the tokens that the labels hold most often.

    No forward is run. Where fewer tokens occur than the subnet has room for, it keeps what it has
    drawn. Call it before the first optimizer step.

    Args:
        batches: with int64 ``"labels"``, negative ones ignored. Of several processes each counts
            its own.
        process_group: by default as in ``LoSiAAdamW``.

    Returns:
        The model.

    Raises:
        ValueError: no output layer has a subnet to place, or no batch has a label.
    """
    heads = [
        layer
        for _, layer in losia_layers(model)
        if layer.membership and layer.membership.is_output and layer.membership.group is not None
    ]
    if not heads:
        raise ValueError(
            "start_from_frequency: no output layer has a subnet; set output_dim_factor between 0 and 1"
        )
    ranks = Ranks.of(model, process_group)
    (head,) = heads
    count = torch.zeros(head.out_features, dtype=torch.int64, device=head.out_idx.device)
    for batch in batches:
        labels = batch["labels"].to(count.device).flatten()
        count += torch.bincount(labels[labels >= 0], minlength=head.out_features)
    ranks.all_reduce_([count])
    if not count.any():
        raise ValueError("start_from_frequency: the batches have no labels to count")
    score = 2 * count
    score[head.out_idx] += 1  # of equally frequent tokens those drawn
    subnet = Subnet(top_neurons(score, head.subnet.shape[0], head.alignment), head.in_idx.clone())
    find_placement(model, [head], ranks).move_([(head, subnet)])
    return model


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"calibrate: a batch must be a dict of the model's arguments, got {type(batch).__name__}; "
            f"for other batches give loss_fn(model, batch)"
        )
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError(
            f"calibrate: the model returned no loss for a batch of {', '.join(batch) or 'nothing'}: "
            f"put labels into it, or give loss_fn(model, batch)"
        )
    return loss


def _observed(
    placement: Placement,
    layer: SubnetModule,
    observer: Observer,
    grad_scale: float,
    gradient: Tensor | WeightGradient,
) -> None:
    for grad, outputs in gradient_blocks(gradient):
        grad = placement.mean_of_kept(placement.keep(layer, grad))
        weight = placement.observed_weight(layer)
        observer.observe(weight, grad, grad_scale, placement.rows(layer), outputs)


def _drop_gradients(model: nn.Module) -> None:
    for _, layer in losia_layers(model):
        layer.subnet.grad = None
    for _, parameter in trained_parameters(model):
        parameter.grad = None
