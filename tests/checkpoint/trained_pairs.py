"""Folders of tiny models before and after a training with several relocalizations."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from losia_kernels import LoSiAAdamW, LoSiAConfig, apply_losia, remove_losia
from losia_kernels.layers.module import losia_layers
from tests.integrations.tiny_llama import make_model, make_tokenizer
from tests.tiny import paper

STEPS = 7  # at period 1 and three groups, every layer moves twice


@dataclass
class Pair:
    """``touched``: per layer, every entry that was in a subnet at some step, [out, in]."""

    base: Path
    trained: Path
    touched: dict[str, Tensor]


def make_pair(
    folder: Path,
    dtype: str = "float32",
    base_dtype: str | None = None,
    steps: int = STEPS,
    tied: bool = True,
    shards: tuple[str, str] = ("1GB", "1GB"),
    **config,
) -> Pair:
    """Train in ``dtype`` from a base saved in ``base_dtype``; ``shards``: the shard sizes of base
    and trained."""
    model = make_model(tie_word_embeddings=tied).to(getattr(torch, base_dtype or dtype))
    model.save_pretrained(folder / "base", max_shard_size=shards[0])
    make_tokenizer().save_pretrained(folder / "base")
    model = model.to(getattr(torch, dtype))
    values = dict(rank_factor=1 / 4, output_dim_factor=1 / 8, period=1)
    touched = train(model, paper(**{**values, **config}), steps)
    remove_losia(model).save_pretrained(folder / "trained", max_shard_size=shards[1])
    make_tokenizer().save_pretrained(folder / "trained")
    return Pair(folder / "base", folder / "trained", touched)


def train(model, config: LoSiAConfig, steps: int) -> dict[str, Tensor]:
    """Train in place on random tokens; returns ``Pair.touched``."""
    optimizer = LoSiAAdamW(apply_losia(model, config), lr=1e-2)
    touched = {
        name: torch.zeros(layer.weight.shape, dtype=torch.bool)
        for name, layer in losia_layers(model)
    }
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for name, layer in losia_layers(model):
            touched[name][layer.out_idx[:, None], layer.in_idx] = True
        tokens = torch.randint(261, (4, 24), generator=generator)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return touched


def load(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder, sharded or not."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Write ``model.safetensors`` anew with other tensors (None: without) and remove what was
    there."""
    values = {
        **load_file(folder / "model.safetensors"),
        **{name.replace("__", "."): t for name, t in tensors.items()},
    }
    save_file(
        {name: tensor for name, tensor in values.items() if tensor is not None},
        folder / "model.safetensors",
    )


def assert_same_model(one: Path, other: Path) -> None:
    """The same tensors bit for bit, and the same files beside them byte for byte."""
    ours, theirs = load(one), load(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        bits = [each.reshape(-1).view(torch.uint8) for each in (tensor, theirs[name])]
        assert torch.equal(*bits), name
    beside = [
        {f.name: f.read_bytes() for f in folder.iterdir() if "safetensors" not in f.name}
        for folder in (one, other)
    ]
    assert beside[0] == beside[1]
