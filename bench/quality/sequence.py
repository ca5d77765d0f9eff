"""Continual learning (the paper's Table 5): five tasks one after another, the method's result merged between them."""

from dataclasses import asdict, replace
from typing import Any

from .evaluate import score_items, summary
from .items import fingerprint
from .store import Store
from .study import Run
from .tasks import TASKS
from .training import Base, Diverged, prepare, train

SCORED = 60  # held-out items of each task, scored after each task


def carry_out_sequence(run: Run, base: Base, store: Store) -> dict[str, Any]:
    """``after[i][j]``: percent right on task j after training on the tasks up to i. Raises NotReady."""
    names = run.task.split("+")
    rates = [store.best_lr(run.scale, name, run.method) for name in names]
    model = base.fresh()
    after = []
    for name, lr in zip(names, rates, strict=True):
        stage = replace(run, task=name, lr=lr)
        trained, setting = prepare(stage, TASKS[name], model, base)
        try:
            train(trained, setting)
        except Diverged as error:
            return {"run": asdict(run), "status": "diverged", "reason": f"{name}: {error}"}
        model = trained.finish()
        after.append([score_task(model, base, other) for other in names])
    held_out = [item for name in names for item in TASKS[name].splits.held_out[:SCORED]]
    return {"run": asdict(run), "status": "ok", "lrs": rates, "after": after, "items": fingerprint(held_out)}


def score_task(model, base: Base, name: str) -> float:
    task = TASKS[name]
    items = [replace(item, group="") for item in task.splits.held_out[:SCORED]]
    scores = score_items(model, base.tokenizer, items, task.max_length)
    return round(summary(items, scores)[""]["right"], 2)


def single_task(result: dict[str, Any]) -> float:
    """Percent right of a single-task run on the items that a sequence is scored on."""
    each = result["each"][:SCORED]
    return 100 * sum(right for *_, right, _ in each) / sum(lines for *_, lines in each)


def measures(after: list[list[float]], single: list[float]) -> dict[str, float]:
    """AP: mean final score. FWT: mean of P(i, i) - single-task. BWT: mean over i < N of P(N, i) - P(i, i)."""
    count = len(after)
    own = [after[i][i] for i in range(count)]
    return {
        "AP": sum(after[-1]) / count,
        "FWT": sum(mine - alone for mine, alone in zip(own, single, strict=True)) / count,
        "BWT": sum(after[-1][i] - own[i] for i in range(count - 1)) / (count - 1),
    }
