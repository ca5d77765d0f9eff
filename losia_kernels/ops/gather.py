"""What the forward keeps of a layer's input: the columns of its subnet (X_S of Eq. 9)."""

from torch import Tensor

from ..kernels.launch import padded
from .registry import check, check_alignment, check_index, register


@register("losia::gather_features", mutates_args=())
def gather_features(x: Tensor, idx: Tensor, alignment: int = 1) -> Tensor:
    """Columns ``idx`` of an activation, ``x[..., idx]``: the X_S of Eq. 9.

    Args:
        x: ``[..., n]`` of any dtype, leading dimensions and strides.
        idx: ``[k]`` int64 on x's device. Its values are not checked here (``Subnet`` does).
        alignment: a promise of runs of that many neighbours, each from a multiple of it, which are
            loaded together.

    Returns:
        ``[..., k]`` of x's dtype, contiguous; on a GPU its rows lie a multiple of 16 entries apart,
            for wide loads.

    Raises:
        ValueError: an ``x`` without dimensions; an index that is not 1-D int64 on x's device,
            or whose length is no multiple of ``alignment``.
    """
    check(x.dim() >= 1, "gather_features", "x must have at least one dimension")
    check_index("gather_features", "idx", idx, x)
    check_alignment("gather_features", alignment, idx)
    if x.is_cuda:
        from ..kernels.gather import launch_gather_features

        return launch_gather_features(x, idx, alignment)
    return gather_features_plain(x, idx)


@gather_features.register_fake
def _(x, idx, alignment=1):
    k = idx.shape[0]
    return x.new_empty(*x.shape[:-1], padded(k) if x.is_cuda else k)[..., :k]


def gather_features_plain(x: Tensor, idx: Tensor) -> Tensor:
    return x.index_select(-1, idx).contiguous()  # [..., k]


def select_last(x: Tensor, idx: Tensor | None) -> Tensor:
    """``x[..., idx]``; all of ``x`` when ``idx`` is None."""
    return x if idx is None else x.index_select(-1, idx)
