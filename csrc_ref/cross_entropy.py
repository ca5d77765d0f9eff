"""Oracle of the output layer: linear, scale, soft-cap, cross-entropy; in float64, with the whole
logits at once."""

import torch
from torch import Tensor


def cross_entropy_ref(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``logits [t, V]`` before scale and cap, ``labels [t]`` -> ``losses [t]``, ``lse [t]``, and
    the gradient of the losses' sum ``[t, V]``; a token with the label ``ignore_index`` has neither
    loss nor gradient.

    z = cap(scale * logits), log p = z - lse, q = (1 - eps) onehot + eps / V: loss = -q . log p.
    """
    scaled = logits.double() * logit_scale
    z = scaled if softcap is None else softcap * torch.tanh(scaled / softcap)
    lse = z.exp().sum(-1).log()
    log_p = z - lse[:, None]
    q = torch.full_like(z, label_smoothing / z.shape[1])
    for t, label in enumerate(labels.tolist()):
        if label != ignore_index:
            q[t, label] += 1 - label_smoothing
    losses = -(q * log_p).sum(-1)
    grad = log_p.exp() - q
    if softcap is not None:
        grad = grad * (1 - torch.tanh(scaled / softcap) ** 2)
    ignored = labels == ignore_index
    losses[ignored], grad[ignored] = 0.0, 0.0
    return losses, lse, grad * logit_scale


def linear_cross_entropy_ref(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    divisor: float = 1.0,
    **options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``hidden [t, d]``, ``weight [V, d]`` -> sum of the losses over ``divisor``, and its gradients
    for hidden ``[t, d]``, the whole weight ``[V, d]`` and the bias ``[V]``. ``options`` are those
    of ``cross_entropy_ref``."""
    hidden, weight = hidden.double(), weight.double()
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias.double()
    losses, _, d_logits = cross_entropy_ref(logits, labels, **options)
    d_logits = d_logits / divisor
    return losses.sum() / divisor, d_logits @ weight, d_logits.T @ hidden, d_logits.sum(0)
