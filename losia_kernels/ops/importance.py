"""Importance of the weights of an observing layer (Eqs. 3-6)."""

import torch
from torch import Tensor

from .registry import check, check_same, register
from .rounding import accumulate_dtype

KINDS = ("sensitivity", "first_order", "second_order", "gradient")


@register("losia::importance_update_", mutates_args=("importance", "uncertainty"))
def importance_update_(
    importance: Tensor,
    uncertainty: Tensor,
    weight: Tensor,
    grad: Tensor,
    beta1: float,
    beta2: float,
    kind: str = "sensitivity",
    grad_scale: float = 1.0,
) -> None:
    """Smoothed importance and its uncertainty, Eqs. 3-5, in one pass over ``weight`` and ``grad``.

    With ``g = grad * grad_scale``: I is ``|g w - (g w)^2 / 2|`` ("sensitivity", Eq. 3), ``|g w|``
    ("first_order"), ``(g w)^2 / 2`` ("second_order") or ``|g|`` ("gradient"). Then ``importance <-
    beta1 importance + (1 - beta1) I`` (Eq. 4) and, with the new importance, ``uncertainty <- beta2
    uncertainty + (1 - beta2) |I - importance|`` (Eq. 5). Where I is not finite both stay as they are.

    Args:
        importance: ``[out, in]`` float32 or bfloat16, written; the arithmetic is float32.
        uncertainty: as ``importance``, written.
        weight: ``[out, in]`` of any floating-point dtype.
        grad: ``[out, in]`` of any floating-point dtype, of one micro-batch.
        beta1: what stays of the importance.
        beta2: what stays of the uncertainty.
        kind: which I.
        grad_scale: undoes a scaling of the loss.

    Raises:
        ValueError: an unknown ``kind``; shapes, dtypes or devices that do not fit.
    """
    op = "importance_update_"
    check_kind(op, kind)
    check_same(op, "importance, uncertainty", importance, uncertainty)
    check_same(op, "importance, weight, grad", importance, weight, grad, dtype=False)
    if weight.is_cuda and weight.dtype != torch.float64 and weight.numel():
        from ..kernels.importance import launch_importance_update_ as run
    else:
        run = importance_update_plain_
    run(importance, uncertainty, weight, grad, beta1, beta2, kind, grad_scale)


@importance_update_.register_fake
def _(*args, **kwargs):
    return None


@register("losia::importance_marginals", mutates_args=())
def importance_marginals(
    weight: Tensor, grad: Tensor, kind: str = "sensitivity", grad_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Row and column sums of I (see ``importance_update_``), I itself never written.

    Deterministic: ``I.sum(1), I.sum(0)`` by tiles, added in fixed order.

    Args:
        weight: ``[out, in]`` of any floating-point dtype.
        grad: ``[out, in]`` of any floating-point dtype, of one micro-batch.
        kind: which I.
        grad_scale: undoes a scaling of the loss.

    Returns:
        ``([out], [in])`` float32 (float64 for float64).

    Raises:
        ValueError: an unknown ``kind``; shapes or devices that do not fit.
    """
    op = "importance_marginals"
    check_kind(op, kind)
    check_same(op, "weight, grad", weight, grad, dtype=False)
    if weight.is_cuda and weight.dtype != torch.float64 and weight.numel():
        from ..kernels.importance import launch_importance_marginals as run
    else:
        run = importance_marginals_plain
    return run(weight, grad, kind, grad_scale)


@importance_marginals.register_fake
def _(weight, grad, kind="sensitivity", grad_scale=1.0):
    dtype = accumulate_dtype(weight.dtype)
    return weight.new_empty(weight.shape[0], dtype=dtype), weight.new_empty(
        weight.shape[1], dtype=dtype
    )


def check_kind(op: str, kind: str) -> None:
    check(kind in KINDS, op, f"kind must be one of {KINDS}, got {kind!r}")


def importance_of(weight: Tensor, grad: Tensor, kind: str, grad_scale: float = 1.0) -> Tensor:
    """I of one micro-batch (Eq. 3), ``[out, in]`` in float32: how much the loss changes without a
    weight."""
    dtype = accumulate_dtype(weight.dtype)
    grad = grad.to(dtype) * grad_scale
    if kind == "gradient":
        return grad.abs()
    first = grad * weight.to(dtype)
    if kind == "first_order":
        return first.abs()
    second = 0.5 * first * first
    return second if kind == "second_order" else (first - second).abs()


def importance_update_plain_(
    importance: Tensor,
    uncertainty: Tensor,
    weight: Tensor,
    grad: Tensor,
    beta1: float,
    beta2: float,
    kind: str,
    grad_scale: float,
) -> None:
    now = importance_of(weight, grad, kind, grad_scale)
    mean = beta1 * importance.to(now.dtype) + (1 - beta1) * now
    deviation = beta2 * uncertainty.to(now.dtype) + (1 - beta2) * (now - mean).abs()
    finite = now.isfinite()
    importance.copy_(torch.where(finite, mean, importance))
    uncertainty.copy_(torch.where(finite, deviation, uncertainty))


def importance_marginals_plain(
    weight: Tensor, grad: Tensor, kind: str, grad_scale: float
) -> tuple[Tensor, Tensor]:
    now = importance_of(weight, grad, kind, grad_scale)
    return now.sum(1), now.sum(0)  # [out], [in]
