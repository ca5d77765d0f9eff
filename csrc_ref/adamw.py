"""Oracle of AdamW on a subnet: any input dtype, float64 inside and out, no rounding, arguments
left untouched."""

from torch import Tensor


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

    ``grad`` is ``[k_out, k_in]``; ``step`` counts from 1.
    """
    g = grad.double()
    m = beta1 * exp_avg.double() + (1 - beta1) * g
    v = beta2 * exp_avg_sq.double() + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    w = subnet.double()
    # decoupled decay, eps outside the root
    w = w - lr * weight_decay * w - lr * m_hat / (v_hat.sqrt() + eps)
    new_weight = weight.double().clone()
    for a, i in enumerate(out_idx.tolist()):
        new_weight[i, in_idx] = w[a]
    return new_weight, w, m, v
