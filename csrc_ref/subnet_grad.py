"""Oracle of the subnet's gradient (Eq. 9): any input dtype, float64 inside and out."""

from torch import Tensor


def subnet_grad_ref(
    dy: Tensor, x: Tensor, out_idx: Tensor | None = None, in_idx: Tensor | None = None
) -> Tensor:
    """Eq. 9 the long way: the dense gradient of ``y = x W^T``, then the subnet cut out of it ->
    ``[k_out, k_in]``.

    ``out_idx`` None takes all columns of dy, ``in_idx`` None all columns of x.
    """
    dy, x = dy.double().flatten(0, -2), x.double().flatten(0, -2)  # [t, out], [t, in]
    dense = dy.T @ x  # [out, in]
    return cut(dense, out_idx, in_idx)


def cut(dense: Tensor, out_idx: Tensor | None, in_idx: Tensor | None) -> Tensor:
    """``dense[out_idx][:, in_idx]``; None takes all."""
    if out_idx is not None:
        dense = dense[out_idx]
    if in_idx is not None:
        dense = dense[:, in_idx]
    return dense
