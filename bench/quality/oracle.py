"""The check that a result is not our bug: a run of LoSiA again by the dense-gradient reference, from the same start."""

from dataclasses import asdict
from itertools import islice
from typing import Any

import torch

from csrc_ref.selection import select_marginal_ref
from csrc_ref.training import Config, Training
from losia_kernels import LoSiAConfig
from losia_kernels.layers.module import losia_layers

from ..harness.jobs import NotReady
from ..methods import Options, Prepared
from ..methods.importance import observe
from ..methods.losia import CALIBRATION_BATCHES
from .study import Run
from .tasks import TASKS
from .training import Base, prepare, schedule, score, thinned, train


def carry_out_oracle(run: Run, base: Base) -> dict[str, Any]:
    """Train twice: with the package and with the reference; say how far apart losses, subnets and scores are. Raises
    NotReady on a GPU: the reference computes on CPU tensors."""
    if base.model.device.type != "cpu":
        raise NotReady("the reference computes on a CPU: --device cpu --scale small")
    task = TASKS[run.task]
    trained, options = prepare(run, task, base.fresh(), base)
    initial = _subnets(trained)
    losses = train(trained, options)["losses"]
    final = _subnets(trained)
    package = score(trained.finish(), base, task, run)

    calibrated = _calibrated(initial, options, base)
    reference_losses, reference, model = _reference(trained, options, initial, base)
    shared = [_shared(final[n], (m.out_idx, m.in_idx)) for n, m in reference.moved.items()]
    at_start = [_shared(initial[name], subnet) for name, subnet in calibrated.items()]
    apart = (abs(a - b) for a, b in zip(losses, reference_losses, strict=True))
    return {
        "run": asdict(run),
        "status": "ok",
        "scores": package["scores"],
        "reference_scores": score(model, base, task, run)["scores"],
        "items": package["items"],
        "curve": thinned(losses),
        "reference_curve": thinned(reference_losses),
        "largest_loss_difference": max(apart),
        "shared_subnet": sum(shared) / len(shared),
        "same_subnets": shared.count(1.0),
        "layers": len(shared),
        "same_at_start": at_start.count(1.0),
    }


def _subnets(trained: Prepared) -> dict[str, tuple]:
    layers = losia_layers(trained.module)
    return {name: (layer.out_idx.clone(), layer.in_idx.clone()) for name, layer in layers}


def _calibrated(initial: dict, options: Options, base: Base) -> dict[str, tuple]:
    """Where the run should have begun: the largest smoothed sums of the importance, straight from autograd."""
    model, beta, sums = base.fresh(), LoSiAConfig().importance_beta1, {}
    for batch in islice(options.batches(), CALIBRATION_BATCHES):
        for name, importance in observe(model, initial, [batch])[1].items():
            now = importance.sum(1), importance.sum(0)
            before = sums.get(name, tuple(map(torch.zeros_like, now)))
            both = zip(before, now, strict=True)
            sums[name] = tuple(beta * old + (1 - beta) * new for old, new in both)
    found = {n: select_marginal_ref(*sums[n], *map(len, initial[n])) for n in initial}
    return {name: tuple(map(torch.tensor, subnet)) for name, subnet in found.items()}


def _reference(trained: Prepared, options: Options, initial: dict, base: Base):
    model = base.fresh().requires_grad_(False).train()
    timeline = trained.optimizer.timeline
    groups = [{each.name: model.get_submodule(each.name) for each in g} for g in timeline.groups]
    for linear in (linear for group in groups for linear in group.values()):
        linear.weight.requires_grad_(True)
    fields = ("importance", "rewarm", "update_type")
    same = {name: getattr(timeline.config, name) for name in fields}
    config = Config(timeline.config.period, warmup_steps=options.warmup, **same)
    reference = Training(model, groups, initial, config, lambda model, batch: model(**batch).loss)
    losses = []
    for step, batch in enumerate(options.batches()):
        rate = options.lr * schedule(step, options.steps, options.warmup)
        losses += reference.step([batch], rate).losses
    return losses, reference, model


def _shared(first: tuple, second: tuple) -> float:
    share = 1.0
    for mine, other in zip(first, second, strict=True):
        share *= len(set(mine.tolist()) & set(other.tolist())) / len(mine)
    return share
