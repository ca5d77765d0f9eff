"""Gradients and importance of an untrained model's weights."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def observe(
    model: nn.Module, names: Iterable[str], batches: Collection[Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """|g| and the importance |gW - (gW)²/2| (Eq. 3) of the layers ``names``, each ``[out, in]``: means over the
    batches, straight from autograd. Leaves gradients None."""
    batches = list(batches)
    weights = {name: model.get_submodule(name).weight.requires_grad_(True) for name in names}
    gradients = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    importance = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for batch in batches:
        grads = torch.autograd.grad(model(**batch).loss, list(weights.values()))
        for (name, weight), grad in zip(weights.items(), grads, strict=True):
            product = grad * weight.detach()
            gradients[name] += grad.abs() / len(batches)
            importance[name] += (product - product**2 / 2).abs() / len(batches)
    return gradients, importance
