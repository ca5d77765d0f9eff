"""Gradients that have no derivative of their own: asking for one is an error, never a zero."""

from collections.abc import Iterable

import torch
from torch import Tensor


def without_derivative(
    grads: Iterable[Tensor | None], sources: Iterable[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """``grads`` as functions of ``sources`` whose derivative raises RuntimeError.

    torch's ``once_differentiable`` tells neither a backward of which only the gradients of
    ``inputs`` are asked (``torch.autograd.grad``), for it knows no sources, nor one that begins
    with a constant.
    """
    known = [each for each in sources if each is not None and each.requires_grad]
    return tuple(None if grad is None else _NoDerivative.apply(grad, *known) for grad in grads)


class _NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, *sources):
        return grad.clone()  # no view, which nobody could clip in place

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            "trying to differentiate twice through a layer with a subnet, or a loss computed without "
            "logits, which have first derivatives only (fused_loss=False is the model's own loss; "
            "torch.func.functional_call with other subnets computes densely, as often differentiable "
            "as plain layers)"
        )
