"""Ops of an observing layer: importance of its weights (Eqs. 3-6) and the sums that selection
needs."""

import torch
from torch import Tensor

from . import eager
from .registry import check, check_index, check_kind, check_same, register


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
    """Smoothed importance and its uncertainty, Eqs. 3-6, in one pass over ``weight`` and ``grad``;
    all ``[out, in]``.

    With ``g = grad * grad_scale``: I is ``|g w - (g w)^2 / 2|`` ("sensitivity"), ``|g w|``
    ("first_order"), ``(g w)^2 / 2`` ("second_order") or ``|g|`` ("gradient"). Then ``importance <-
    beta1 importance + (1 - beta1) I`` and, with the new importance, ``uncertainty <- beta2
    uncertainty + (1 - beta2) |I - importance|``. Both are kept in float32 or bfloat16; the
    arithmetic is float32. ``grad_scale`` undoes a scaling of the loss.
    """
    op = "importance_update_"
    check_kind(op, kind)
    check_same(op, "importance, uncertainty", importance, uncertainty)
    check_same(op, "importance, weight, grad", importance, weight, grad, dtype=False)
    if weight.is_cuda and weight.dtype != torch.float64 and weight.numel():
        from ..kernels.importance import launch_importance_update_ as run
    else:
        run = eager.importance_update_
    run(importance, uncertainty, weight, grad, beta1, beta2, kind, grad_scale)


@importance_update_.register_fake
def _(importance, uncertainty, weight, grad, beta1, beta2, kind="sensitivity", grad_scale=1.0):
    return None


@register("losia::importance_marginals", mutates_args=())
def importance_marginals(
    weight: Tensor, grad: Tensor, kind: str = "sensitivity", grad_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Row and column sums of I (see ``importance_update_``) without writing I.

    ``weight``, ``grad`` ``[out, in]`` -> ``([out], [in])`` float32. Deterministic.
    """
    op = "importance_marginals"
    check_kind(op, kind)
    check_same(op, "weight, grad", weight, grad, dtype=False)
    if weight.is_cuda and weight.dtype != torch.float64 and weight.numel():
        from ..kernels.importance import launch_importance_marginals as run
    else:
        run = eager.importance_marginals
    return run(weight, grad, kind, grad_scale)


@importance_marginals.register_fake
def _(weight, grad, kind="sensitivity", grad_scale=1.0):
    dtype = eager.accumulate_dtype(weight.dtype)
    return weight.new_empty(weight.shape[0], dtype=dtype), weight.new_empty(
        weight.shape[1], dtype=dtype
    )


@register("losia::score_marginals", mutates_args=())
def score_marginals(
    importance: Tensor,
    uncertainty: Tensor | None = None,
    out_idx: Tensor | None = None,
    in_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Row and column sums of the score ``importance * uncertainty`` (or of ``importance`` alone),
    never written.

    ``[out, in]`` float32 or bfloat16 -> ``([out], [in])`` float32. The row sums run over ``in_idx``
    only, the column sums over ``out_idx`` only, where given: the second pass of both greedy orders
    (Algorithm 1) in one call. Deterministic; a non-finite score shows in the sums.
    """
    op = "score_marginals"
    check(importance.dim() == 2, op, f"importance must be [out, in], got {tuple(importance.shape)}")
    if uncertainty is not None:
        check_same(op, "importance, uncertainty", importance, uncertainty)
    check_index(op, "out_idx", out_idx, importance)
    check_index(op, "in_idx", in_idx, importance)
    if importance.is_cuda and importance.dtype != torch.float64 and importance.numel():
        from ..kernels.scores import launch_score_marginals as run
    else:
        run = eager.score_marginals
    return run(importance, uncertainty, out_idx, in_idx)


@score_marginals.register_fake
def _(importance, uncertainty=None, out_idx=None, in_idx=None):
    out_features, in_features = importance.shape
    dtype = eager.accumulate_dtype(importance.dtype)
    return importance.new_empty(out_features, dtype=dtype), importance.new_empty(
        in_features, dtype=dtype
    )
