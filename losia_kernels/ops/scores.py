"""The sums of the score (Eq. 6) that selection needs, per output and per input."""

import torch
from torch import Tensor

from .gather import select_last
from .registry import check, check_index, check_same, register
from .rounding import accumulate_dtype


@register("losia::score_marginals", mutates_args=())
def score_marginals(
    importance: Tensor,
    uncertainty: Tensor | None = None,
    out_idx: Tensor | None = None,
    in_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Row and column sums of the score ``importance * uncertainty`` (Eq. 6), itself never written.

    Restricted by ``in_idx`` and ``out_idx`` they are the second pass of both greedy orders of
    Algorithm 1 in one call. Deterministic; a non-finite score shows in the sums.

    Args:
        importance: ``[out, in]`` float32 or bfloat16.
        uncertainty: as ``importance``; without it the score is the importance alone.
        out_idx: int64; the column sums run over these outputs only, where given.
        in_idx: int64; the row sums run over these inputs only, where given.

    Returns:
        ``([out], [in])`` float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
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
        run = score_marginals_plain
    return run(importance, uncertainty, out_idx, in_idx)


@score_marginals.register_fake
def _(importance, uncertainty=None, out_idx=None, in_idx=None):
    out_features, in_features = importance.shape
    dtype = accumulate_dtype(importance.dtype)
    return importance.new_empty(out_features, dtype=dtype), importance.new_empty(
        in_features, dtype=dtype
    )


def score_marginals_plain(
    importance: Tensor, uncertainty: Tensor | None, out_idx: Tensor | None, in_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(importance.dtype)
    score = importance.to(dtype)
    if uncertainty is not None:
        score = score * uncertainty.to(dtype)
    out_sums = select_last(score, in_idx).sum(1)  # [out], over the given inputs
    chosen = score if out_idx is None else score.index_select(0, out_idx)
    return out_sums, chosen.sum(0)  # [in], over the given outputs
