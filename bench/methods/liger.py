"""Liger-Kernel's RMSNorm, rotary embedding, gated MLP and loss under the methods that are compared."""

import sys
from dataclasses import replace
from types import FunctionType, MethodType, SimpleNamespace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from .adapters import LORA
from .base import Method, MissingPeer, Options, Prepared, import_peer
from .losia import PRO, PRO_FUSED, PRO_OFF
from .plain import FROZEN

ROTARY = "apply_rotary_pos_emb"


def apply_liger(model: nn.Module, fused_loss: bool) -> None:
    """Liger's kernels in ``model`` alone, a causal LM or a decoder layer of one: what Liger changes in transformers for
    every model of the process is undone."""
    check_launches(next(model.parameters()))
    liger = import_peer("liger_kernel.transformers")
    layers = model.model.layers
    attention = layers[0].self_attn
    target = model
    if not hasattr(model, "lm_head"):  # with a last norm that nobody calls
        inner = SimpleNamespace(layers=layers, norm=nn.Module())
        target = SimpleNamespace(config=attention.config, base_model_prefix="model", model=inner)
    modeling = vars(sys.modules[type(attention).__module__])
    before = dict(modeling)
    try:
        liger._apply_liger_kernel_to_instance(target, fused_linear_cross_entropy=fused_loss)
        patched = dict(modeling)
    finally:
        modeling.update(before)
    if patched[ROTARY] is before[ROTARY]:
        raise MissingPeer(f"liger_kernel has nothing for {attention.config.model_type}")
    plain = type(attention).forward
    rotated = FunctionType(
        plain.__code__, patched, plain.__name__, plain.__defaults__, plain.__closure__
    )
    for layer in layers:
        layer.self_attn.forward = MethodType(rotated, layer.self_attn)


def check_launches(parameter: torch.Tensor) -> None:
    """Raises MissingPeer where no kernel can be launched; of tensors without contents nobody needs it."""
    runtime = import_peer("triton.knobs").runtime
    if not (parameter.is_cuda or runtime.interpret or isinstance(parameter, FakeTensor)):
        raise MissingPeer("Liger's kernels run on a GPU only")


def with_liger(method: Method, name: str, fused_loss: bool) -> Method:
    """``method`` in a model of Liger's; ``fused_loss``: a whole model has Liger's loss too, which needs no logits."""

    def prepare(model: nn.Module, options: Options) -> Prepared:
        apply_liger(model, fused_loss and hasattr(model, "lm_head"))
        return method.prepare(model, options)

    return replace(method, name=name, title=f"{method.title} + Liger", prepare=prepare, exact=False)


FROZEN_LIGER = with_liger(FROZEN, "frozen-liger", fused_loss=True)
LORA_LIGER = with_liger(LORA, "lora-liger", fused_loss=True)
# its own loss needs no logits either
PRO_LIGER = with_liger(replace(PRO_FUSED, title=PRO.title), "losia-liger", fused_loss=False)
PRO_LIGER_OFF = with_liger(PRO_OFF, "losia-liger-off", fused_loss=False)
