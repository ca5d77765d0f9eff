"""What a model can still do when only a subnet of its weights is kept (after the paper's Figure 10): does importance
find the weights that matter better than the size of the gradient does?"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from losia_kernels import LoSiAConfig
from losia_kernels.layers.subnet import Subnet, subnet_size
from losia_kernels.parallel.ranks import Ranks, RowShard
from losia_kernels.training.importance import make_observer

from ..methods.base import decoder_linears
from .evaluate import score_items, summary
from .items import fingerprint
from .study import SCALES, Run
from .tasks import TASKS
from .training import Base, held_out, options_of, prepare, train

MASKED = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 15 / 16, 63 / 64)  # of each linear
KINDS = ("sensitivity", "gradient", "random")
BATCHES = 8
Places = dict[str, Subnet]  # of every linear


def carry_out_masked(run: Run, base: Base) -> dict[str, Any]:
    """``masked[outside][kind]``: ``[share masked, right in percent, nats a token]`` of the trained model on the
    held-out items, for each share of MASKED.

    Outside the subnet weights are "zero", as in pruning, or "untrained": what they were before, so that only the
    subnet's change is kept. Subnets are found where they would be chosen: on the trained model for the former, on the
    untrained one for the latter."""
    task, model = TASKS[run.task], base.fresh()
    items = held_out(task, SCALES[run.scale].few)

    def score(model: nn.Module) -> list[float]:
        found = summary(items, score_items(model, base.tokenizer, items, task.max_length))[""]
        return [round(found["right"], 2), round(found["nll"], 4)]

    def found_on(model: nn.Module) -> dict[str, dict[float, Places]]:
        model.eval()
        batches = list(itertools.islice(options_of(run, task, base).batches(), BATCHES))
        return {kind: localize(model, batches, kind, run.seed) for kind in KINDS}

    untrained, first = score(model), found_on(model)
    before = {n: each.weight.detach().clone() for n, each in decoder_linears(model).items()}
    trained, options = prepare(run, task, model, base)
    train(trained, options)
    model = trained.finish()
    whole, places = score(model), {"zero": found_on(model), "untrained": first}
    after = {n: each.weight.detach().clone() for n, each in decoder_linears(model).items()}
    masked: dict[str, dict[str, list[list[float]]]] = {}
    for outside, of_kind in places.items():
        there, masked[outside] = (before if outside == "untrained" else None), {}
        for kind, of_share in of_kind.items():
            masked[outside][kind] = rows = []
            for share, subnets in of_share.items():
                keep_only_(model, subnets, after, there)
                rows.append([share, *score(model)])
    keep_only_(model, {}, after, before)
    ends = {"untrained": untrained, "whole": whole, "linears_untrained": score(model)}
    result = {"run": asdict(run), "status": "ok", "items": fingerprint(items)}
    return result | ends | {"masked": masked}


def localize(model: nn.Module, batches: Iterable[Any], kind: str, seed: int) -> dict[float, Places]:
    """By share of MASKED the subnet of every linear of the decoder blocks, ``sqrt(1 - share)`` of both sides: the
    greedy one (Algorithm 1) by LoSiA's own importance of that ``kind`` over all ``batches``, or a "random" one. The
    gradient is that of all batches together. Leaves gradients None."""
    linears, found = decoder_linears(model), {share: {} for share in MASKED}
    observers = {}
    if kind != "random":
        observers = {name: make_observer(LoSiAConfig(importance=kind)) for name in linears}
        weights = [linear.weight.requires_grad_(True) for linear in linears.values()]
        for batch in batches:
            grads = torch.autograd.grad(model(**batch).loss, weights)
            for (name, linear), grad in zip(linears.items(), grads, strict=True):
                observers[name].observe(linear.weight.detach(), grad, 1.0, rows_of(linear))
    generator = torch.Generator().manual_seed(seed)
    for name, linear in linears.items():
        sides = tuple(linear.weight.shape)
        for share in MASKED:
            k_out, k_in = (subnet_size(math.sqrt(1 - share), side, name) for side in sides)
            if kind == "random":
                places = Subnet.random(sides, (k_out, k_in), generator)
            else:
                places = observers[name].select(k_out, k_in, rows_of(linear), 1)
            idx = (each.to(linear.weight.device) for each in (places.out_idx, places.in_idx))
            found[share][name] = Subnet(*idx)
    return found


def rows_of(linear: nn.Linear) -> RowShard:
    return RowShard(Ranks(), linear.out_features)


@torch.no_grad()
def keep_only_(
    model: nn.Module, subnets: Places, kept: dict[str, Tensor], outside: dict[str, Tensor] | None
) -> None:
    """Write into every linear ``kept`` within its subnet, if it has one, and ``outside`` (None: zero) elsewhere."""
    for name, values in kept.items():
        weight = model.get_submodule(name).weight
        weight.copy_(torch.zeros_like(values) if outside is None else outside[name])
        if name in subnets:
            block = subnets[name].out_idx[:, None], subnets[name].in_idx
            weight[block] = values[block]
