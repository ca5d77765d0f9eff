"""One oracle per kernel: any input dtype, float64 inside and out, no rounding, arguments left
untouched."""

import torch
from torch import Tensor


def gather_features_ref(x: Tensor, idx: Tensor) -> Tensor:
    """X_S of Eq. 9, in x's own dtype (a copy, so exact): ``x [..., n]``, ``idx [k]`` -> ``[...,
    k]``."""
    return torch.stack([x[..., i] for i in idx.tolist()], dim=-1)


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


def subnet_adamw_ref(
    weight: Tensor,
    subnet: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    out_idx: Tensor,
    in_idx: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """AdamW on the subnet's entries only (section 3.3) -> new ``(weight, subnet, exp_avg,
    exp_avg_sq)``.

    ``grad`` is ``[k_out, k_in]`` or partials ``[splits, k_out, k_in]``; ``step`` counts from 1.
    """
    g = grad.double()
    if g.dim() == 3:
        g = g.sum(0)
    m = beta1 * exp_avg.double() + (1 - beta1) * g
    v = beta2 * exp_avg_sq.double() + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    w = subnet.double()
    w = (
        w - lr * weight_decay * w - lr * m_hat / (v_hat.sqrt() + eps)
    )  # decoupled decay, eps outside the root
    new_weight = weight.double().clone()
    for a, i in enumerate(out_idx.tolist()):
        new_weight[i, in_idx] = w[a]
    return new_weight, w, m, v


def importance_ref(
    weight: Tensor, grad: Tensor, kind: str = "sensitivity", grad_scale: float = 1.0
) -> Tensor:
    """I of one micro-batch, ``[out, in]``: Eq. 3, or one of its parts."""
    w, g = weight.double(), grad.double() * grad_scale
    return {
        "sensitivity": (g * w - 0.5 * (g * w) ** 2).abs(),  # Eq. 3
        "first_order": (g * w).abs(),
        "second_order": 0.5 * (g * w) ** 2,
        "gradient": g.abs(),  # ablation GL
    }[kind]


def importance_update_ref(
    importance: Tensor,
    uncertainty: Tensor,
    weight: Tensor,
    grad: Tensor,
    beta1: float,
    beta2: float,
    kind: str = "sensitivity",
    grad_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Eqs. 4 and 5 -> new ``(I bar, U bar)``; the uncertainty measures against the *new* mean."""
    now = importance_ref(weight, grad, kind, grad_scale)
    mean = beta1 * importance.double() + (1 - beta1) * now  # Eq. 4
    deviation = beta2 * uncertainty.double() + (1 - beta2) * (now - mean).abs()  # Eq. 5
    return mean, deviation


def importance_marginals_ref(
    weight: Tensor, grad: Tensor, kind: str = "sensitivity", grad_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Sums of I per output ``[out]`` and per input ``[in]``."""
    now = importance_ref(weight, grad, kind, grad_scale)
    return now.sum(dim=1), now.sum(dim=0)


def score_ref(importance: Tensor, uncertainty: Tensor | None = None) -> Tensor:
    """Eq. 6, s = I bar * U bar; the importance alone where there is no uncertainty."""
    return (
        importance.double() if uncertainty is None else importance.double() * uncertainty.double()
    )


def score_marginals_ref(
    importance: Tensor,
    uncertainty: Tensor | None = None,
    out_idx: Tensor | None = None,
    in_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums of s per output over ``in_idx`` only ``[out]``, and per input over ``out_idx`` only
    ``[in]``."""
    score = score_ref(importance, uncertainty)
    return cut(score, None, in_idx).sum(dim=1), cut(score, out_idx, None).sum(dim=0)
