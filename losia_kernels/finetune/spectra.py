"""What a model's linears look like from outside: row and column sums of their gradients, and how
far training has turned their singular vectors (the paper's Figures 2, 8 and 9). Numbers only;
``plots`` draws them."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import LoSiAConfig, apply_losia, remove_losia
from ..layers.cross_entropy import WeightGradient, gradient_blocks
from ..layers.module import losia_layers


def gradient_sums(
    model: nn.Module, batches: Iterable[dict], config: LoSiAConfig
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums of |g| over each output ``[out]`` and each input ``[in]`` of the layers that ``config``
    trains, averaged over the batches: float32 on the CPU. g is the gradient of a batch's mean loss;
    one dense gradient exists at a time.
    """
    model = apply_losia(model, config).train()
    sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(name: str, gradient: Tensor | WeightGradient) -> None:
        out_sums, in_sums = sums[name]
        for grad, outputs in gradient_blocks(gradient):
            out_sums[outputs] += grad.abs().sum(1, dtype=torch.float32).cpu()
            in_sums += grad.abs().sum(0, dtype=torch.float32).cpu()

    try:
        for name, layer in losia_layers(model):
            sums[name] = torch.zeros(layer.out_features), torch.zeros(layer.in_features)
            layer.observe_(partial(add, name))
        seen = 0
        for batch in tqdm(batches, desc="gradients", unit="batch"):
            device: Any = model.device
            batch = {
                key: value.to(device) if torch.is_tensor(value) else value
                for key, value in batch.items()
            }
            model(**batch).loss.backward()
            model.zero_grad()
            seen += 1
        return {
            name: (out_sums / seen, in_sums / seen) for name, (out_sums, in_sums) in sums.items()
        }
    finally:
        for _, layer in losia_layers(model):
            layer.observe_(None)
        remove_losia(model)


@torch.no_grad()
def singular_vector_similarity(
    base: nn.Module, trained: nn.Module, names: list[str], count: int
) -> dict[str, Tensor]:
    """|cosine| between the i-th left singular vectors of a layer's weight before and after, for the
    first ``count``.

    float32 ``[min(count, out, in)]`` on the CPU, by layer name. 1: training has not turned this
    direction; of nearly equal singular values the vectors may change places, which shows as a fall.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    similarity = {}
    for name in tqdm(names, desc="singular vectors", unit="layer"):
        before, after = (
            model.get_submodule(name).weight.to(device, torch.float32) for model in (base, trained)
        )
        left = [
            torch.linalg.svd(weight, full_matrices=False).U[:, :count] for weight in (before, after)
        ]
        similarity[name] = (left[0] * left[1]).sum(0).abs().clamp(max=1).cpu()
    return similarity
