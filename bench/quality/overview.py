"""What stands first in the report: all methods on all tasks, and in which LoSiA p 1/8 is worse, from the same tests."""

from .methods import METHODS
from .tables import OURS, SIGNIFICANT, Results, compared, held_out, of, show, table, title
from .tasks import TASKS

NOTABLE = 0.01  # nats a token on other text below which no difference is spoken of


def overview(results: Results, tasks: list[str]) -> str:
    """Cost of right answers on each task, the least of each bold, and that of English after it, mean over tasks."""
    found = {method: {task: of(results, task=task, kind="main", method=method) for task in tasks} for method in METHODS}
    found = {method: by_task for method, by_task in found.items() if any(by_task.values())}
    cells = {method: {task: show([held_out(r, "nll") for r in runs], 3) for task, runs in by_task.items()}
             for method, by_task in found.items()}  # fmt: skip
    for task in tasks:
        means = {method: mean for method, by_task in found.items() if (mean := _mean(by_task[task])) is not None}
        if means:
            best = min(means, key=means.__getitem__)
            cells[best][task] = f"**{cells[best][task]}**"
    rows = []
    for method, by_task in found.items():
        values = next(runs for runs in by_task.values() if runs)[0]["memory"]["trained_values"]
        english = [english_after(runs) for runs in by_task.values()]
        lost = f"{sum(english) / len(english):.3f}" if None not in english else ""
        rows.append([title(method), f"{values / 1e6:.2f}", *(cells[method][task] for task in tasks), lost])
    if not rows:
        return ""
    head = ["method", "values trained, M", *(TASKS[task].title for task in tasks), "english after, mean over tasks"]
    return table(head, rows) + "\n\nNats a token of right answers that were not trained on: less is better."


def _mean(runs: Results) -> float | None:
    return sum(held_out(r, "nll") for r in runs) / len(runs) if runs else None


def english_after(runs: Results) -> float | None:
    """Mean cost of a token of English after these runs."""
    return sum(r["scores"]["english"][""]["nll"] for r in runs) / len(runs) if runs else None


def verdicts(results: Results, tasks: list[str]) -> str:
    """Where LoSiA p 1/8 is worse, where better and where no difference was found."""
    rows = []
    for task in tasks:
        named: dict[str, list[str]] = {"worse": [], "neither": [], "better": []}
        for row in compared(results, task):
            significant = row["nll_p"] < SIGNIFICANT
            kind = "neither" if not significant else "worse" if row["nll"] > 0 else "better"
            named[kind].append(f"{title(row['method'])} ({row['nll']:+.2f})")
        more_lost = [f"{title(method)} ({ours - theirs:+.2f})" for method, ours, theirs in lost(results, task)
                     if ours > theirs + NOTABLE]  # fmt: skip
        if any(named.values()):
            rows.append([TASKS[task].title, *(", ".join(names) or "none" for names in (*named.values(), more_lost))])
    if not rows:
        return ""
    head = ["LoSiA p 1/8 on", "is worse than", "no difference was found to", "is better than",
            "loses more English than"]  # fmt: skip
    return table(head, rows) + (
        "\n\nIn brackets nats an item more than theirs, for English nats a token. Worse and better: p below "
        f"{SIGNIFICANT} in the paired test of the task's table. English: differences of the mean over seeds above "
        f"{NOTABLE}, untested."
    )


def lost(results: Results, task: str) -> list[tuple[str, float, float]]:
    """Mean cost on English of LoSiA p 1/8 and of each other method, after training on ``task``."""
    after = {method: english_after(of(results, task=task, kind="main", method=method)) for method in METHODS}
    ours = after.pop(OURS)
    return [(method, ours, theirs) for method, theirs in after.items() if ours is not None and theirs is not None]
