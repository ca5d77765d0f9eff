"""The first lines of the report: what a user should choose, what it costs, where it is better, level and worse."""

from itertools import product

from ..methods import STUDY
from .store import Store
from .study import BATCH_16, LONG, OURS, SMALL, Scale
from .tables import (
    Results,
    compared,
    english_after,
    main_runs,
    nats,
    of,
    title,
    trials_of,
    usable,
)
from .tasks import TASKS

PAPERS_SIZE = "losia-wide"
AGAINST = ("lora-r8", "lora-r64", "fft")


def choice(store: Store) -> str:
    """Of the small scale, which has been run."""
    results, _ = usable([r for r in store.all() if r["run"]["scale"] == SMALL.name])
    runs = {task: main_runs(results, task) for task in TASKS}
    mine = {task: found[OURS] for task, found in runs.items() if found[OURS]}
    if not mine:
        return ""
    values = next(iter(mine.values()))[0]["memory"]["trained_values"] / 1e6
    rates = sorted({found[0]["run"]["lr"] for found in mine.values()})
    lines = [
        f"**What to choose, of runs as short as these.** {title(OURS)}: {values:.2f} M trained values of 134.5 M, "
        f"learning rate {_span(rates)} (searched on each task). In nats a token of right answers, over "
        f"{len(mine)} tasks:"
    ]
    for method in AGAINST:
        verdicts = {"better": [], "neither": [], "worse": []}
        for task in mine:
            for row in compared(results, task):
                if row.method == method:
                    verdicts[row.verdict].append(TASKS[task].title)
        if any(verdicts.values()):
            words = [
                f"{word} on {', '.join(verdicts[key])}"
                for key, word in (("better", "better"), ("neither", "level"), ("worse", "worse"))
                if verdicts[key]
            ]
            lines.append(
                f"- against {title(method)} ({_values(results, method)} M values): {'; '.join(words)}."
            )
    lines.append(_settled(results))
    before = {task: of(results, task=task, kind="untrained") for task in mine}
    lines.append(_lost(runs, before))
    lines += filter(None, (_elsewhere(store, scale) for scale in (LONG, BATCH_16)))
    return "\n".join(lines)


def _elsewhere(store: Store, scale: Scale) -> str:
    """What other runs than the short ones say, on each task that they had."""
    results, _ = usable([r for r in store.all() if r["run"]["scale"] == scale.name])
    found = []
    for task in TASKS:
        runs = {method: each for method, each in main_runs(results, task).items() if each}
        if OURS in runs and len(runs) > 1:
            costs = ", ".join(
                f"{title(method)} {nats(each)} (English {english_after(each):.2f})"
                for method, each in runs.items()
            )
            found.append(f"{TASKS[task].title}: {costs}")
    if not found:
        return ""
    length = f"in runs of {scale.steps:,} steps of {scale.batch}"
    return f"- {length}, nats a token, each at the best rate of such runs: {'; '.join(found)}."


def _settled(results: Results) -> str:
    """What the items in this report had to do with the choice, and what the search split says of it."""
    least: dict[str, dict[str, float]] = {OURS: {}, PAPERS_SIZE: {}}
    for method, task in product(least, TASKS):
        costs = trials_of(results, task, method)
        if costs.keys() >= set(STUDY[method].lrs):  # else the search is not done
            least[method][task] = min(costs.values())
    both = least[OURS].keys() & least[PAPERS_SIZE].keys()
    fewer = sum(least[OURS][task] < least[PAPERS_SIZE][task] for task in both)
    return (
        f"- how it was chosen: rates on the search split alone; shape and moves after an exploratory look at items "
        f"like these, and the rank factor, 3/20 for the paper's 1/8, with both verdicts in sight, so it looks a "
        f"little better here than elsewhere. On the search split it costs less than {title(PAPERS_SIZE)} on {fewer} of "
        f"{len(both)} tasks."
    )


def _span(rates: list[float]) -> str:
    return f"{rates[0]:.0e}" if len(rates) == 1 else f"{rates[0]:.0e} to {rates[-1]:.0e}"


def _values(results: Results, method: str) -> str:
    found = of(results, kind="main", method=method)
    return f"{found[0]['memory']['trained_values'] / 1e6:.2f}"


def _lost(runs: dict[str, dict[str, Results]], before: dict[str, Results]) -> str:
    """What English costs after each method, mean over the tasks."""
    after = {"untrained": [english_after(found) for found in before.values()]}
    for method in (OURS, *AGAINST):
        after[title(method)] = [english_after(runs[task][method]) for task in before]
    cells = [
        f"{name} {sum(costs) / len(costs):.2f}"
        for name, costs in after.items()
        if None not in costs
    ]
    return f"- what English costs after, nats a token, mean over these tasks: {', '.join(cells)}."
