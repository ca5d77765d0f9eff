"""What is learned against what is lost: each learning rate of each search buys the one with the other."""

from ..harness.markdown import table
from ..methods import STUDY
from .tables import Results, of, title
from .tasks import TASKS

BEARABLE = 0.2  # nats a token of English that a user would give for a task


def tradeoff(results: Results, task: str, method: str) -> list[tuple[float, float, float]]:
    """``(lr, nats a token learned, nats a token of English lost)`` of the trials that say both, by rate. Learned and
    lost are against the untrained model, on the search split and on English."""
    start = of(results, task=task, kind="untrained")
    trials = of(results, task=task, kind="search", method=method)
    if not start or "search" not in start[0]["scores"]:
        return []
    before = {name: start[0]["scores"][name][""]["nll"] for name in ("search", "english")}
    found = []
    for trial in trials:
        if "english" in trial["scores"]:
            nats = {name: trial["scores"][name][""]["nll"] for name in before}
            learned, lost = (before["search"] - nats["search"], nats["english"] - before["english"])
            found.append((trial["run"]["lr"], learned, lost))
    return sorted(found)


def bearable(trials: list[tuple[float, float, float]]) -> float | None:
    """The most that is learned at a rate that loses no more than BEARABLE."""
    return max((learned for _, learned, lost in trials if lost <= BEARABLE), default=None)


def learned_and_lost(results: Results) -> str:
    parts = []
    for task in TASKS:
        by_method = {method: tradeoff(results, task, method) for method in STUDY}
        rates = sorted({lr for trials in by_method.values() for lr, *_ in trials})
        rows = []
        for method, trials in by_method.items():
            if trials:
                cells = {lr: f"{learned:.2f} / {lost:+.2f}" for lr, learned, lost in trials}
                most = bearable(trials)
                last = "none" if most is None else f"{most:.3f}"
                rows.append([title(method), *(cells.get(lr, "") for lr in rates), last])
        if rows:
            head = ["method", *(f"{lr:.0e}" for lr in rates), f"learned at most {BEARABLE} lost"]
            parts.append(f"{TASKS[task].title.capitalize()}:\n\n{table(head, rows)}")
    note = (
        "Nats a token learned (right answers of the search split) / of English lost, both against the untrained model, "
        "by learning rate; one seed."
    )
    return "\n\n".join([note, *parts]) if parts else ""
