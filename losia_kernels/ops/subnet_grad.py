"""The gradient of a layer's subnet (Eq. 9)."""

import torch
from torch import Tensor

from .gather import select_last
from .registry import check_alignment, check_index, invalid, register
from .rounding import accumulate_dtype


@register("losia::subnet_grad", mutates_args=())
def subnet_grad(
    dy: Tensor,
    x: Tensor,
    out_idx: Tensor | None = None,
    in_idx: Tensor | None = None,
    alignment: int = 1,
) -> Tensor:
    """Gradient of the subnet, Eq. 9: ``dy[..., out_idx].T @ x[..., in_idx]``, summed over all
    tokens.

    Deterministic: on the device the tokens are split into ranges whose sums are added in fixed
    order.

    Args:
        dy: ``[..., out]`` float32, float16, bfloat16 or float64.
        x: ``[..., n]`` of dy's dtype and leading dimensions.
        out_idx: ``[k_out]`` int64 into ``out``; None takes all (the output layer).
        in_idx: ``[k_in]`` int64 into ``n``; None takes all (x gathered before).
        alignment: of both indices, as in ``gather_features``.

    Returns:
        ``[k_out, k_in]`` float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes, devices or an alignment that do not fit.
    """
    op = "subnet_grad"
    if dy.shape[:-1] != x.shape[:-1]:
        raise invalid(
            op,
            f"dy {tuple(dy.shape)} and x {tuple(x.shape)} must agree in all but the last dimension",
        )
    if dy.dtype != x.dtype:
        raise invalid(op, f"dy is {dy.dtype}, x is {x.dtype}; they must be the same")
    if dy.device != x.device:
        raise invalid(op, f"dy is on {dy.device}, x on {x.device}")
    check_index(op, "out_idx", out_idx, dy)
    check_index(op, "in_idx", in_idx, x)
    check_alignment(op, alignment, out_idx, in_idx)
    if dy.is_cuda and dy.dtype != torch.float64:
        from ..kernels.subnet_grad import launch_subnet_grad

        return launch_subnet_grad(dy, x, out_idx, in_idx, alignment)
    return subnet_grad_plain(dy, x, out_idx, in_idx)


@subnet_grad.register_fake
def _(dy, x, out_idx=None, in_idx=None, alignment=1):
    k_out, k_in = _size(out_idx, dy.shape[-1]), _size(in_idx, x.shape[-1])
    return dy.new_empty(k_out, k_in, dtype=accumulate_dtype(dy.dtype))


def _size(idx: Tensor | None, everything: int) -> int:
    return everything if idx is None else idx.shape[0]


def subnet_grad_plain(
    dy: Tensor, x: Tensor, out_idx: Tensor | None, in_idx: Tensor | None
) -> Tensor:
    dy_sub = select_last(dy.reshape(-1, dy.shape[-1]), out_idx)  # [t, k_out]
    x_sub = select_last(x.reshape(-1, x.shape[-1]), in_idx)  # [t, k_in]
    dtype = accumulate_dtype(dy.dtype)
    # on the matrix units, which round as the kernel's product does
    if dy.is_cuda and dy.dtype.itemsize == 2:
        return torch.mm(dy_sub.T, x_sub, out_dtype=dtype)
    return dy_sub.to(dtype).T @ x_sub.to(dtype)  # [k_out, k_in]
