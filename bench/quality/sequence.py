"""Continual learning (the paper's Table 5): five tasks one after another, the method's result merged between them."""

from dataclasses import asdict, replace
from typing import Any

from .evaluate import score_items, summary
from .items import Item, fingerprint
from .study import SCALES, Run
from .tasks import TASKS
from .training import Base, Diverged, held_out, prepare, train

SCORED = 60  # held-out items of each task, scored after each task


def carry_out_sequence(run: Run, base: Base, store) -> dict[str, Any]:
    """``after[i][j]``: percent right on task j after training on the tasks up to i, ``after_nats`` the cost of a token
    of its right answers. Raises NotReady."""
    names = run.task.split("+")
    rates = [store.best_lr(run.scale, name, run.method) for name in names]
    model = base.fresh()
    after = []
    for name, lr in zip(names, rates, strict=True):
        stage = replace(run, task=name, lr=lr)
        trained, options = prepare(stage, TASKS[name], model, base)
        try:
            train(trained, options)
        except Diverged as error:
            return {"run": asdict(run), "status": "diverged", "reason": f"{name}: {error}"}
        model = trained.finish()
        after.append([score_task(model, base, other, run.scale) for other in names])
    items = [item for name in names for item in scored_items(name, run.scale)]
    right, nats = (
        [[score[key] for score in scores] for scores in after] for key in ("right", "nll")
    )
    return {
        "run": asdict(run),
        "status": "ok",
        "lrs": rates,
        "after": right,
        "after_nats": nats,
        "items": fingerprint(items),
    }


def scored_items(name: str, scale: str) -> list[Item]:
    """The first of those that a single-task run is scored on."""
    return [replace(item, group="") for item in held_out(TASKS[name], SCALES[scale].few)[:SCORED]]


def score_task(model, base: Base, name: str, scale: str) -> dict[str, float]:
    items = scored_items(name, scale)
    found = summary(items, score_items(model, base.tokenizer, items, TASKS[name].max_length))[""]
    return {key: round(found[key], 4) for key in ("right", "nll")}


def single_task(result: dict[str, Any]) -> dict[str, float]:
    """What ``score_task`` says, of a single-task run."""
    each = result["each"][:SCORED]
    nlls, tokens, _, right, lines = (sum(column) for column in zip(*each, strict=True))
    return {"right": 100 * right / lines, "nll": nlls / tokens}


def measures(after: list[list[float]], single: list[float]) -> dict[str, float]:
    """AP: mean final score. FWT: mean of P(i, i) - single-task. BWT: mean over i < N of P(N, i) - P(i, i)."""
    count = len(after)
    own = [after[i][i] for i in range(count)]
    return {
        "AP": sum(after[-1]) / count,
        "FWT": sum(mine - alone for mine, alone in zip(own, single, strict=True)) / count,
        "BWT": sum(after[-1][i] - own[i] for i in range(count - 1)) / (count - 1),
    }
