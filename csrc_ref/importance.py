"""Oracle of the importance of weights (Eqs. 3-5): any input dtype, float64 inside and out, no
rounding, arguments left untouched."""

from torch import Tensor


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
    """Eqs. 4 and 5 -> new ``(I bar, U bar)``; the uncertainty measures against the *new* mean. Where
    I is not finite both stay."""
    now = importance_ref(weight, grad, kind, grad_scale)
    mean = beta1 * importance.double() + (1 - beta1) * now  # Eq. 4
    deviation = beta2 * uncertainty.double() + (1 - beta2) * (now - mean).abs()  # Eq. 5
    finite = now.isfinite()
    return mean.where(finite, importance.double()), deviation.where(finite, uncertainty.double())


def importance_marginals_ref(
    weight: Tensor, grad: Tensor, kind: str = "sensitivity", grad_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Sums of I per output ``[out]`` and per input ``[in]``."""
    now = importance_ref(weight, grad, kind, grad_scale)
    return now.sum(dim=1), now.sum(dim=0)
