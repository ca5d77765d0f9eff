"""Tables of the report, each from result files alone."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from .methods import METHODS, VARIANTS
from .paired import Paired, holm, mean_and_spread, paired
from .tasks import TASKS

OURS = "losia-p8"
NEAR = 0.01  # nats a token between two trials of a search that tell nothing: seeds differ by more
Results = list[dict[str, Any]]


def of(results: Results, **wanted: Any) -> Results:
    """Those whose run has these values, by seed."""
    found = [
        result
        for result in results
        if all(result["run"][key] == value for key, value in wanted.items())
    ]
    return sorted(found, key=lambda result: result["run"]["seed"])


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def show(values: list[float], digits: int = 2) -> str:
    """Mean ± spread, and how many where it is not three."""
    if not values:
        return ""
    mean, spread = mean_and_spread(values)
    text = f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")
    return text if len(values) == 3 else f"{text} (n={len(values)})"


def show_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def held_out(result: dict, value: str, group: str = "") -> float:
    return result["scores"]["held_out"][group][value]


def title(method: str, variant: str = "") -> str:
    return VARIANTS[variant].title if variant else METHODS[method].title


def usable(results: Results) -> tuple[Results, list[str]]:
    """What may be compared, and what was dropped and why: diverged runs, runs at a learning rate
    that is no longer the search's best, runs scored on other items than most of their task."""
    best = {
        key: min(trials, key=lambda trial: trial["scores"]["search"][""]["nll"])["run"]["lr"]
        for key, trials in _searches(results).items()
        if trials
    }
    most: dict[tuple, Counter] = {}
    for result in results:
        for which in ("items", "other_items"):
            if which in result:
                most.setdefault(_items_key(result, which), Counter())[result[which]] += 1
    kept, dropped = [], []
    for result in results:
        run = result["run"]
        where = f"{run['task']} {run['kind']}, {title(run['method'], run['variant'])}, seed {run['seed']}"
        chosen = best.get((run["scale"], run["task"], run["method"]))
        others = any(
            result[which] != most[_items_key(result, which)].most_common(1)[0][0]
            for which in ("items", "other_items")
            if which in result
        )
        if result["status"] != "ok":
            dropped.append(
                f"{where}, lr {run['lr']}: {result['status']}, {result.get('reason', '')}"
            )
        elif (
            run["kind"] not in ("search", "timing", "untrained", "sequence") and chosen != run["lr"]
        ):
            dropped.append(f"{where}: at lr {run['lr']}, but the search's best is {chosen}")
        elif others:
            dropped.append(f"{where}: scored on other items (another version of the data)")
        else:
            kept.append(result)
    return kept, dropped


def _items_key(result: dict[str, Any], which: str) -> tuple:
    """Of results with the same key all were scored on the same items."""
    run = result["run"]
    return run["scale"], run["task"], run["kind"] == "search", which


def _searches(results: Results) -> dict[tuple[str, str, str], Results]:
    trials: dict[tuple[str, str, str], Results] = {}
    for result in results:
        run = result["run"]
        if run["kind"] == "search" and result["status"] == "ok":
            trials.setdefault((run["scale"], run["task"], run["method"]), []).append(result)
    return trials


def quality(results: Results, task: str) -> str:
    """All methods on a task at equal steps: what was gained, and what was lost elsewhere."""
    untrained = of(results, task=task, kind="untrained")
    groups = [
        group
        for group in (untrained or of(results, task=task, kind="main") or [{}])[0]
        .get("scores", {})
        .get("held_out", {})
        if group
    ]
    others = [name for name in ("english", "code") if name != task]
    head = [
        "method",
        "lr",
        f"{TASKS[task].unit}, %",
        *(f"{group}, %" for group in groups),
        "tokens right, %",
        "nats a token",
        *(f"{name}, nats a token" for name in others),
    ]
    rows = []
    trained = {method: of(results, task=task, kind="main", method=method) for method in METHODS}
    for method, found in ({"untrained": untrained} | trained).items():
        if found:
            rows.append(
                [
                    title(method) if method in METHODS else method,
                    f"{found[0]['run']['lr']:.0e}" if method in METHODS else "",
                    show([held_out(r, "right") for r in found], 1),
                    *(show([held_out(r, "right", group) for r in found], 1) for group in groups),
                    show([held_out(r, "tokens") for r in found], 1),
                    show([held_out(r, "nll") for r in found], 3),
                    *(show([r["scores"][name][""]["nll"] for r in found], 3) for name in others),
                ]
            )
    return table(head, rows) if len(rows) > 1 else ""


@dataclass(frozen=True)
class Comparison:
    """LoSiA p 1/8 against ``method``, by the cost of right answers and by lines right; p: Holm's
    over the task's."""

    method: str
    nll: Paired
    right: Paired
    nll_p: float
    right_p: float

    @property
    def verdict(self) -> str:
        return {"more": "worse", "less": "better", "": "neither"}[self.nll.verdict(self.nll_p)]


def compared(results: Results, task: str, group: str = "") -> list[Comparison]:
    ours = of(results, task=task, kind="main", method=OURS)
    found = {}
    for method in METHODS:
        theirs = of(results, task=task, kind="main", method=method)
        nll, right = (paired(ours, theirs, value, group) for value in ("nll", "right"))
        if method != OURS and nll and right:
            found[method] = nll, right
    adjusted = iter(holm([one.p for pair in found.values() for one in pair]))
    return [
        Comparison(method, nll, right, next(adjusted), next(adjusted))
        for method, (nll, right) in found.items()
    ]


def comparison(results: Results, task: str, group: str = "") -> str:
    head = [
        f"LoSiA p 1/8 against{f', {group} items' if group else ''}",
        "nats an item, 95 %",
        "p",
        f"{TASKS[task].unit}, lines an item, 95 %",
        "p",
        "seeds in which it costs less",
    ]
    rows = [
        [
            title(row.method),
            str(row.nll),
            show_p(row.nll_p),
            str(row.right),
            show_p(row.right_p),
            fewer(row.nll),
        ]
        for row in compared(results, task, group)
    ]
    return table(head, rows) if rows else ""


def fewer(found: Paired) -> str:
    return f"{sum(seed < 0 for seed in found.seeds)} of {len(found.seeds)}"


def groups_of(results: Results, task: str) -> list[str]:
    """Groups of items that are kept apart, such as irregular verbs."""
    scored = of(results, task=task, kind="main")
    return [group for group in (scored[0]["scores"]["held_out"] if scored else {}) if group]


def searched(results: Results, task: str) -> str:
    """Every trial of every search; "at the edge": another rate beyond those tried may be as good or
    better."""
    trials = {method: of(results, task=task, kind="search", method=method) for method in METHODS}
    rates = sorted({r["run"]["lr"] for found in trials.values() for r in found})
    rows = []
    for method, found in trials.items():
        costs = {r["run"]["lr"]: r["scores"]["search"][""]["nll"] for r in found}
        if costs:
            best = min(costs, key=costs.__getitem__)
            whole = len(costs) == len(METHODS[method].lrs)
            edge = whole and at_edge(costs)
            cells = [
                (f"**{costs[r]:.3f}**" if r == best and whole else f"{costs[r]:.3f}")
                if r in costs
                else ""
                for r in rates
            ]
            rows.append([title(method), str(len(costs)), *cells, "at the edge" if edge else ""])
    return table(["method", "trials", *(f"{rate:.0e}" for rate in rates), ""], rows) if rows else ""


def at_edge(costs: dict[float, float]) -> bool:
    """Whether the smallest or the largest rate costs no more than NEAR above the least."""
    return min(costs[min(costs)], costs[max(costs)]) <= min(costs.values()) + NEAR
