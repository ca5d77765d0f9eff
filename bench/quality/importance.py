"""Gradients and importance of an untrained model's weights, straight from autograd."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn


def observe(
    model: nn.Module, names: Iterable[str], batches: Iterable[Any], count: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """|g| and the importance |gW - (gW)²/2| (Eq. 3) of the layers ``names``, each ``[out, in]``:
    means over ``count`` batches. Leaves gradients None."""
    weights = {name: model.get_submodule(name).weight.requires_grad_(True) for name in names}
    gradients = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    importance = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for batch in islice(batches, count):
        grads = torch.autograd.grad(model(**batch).loss, list(weights.values()))
        for (name, weight), grad in zip(weights.items(), grads, strict=True):
            product = grad * weight.detach()
            gradients[name] += grad.abs() / count
            importance[name] += (product - product**2 / 2).abs() / count
    return gradients, importance
