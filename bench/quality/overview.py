"""What stands first in the report: all methods on all tasks, and in which LoSiA p 1/8 is worse,
from the same tests."""

from .methods import METHODS
from .paired import SIGNIFICANT
from .tables import OURS, Results, at_edge, compared, groups_of, held_out, of, show, table, title
from .tasks import TASKS

NOTABLE = 0.01  # nats a token on other text below which no difference is spoken of


def overview(results: Results, tasks: list[str]) -> str:
    """Cost of right answers on each task and that of English after it, mean over tasks; then the
    answers right."""
    found = {
        method: {task: of(results, task=task, kind="main", method=method) for task in tasks}
        for method in METHODS
    }
    found = {method: by_task for method, by_task in found.items() if any(by_task.values())}
    if not found:
        return ""
    nats, right = [], []
    for method, by_task in found.items():
        values = next(runs for runs in by_task.values() if runs)[0]["memory"]["trained_values"]
        english = [english_after(runs) for runs in by_task.values()]
        lost = f"{sum(english) / len(english):.3f}" if None not in english else ""
        costs = [
            show([held_out(r, "nll") for r in runs], 3)
            + (" †" if runs and edge(results, task, method) else "")
            for task, runs in by_task.items()
        ]
        nats.append([title(method), f"{values / 1e6:.2f}", *costs, lost])
        right.append(
            [
                title(method),
                *(show([held_out(r, "right") for r in runs], 1) for runs in by_task.values()),
            ]
        )
    titles = [TASKS[task].title for task in tasks]
    return "\n\n".join(
        [
            "Nats a token of right answers that were not trained on; less is better. †: the learning rate is the "
            "smallest or largest that was tried, or one of these was as good: a wider search might find a better one.",
            table(["method", "values trained, M", *titles, "english after, mean over tasks"], nats),
            "Answers right, % (of code: lines), which separates less:",
            table(["method", *titles], right),
        ]
    )


def edge(results: Results, task: str, method: str) -> bool:
    trials = of(results, task=task, kind="search", method=method)
    return bool(trials) and at_edge(
        {r["run"]["lr"]: r["scores"]["search"][""]["nll"] for r in trials}
    )


def english_after(runs: Results) -> float | None:
    """Mean cost of a token of English after these runs."""
    return sum(r["scores"]["english"][""]["nll"] for r in runs) / len(runs) if runs else None


def verdicts(results: Results, tasks: list[str]) -> str:
    """Where LoSiA p 1/8 is worse, where better and where no clear difference was found."""
    rows = []
    for task, group in [
        (name, group) for name in tasks for group in ("", *groups_of(results, name))
    ]:
        named: dict[str, list[str]] = {"worse": [], "neither": [], "better": []}
        for row in compared(results, task, group):
            named[row.verdict].append(
                f"{title(row.method)} ({row.nll.mean:+.2f} ± {row.nll.half_width:.2f})"
            )
        other: dict[bool, list[str]] = {True: [], False: []}
        for method, more in more_english(results, task).items() if not group else ():
            if abs(more) > NOTABLE:
                other[more > 0].append(f"{title(method)} ({more:+.2f})")
        if any(named.values()):
            cells = [", ".join(names) or "none" for names in (*named.values(), *other.values())]
            rows.append(
                [
                    TASKS[task].title + (f", {group} ones" if group else ""),
                    *(cells[:3] if group else cells),
                ]
            )
    if not rows:
        return ""
    head = [
        "LoSiA p 1/8 on",
        "is worse than",
        "no clear difference to",
        "is better than",
        "loses more English than",
        "loses less English than",
    ]
    return table(head, [row + [""] * (len(head) - len(row)) for row in rows]) + (
        "\n\nIn brackets nats an item more than theirs with the 95 % interval over items; for English nats a token, "
        f"means over seeds, untested. Worse and better: p below {SIGNIFICANT} in the paired test over items, Holm's "
        "over the task's, and every seed says the same. A wide interval: too few items to tell."
    )


def more_english(results: Results, task: str) -> dict[str, float]:
    """What English costs more after LoSiA p 1/8 than after each other method, trained on
    ``task``."""
    after = {
        method: english_after(of(results, task=task, kind="main", method=method))
        for method in METHODS
    }
    ours = after.pop(OURS)
    return {
        method: ours - theirs
        for method, theirs in after.items()
        if ours is not None and theirs is not None
    }
