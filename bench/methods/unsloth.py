"""Unsloth: named in the tables, never run beside the others."""

from torch import nn

from .base import Method, MissingPeer, Options, Prepared


def _prepare(model: nn.Module, options: Options) -> Prepared:
    raise MissingPeer(
        "importing unsloth patches transformers for every other row of the process, and it takes pretrained folders "
        "only; its linear's autograd function is the row lora-fused"
    )


UNSLOTH = Method("unsloth", "Unsloth", "not run", _prepare)
