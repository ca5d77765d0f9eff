"""What happens inside: where gradients lie, what a subnet captures, what moves, what of the weights stays."""

import itertools
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from losia_kernels.layers.module import losia_layers
from losia_kernels.training.selection import select_from_marginals, select_subnet

from ..methods.importance import observe
from .study import Run
from .tasks import TASKS
from .training import Base, options_of, prepare, train

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")  # of 3 blocks
SINGULAR_VECTORS = 100
BATCHES = 8  # whose importance is averaged
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)


def carry_out_analysis(run: Run, base: Base) -> dict[str, Any]:
    """The paper's Figures 2 and 9 (gradients), 7 (selection), 8 (singular vectors); how good the greedy subnet is."""
    model, task = base.fresh(), TASKS[run.task]
    last = model.config.num_hidden_layers - 1
    blocks = sorted({0, last // 2, last})
    names = [f"model.layers.{block}.{kind}" for block in blocks for kind in KINDS]
    before = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    batches = itertools.islice(options_of(run, task, base).batches(), BATCHES)
    gradients, importance = observe(model, names, batches)
    trained, options = prepare(run, task, model, base)
    layers = dict(losia_layers(trained.module))
    counts = {name: torch.zeros(layer.in_features) for name, layer in layers.items()}
    placed: dict[str, Tensor] = {}
    moves = -len(layers)  # the first places are no moves

    def count_moves(step: int) -> None:
        nonlocal moves
        for name, layer in layers.items():
            if name not in placed or not torch.equal(layer.in_idx, placed[name]):
                placed[name] = layer.in_idx.clone()
                counts[name][layer.in_idx.cpu()] += 1
                moves += 1

    count_moves(-1)
    train(trained, options, count_moves)
    plain = trained.finish()
    after = {name: plain.get_submodule(name).weight.detach() for name in names}
    selected = {name: torch.bincount(counts[name].long()) for name in names if name in counts}
    sides = {"out": 1, "in": 0}
    return {
        "run": asdict(run),
        "status": "ok",
        "gradients": {
            name: {side: concentration(g.sum(dim)) for side, dim in sides.items()}
            for name, g in gradients.items()
        },
        "captured": {name: captured(scores) for name, scores in importance.items()},
        "small_matrices": small_matrices(next(iter(importance.values()))),
        "selected": {name: times.tolist() for name, times in selected.items()},
        "moves": moves,
        "singular": {name: similarity(before[name], after[name]) for name in names},
    }


def concentration(sums: Tensor) -> list[float]:
    """Share of the total that the largest 1/16, 1/8, 1/4 and 1/2 of the neurons hold."""
    ordered = sums.double().sort(descending=True).values.cumsum(0)
    held = (ordered[max(1, int(share * len(sums))) - 1] / ordered[-1] for share in SHARES)
    return [round(float(share), 4) for share in held]


def share_of(scores: Tensor, out_idx: Tensor, in_idx: Tensor) -> float:
    return float(scores[out_idx][:, in_idx].double().sum() / scores.double().sum())


def captured(scores: Tensor, restarts: int = 10) -> dict[str, float]:
    """Share of all importance in a subnet of p = 1/8: greedy (Algorithm 1), by the largest sums of rows and columns
    alone, best of random restarts, random, and the sum of the largest entries anywhere, which no block can exceed."""
    k_out, k_in = (max(1, size // 8) for size in scores.shape)
    greedy = select_subnet(scores, k_out, k_in)
    sums = select_from_marginals(scores.sum(1), scores.sum(0), k_out, k_in)
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randperm(scores.shape[1], generator=generator)[:k_in] for _ in range(restarts)]
    random_out = torch.randperm(scores.shape[0], generator=generator)[:k_out]
    entries = scores.flatten().double().topk(k_out * k_in).values.sum() / scores.double().sum()
    found = {
        "greedy": share_of(scores, greedy.out_idx, greedy.in_idx),
        "sums": share_of(scores, sums.out_idx, sums.in_idx),
        "restarts": max(share_of(scores, *improve(scores, s, k_out, k_in)) for s in starts),
        "random": share_of(scores, random_out, starts[0]),
        "entries": float(entries),
    }
    return {name: round(share, 4) for name, share in found.items()}


def improve(scores: Tensor, in_idx: Tensor, k_out: int, k_in: int) -> tuple[Tensor, Tensor]:
    """Best outputs for the inputs, best inputs for those, and so on until nothing changes."""
    total = -1.0
    while True:
        out_idx = scores[:, in_idx].sum(1).topk(k_out).indices
        in_idx = scores[out_idx].sum(0).topk(k_in).indices
        new = float(scores[out_idx][:, in_idx].sum())
        if new <= total * (1 + 1e-6):
            return out_idx, in_idx
        total = new


def small_matrices(scores: Tensor, size: int = 12, k: int = 4, count: int = 40) -> dict[str, float]:
    """Greedy over the optimum on ``count`` blocks of ``size``² of real importance: mean and worst."""
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(count):
        rows, columns = (torch.randperm(n, generator=generator)[:size] for n in scores.shape)
        block = scores[rows][:, columns]
        greedy = select_subnet(block, k, k)
        ratios.append(share_of(block, greedy.out_idx, greedy.in_idx) / optimum(block, k))
    return {"mean": round(sum(ratios) / count, 4), "worst": round(min(ratios), 4)}


def optimum(block: Tensor, k: int) -> float:
    """The largest share of a k x k subnet: for each choice of outputs the best inputs are known."""
    chosen = torch.tensor(list(itertools.combinations(range(block.shape[0]), k)))
    sums = block.double()[chosen].sum(1)  # [choices, in]
    return float(sums.topk(k, dim=1).values.sum(1).max() / block.double().sum())


def similarity(before: Tensor, after: Tensor) -> dict[str, float]:
    """Mean and least |cosine| of a weight's leading left singular vectors before and after (Figure 8)."""
    k, both = min(SINGULAR_VECTORS, *before.shape), (before.float(), after.float())
    first, second = (torch.linalg.svd(w, full_matrices=False).U[:, :k] for w in both)
    cosine = (first * second).sum(0).abs()
    return {"mean": round(float(cosine.mean()), 4), "least": round(float(cosine.min()), 4)}
