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
    rates = store.sequence_lrs(run)
    model, after = base.fresh(), []
    for name, lr in zip(names, rates, strict=True):
        trained, options = prepare(replace(run, task=name, lr=lr), TASKS[name], model, base)
        try:
            train(trained, options)
        except Diverged as error:
            return {"run": asdict(run), "status": "diverged", "reason": f"{name}: {error}"}
        model = trained.finish()
        after.append([score_task(model, base, other, run.scale) for other in names])
    right, nats = ([[each[key] for each in row] for row in after] for key in ("right", "nll"))
    items = fingerprint([item for name in names for item in scored_items(name, run.scale)])
    result = {"run": asdict(run), "status": "ok", "lrs": rates, "items": items}
    return result | {"after": right, "after_nats": nats}


def scored_items(name: str, scale: str) -> list[Item]:
    """The first of those that a single-task run is scored on."""
    return [replace(item, group="") for item in held_out(TASKS[name], SCALES[scale].few)[:SCORED]]


def score_task(model, base: Base, name: str, scale: str) -> dict[str, float]:
    items = scored_items(name, scale)
    found = summary(items, score_items(model, base.tokenizer, items, TASKS[name].max_length))[""]
    return {key: round(found[key], 4) for key in ("right", "nll")}


def single_task(result: dict[str, Any]) -> dict[str, float]:
    """What ``score_task`` says, of a single-task run."""
    columns = zip(*result["each"][:SCORED], strict=True)
    nlls, tokens, _, right, lines = map(sum, columns)
    return {"right": 100 * right / lines, "nll": nlls / tokens}


def measures(after: list[list[float]], single: list[float]) -> dict[str, float]:
    """AP: mean final score. FWT: mean of P(i, i) - single-task. BWT: mean over i < N of P(N, i) - P(i, i)."""
    count, last = len(after), after[-1]
    own = [after[i][i] for i in range(count)]
    gained = sum(mine - alone for mine, alone in zip(own, single, strict=True)) / count
    kept = sum(last[i] - own[i] for i in range(count - 1)) / (count - 1)
    return {"AP": sum(last) / count, "FWT": gained, "BWT": kept}
