"""Ranks that do not start alike: what each is told; every function gets its device first."""

import warnings

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from losia_kernels import LoSiAAdamW, apply_losia
from losia_kernels.layers.module import losia_layers
from losia_kernels.parallel.placement import fingerprint
from losia_kernels.parallel.ranks import RanksDifferError
from tests.parallel.runs import PERIOD, LossOf, Run, batches_of
from tests.tiny import paper


def differ(device: torch.device, what: str) -> str:
    """Start a run in which rank 1 has another ``what``; returns what the ranks are told."""
    odd = dist.get_rank() == 1
    model = LossOf(seed=int(odd) if what == "weights" else 0).to(device)
    if what == "embedding" and odd:
        with torch.no_grad():
            model.lm.model.embed_tokens.weight[0, 0] += 1e-12
    config = paper(
        rank_factor=0.25,
        period="auto" if what == "length" else PERIOD + (odd and what == "config"),
        seed=int(odd and what == "seed"),
        exclude_modules=["down_proj"] if odd and what == "layers" else None,
    )
    apply_losia(model, config)
    if what == "subnet" and odd:
        layer = next(layer for _, layer in losia_layers(model))
        layer.set_subnet_(layer.out_idx, torch.arange(len(layer.in_idx), device=device))
    try:
        steps = 8 * (2 if odd else 1) if what == "length" else None
        optimizer = LoSiAAdamW(model, lr=2e-2 if odd and what == "lr" else 1e-2, total_steps=steps)
        if what == "resumed step":
            state = optimizer.state_dict()
            for group in state["param_groups"]:
                group["losia_step"] = int(odd)
            optimizer.load_state_dict(state)
    except RanksDifferError as error:
        return str(error)
    return ""


def warned_of_weights(device: torch.device) -> list[str]:
    """DDP copies rank 0's weights over different ones; returns the warnings, once the ranks
    agree."""
    model = apply_losia(LossOf(seed=dist.get_rank()).to(device), paper(rank_factor=0.25))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = LoSiAAdamW(DistributedDataParallel(model))
    optimizer.timeline.ranks.check_same(
        {}, {name: fingerprint(value) for name, value in model.state_dict().items()}
    )
    return [str(warning.message) for warning in caught]


def independent_models(device: torch.device) -> int:
    """Each rank trains a model of its own, in a group of its own."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    rank = dist.get_rank()
    model = apply_losia(
        LossOf(seed=rank).to(device), paper(rank_factor=0.25, period=1 + rank, seed=rank)
    )
    optimizer = LoSiAAdamW(model, lr=1e-2, process_group=groups[rank])
    for batch in batches_of(Run(steps=4), rank, dist.get_world_size(), device):
        model(**batch).backward()
        optimizer.step()
    return optimizer.timeline.step
