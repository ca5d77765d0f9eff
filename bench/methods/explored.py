"""Changes of the default that were tried and did not earn a place in the package, kept so that anybody can try again:
searches alone, on one task."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from losia_kernels.layers.module import SubnetModule, losia_layers
from losia_kernels.training.calibrate import calibrate
from losia_kernels.training.importance import MarginalObserver
from losia_kernels.training.optimizer import LoSiAAdamW
from losia_kernels.training.selection import top_neurons

from .base import Method, Options, Prepared
from .losia import CALIBRATION_BATCHES, prepare_study

READS, WRITES = "(q|k|v|gate|up)_proj", "(o|down)_proj"  # the residual stream
Change = Callable[[Prepared, nn.Module, Options], None]


def keep_moments_(trained: Prepared, model: nn.Module, options: Options) -> None:
    """At a move, a value that stays trained keeps its moments, a new one begins with the mean second moment, and Adam's
    step counts on."""
    optimizer = trained.optimizer
    assert isinstance(optimizer, LoSiAAdamW)
    timeline = optimizer.timeline
    layers = {layer.subnet: layer for layer in timeline.layers}

    def keep(subnet: torch.Tensor) -> None:
        layer, state = layers[subnet], optimizer.state.get(subnet)
        if not state or layer not in timeline._places:
            return
        now, before = (layer.out_idx, layer.in_idx), timeline._places[layer][1]
        out_same, in_same = (new[:, None] == old for new, old in zip(now, before, strict=True))
        stays = out_same.any(1)[:, None] & in_same.any(1)
        for key, new in (("exp_avg", 0.0), ("exp_avg_sq", state["exp_avg_sq"].mean())):
            there = state[key][out_same.int().argmax(1)][:, in_same.int().argmax(1)]
            state[key].copy_(torch.where(stays, there, torch.as_tensor(new)))

    optimizer._forget = keep  # type: ignore[method-assign]


def place_relative_(trained: Prepared, model: nn.Module, options: Options) -> None:
    """First places where the importance is largest relative to that on generic text."""
    sums: dict[SubnetModule, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    select = MarginalObserver.select

    def note(observer, k_out, k_in, rows, alignment):
        found = tuple(
            observer.tensors[name].clone() for name in ("out_importance", "in_importance")
        )
        seen.append(found)
        return select(observer, k_out, k_in, rows, alignment)

    layers = [layer for _, layer in losia_layers(model)]
    MarginalObserver.select = note
    try:
        for batches in (options.batches(), options.generic()):
            seen: list[tuple] = []
            calibrate(model, batches, CALIBRATION_BATCHES)
            for layer, found in zip(layers, seen, strict=True):
                sums.setdefault(layer, []).append(found)
    finally:
        MarginalObserver.select = select
    for layer, (task, generic) in sums.items():
        ratios = (t / (g + 1e-3 * g.mean()) for t, g in zip(task, generic, strict=True))
        layer.set_subnet_(*map(top_neurons, ratios, layer.subnet.shape))


def slow_attention_(trained: Prepared, model: nn.Module, options: Options) -> None:
    """Half the learning rate for the attention's linears."""
    names = {layer: name for name, layer in losia_layers(model)}
    timeline = trained.optimizer.timeline
    timeline.scale_of = lambda layer: 0.5 if "attn" in names[layer] else 1.0


def _of_stream(share: float, rank_factor: float) -> dict[str, Any]:
    """As many values, of another share of the residual stream."""
    other = rank_factor**2 / share
    return {"rank_pattern": {READS: (other, share), WRITES: (share, other)}}


def _explored(
    name: str, title: str, text: str, lrs: tuple[float, ...], changes: dict, after: Change | None
) -> Method:
    def prepare(model: nn.Module, options: Options) -> Prepared:
        trained = prepare_study(model, replace(options, changes=changes))
        if after is not None:
            after(trained, model, options)
        return trained

    return Method(f"losia-{name}", title, prepare, settings=text, lrs=lrs, explored=True)


def explored(default: dict[str, Any], lrs: tuple[float, ...]) -> tuple[Method, ...]:
    """All of them, each the ``default`` with one change."""
    make = partial(_explored, lrs=lrs)
    quarter, whole = (_of_stream(share, default["rank_factor"]) for share in (1 / 4, 1.0))
    rest = (
        (
            "moments",
            "moments kept",
            "values that stay trained keep their moments",
            {},
            keep_moments_,
        ),
        ("relative", "importance over generic text's", "first places", {}, place_relative_),
        ("attention", "attention at half the rate", "as LoSiA", {}, slow_attention_),
        ("quarter", "a quarter of the stream", "as many values", quarter, None),
        ("stream", "all of the stream", "as many values: whole rows or columns", whole, None),
    )
    return tuple(
        make(name, f"LoSiA, {title}", text, changes=default | changes, after=after)
        for name, title, text, changes, after in rest
    )
