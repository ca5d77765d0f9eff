"""Tables of the report, each from results alone."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..harness.markdown import table
from ..methods import STUDY
from .paired import SIGNIFICANT, Paired, holm, mean_and_spread, paired
from .study import NEAR, OURS, best_rate
from .tasks import TASKS

NOTABLE = 0.01  # nats a token on other text below which no difference is spoken of
Results = list[dict[str, Any]]


def of(results: Results, **wanted: Any) -> Results:
    found = [r for r in results if all(r["run"][key] == value for key, value in wanted.items())]
    return sorted(found, key=lambda result: result["run"]["seed"])


def main_runs(results: Results, task: str) -> dict[str, Results]:
    return {method: of(results, task=task, kind="main", method=method) for method in STUDY}


def show(values: list[float], digits: int = 2) -> str:
    if not values:
        return ""
    mean, spread = mean_and_spread(values)
    text = f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")
    return text if len(values) == 3 else f"{text} (n={len(values)})"


def show_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def held_out(found: Results, value: str, digits: int, group: str = "") -> str:
    return show([r["scores"]["held_out"][group][value] for r in found], digits)


def nats(found: Results) -> str:
    return held_out(found, "nll", 3)


def other_text(found: Results, name: str) -> str:
    return show([r["scores"][name][""]["nll"] for r in found], 3)


def fewer(found: Paired) -> str:
    return f"{sum(seed < 0 for seed in found.seeds)} of {len(found.seeds)}"


def title(method: str) -> str:
    return STUDY[method].title


def groups_of(results: Results, task: str) -> list[str]:
    scored = of(results, task=task, kind="untrained") or of(results, task=task, kind="main")
    return [group for group in (scored[0]["scores"]["held_out"] if scored else {}) if group]


def usable(results: Results) -> tuple[Results, list[str]]:
    """What may be compared, and what was dropped and why: diverged runs, runs at a learning rate that is no longer the
    search's best, runs scored on other items than most of their task."""
    trials: dict[tuple, dict[float, float]] = {}
    most: dict[tuple, Counter] = {}
    for result in results:
        run = result["run"]
        if run["kind"] == "search" and result["status"] == "ok":
            costs = trials.setdefault((run["scale"], run["task"], run["method"]), {})
            costs[run["lr"]] = result["scores"]["search"][""]["nll"]
        for key, items in _items(result):
            most.setdefault(key, Counter())[items] += 1
    kept, dropped = [], []
    for result in results:
        run, status = result["run"], result["status"]
        named = f"{run['task']} {run['kind']}, {title(run['method'])}"
        where = f"{named}, seed {run['seed']}"
        costs = trials.get((run["scale"], run["task"], run["method"]))
        chosen = best_rate(costs) if costs else None
        searched = run["kind"] not in ("search", "timing", "untrained", "sequence")
        if status != "ok":
            dropped.append(f"{where}, lr {run['lr']}: {status}, {result.get('reason', '')}")
        elif searched and chosen != run["lr"]:
            dropped.append(f"{where}: at lr {run['lr']}, but the search's best is {chosen}")
        elif any(items != most[key].most_common(1)[0][0] for key, items in _items(result)):
            dropped.append(f"{where}: scored on other items (another version of the data)")
        else:
            kept.append(result)
    return kept, dropped


def _items(result: dict[str, Any]) -> list[tuple[tuple, str]]:
    """Fingerprints; of results with the same key all were scored on the same items."""
    run, names = result["run"], [name for name in ("items", "other_items") if name in result]
    key = run["scale"], run["task"], run["kind"] == "search"
    return [((*key, name), result[name]) for name in names]


def quality(results: Results, task: str) -> str:
    groups = groups_of(results, task)
    others = [name for name in ("english", "code") if name != task]
    head = ["method", "lr", f"{TASKS[task].unit}, %", *(f"{group}, %" for group in groups)]
    head += ["tokens right, %", "nats a token", *(f"{name}, nats a token" for name in others)]
    untrained, rows = {"untrained": of(results, task=task, kind="untrained")}, []
    for method, found in (untrained | main_runs(results, task)).items():
        if found:
            named = method in STUDY
            cells = [held_out(found, "right", 1, group) for group in ("", *groups)]
            cells += [held_out(found, "tokens", 1), nats(found)]
            cells += [other_text(found, name) for name in others]
            rate = f"{found[0]['run']['lr']:.0e}" if named else ""
            rows.append([title(method) if named else method, rate, *cells])
    return table(head, rows) if len(rows) > 1 else ""


@dataclass(frozen=True)
class Comparison:
    """LoSiA against ``method``, by the cost of right answers and by lines right; p: Holm's over the task's."""

    method: str
    nll: Paired
    right: Paired
    nll_p: float
    right_p: float

    @property
    def verdict(self) -> str:
        return {"more": "worse", "less": "better", "": "neither"}[self.nll.verdict(self.nll_p)]


def compared(results: Results, task: str, group: str = "") -> list[Comparison]:
    runs, found = main_runs(results, task), {}
    for method, theirs in runs.items():
        nll, right = (paired(runs[OURS], theirs, value, group) for value in ("nll", "right"))
        if method != OURS and nll and right:
            found[method] = nll, right
    p = iter(holm([one.p for pair in found.values() for one in pair]))
    return [Comparison(method, *pair, next(p), next(p)) for method, pair in found.items()]


def comparison(results: Results, task: str, group: str = "") -> str:
    head = [f"LoSiA against{f', {group} items' if group else ''}", "nats an item, 95 %", "p"]
    head += [f"{TASKS[task].unit}, lines an item, 95 %", "p", "seeds in which it costs less"]
    rows = []
    for row in compared(results, task, group):
        costs, right = [str(row.nll), show_p(row.nll_p)], [str(row.right), show_p(row.right_p)]
        rows.append([title(row.method), *costs, *right, fewer(row.nll)])
    return table(head, rows)


def trials_of(results: Results, task: str, method: str) -> dict[float, float]:
    found = of(results, task=task, kind="search", method=method)
    return {r["run"]["lr"]: r["scores"]["search"][""]["nll"] for r in found}


def searched(results: Results, task: str) -> str:
    """Every trial of every search; "at the edge": another rate beyond those tried may be as good or better."""
    trials = {method: trials_of(results, task, method) for method in STUDY}
    rates, rows = sorted({rate for costs in trials.values() for rate in costs}), []
    for method, costs in trials.items():
        if costs:
            best = best_rate(costs)
            inside = best not in (min(costs), max(costs))
            whole = inside or set(STUDY[method].lrs) <= costs.keys()
            cells = [f"{costs[rate]:.3f}" if rate in costs else "" for rate in rates]
            if whole:
                cells[rates.index(best)] = f"**{costs[best]:.3f}**"
            edge = "at the edge" if whole and at_edge(costs) else ""
            rows.append([title(method), str(len(costs)), *cells, edge])
    return table(["method", "trials", *(f"{rate:.0e}" for rate in rates), ""], rows)


def at_edge(costs: dict[float, float]) -> bool:
    """Whether the smallest or the largest rate costs no more than NEAR above the least."""
    return min(costs[min(costs)], costs[max(costs)]) <= min(costs.values()) + NEAR


def overview(results: Results, tasks: list[str]) -> str:
    """Cost of right answers on each task and that of English after it, mean over tasks; then the answers right."""
    costs, right, by_task = [], [], {task: main_runs(results, task) for task in tasks}
    for method in STUDY:
        mine = {task: runs[method] for task, runs in by_task.items()}
        if any(mine.values()):
            values = next(filter(None, mine.values()))[0]["memory"]["trained_values"]
            english = [english_after(runs) for runs in mine.values()]
            lost = f"{sum(english) / len(english):.3f}" if None not in english else ""
            cells = []
            for task, runs in mine.items():
                trials = trials_of(results, task, method)
                cells.append(nats(runs) + (" †" if runs and trials and at_edge(trials) else ""))
            costs.append([title(method), f"{values / 1e6:.2f}", *cells, lost])
            right.append([title(method), *(held_out(runs, "right", 1) for runs in mine.values())])
    titles = [TASKS[task].title for task in tasks]
    head = ["method", "values trained, M", *titles, "english after, mean over tasks"]
    parts = [
        "Nats a token of right answers that were not trained on; less is better. †: the smallest or largest learning "
        "rate that was tried was the best, or as good: a wider search might find a better one.",
        table(head, costs),
        "Answers right, % (of code: lines), which separates less:",
        table(["method", *titles], right),
    ]
    return "\n\n".join(parts) if costs else ""


def english_after(runs: Results) -> float | None:
    return sum(r["scores"]["english"][""]["nll"] for r in runs) / len(runs) if runs else None


def verdicts(results: Results, tasks: list[str]) -> str:
    """Where OURS is worse, where better and where no clear difference was found."""
    rows = []
    for task in tasks:
        for group in ("", *groups_of(results, task)):
            named: dict[Any, list[str]] = {each: [] for each in ("worse", "neither", "better")}
            for row in compared(results, task, group):
                size = f"{row.nll.mean:+.2f} ± {row.nll.half_width:.2f}"
                named[row.verdict].append(f"{title(row.method)} ({size})")
            any_verdict = any(named.values())
            named |= {} if group else {True: [], False: []}
            for method, more in more_english(results, task).items() if not group else ():
                if abs(more) > NOTABLE:
                    named[more > 0].append(f"{title(method)} ({more:+.2f})")
            if any_verdict:
                cells = [", ".join(names) or "none" for names in named.values()]
                first = TASKS[task].title + (f", {group} ones" if group else "")
                rows.append([first, *cells, *[""] * (5 - len(cells))])
    head = (
        f"{title(OURS)} on | is worse than | no clear difference to | is better than"
        " | loses more English than | loses less English than"
    )
    note = (
        "\n\nIn brackets nats an item more than theirs with the 95 % interval over items; for English nats a token, "
        f"means over seeds, untested. Worse and better: p below {SIGNIFICANT} in the paired test over items, Holm's "
        "over the task's, and every seed says the same. A wide interval: too few items to tell."
    )
    return table(head, rows) + note if rows else ""


def more_english(results: Results, task: str) -> dict[str, float]:
    """What English costs more after OURS than after each other method, trained on ``task``."""
    after = {name: english_after(runs) for name, runs in main_runs(results, task).items()}
    ours = after.pop(OURS)
    return {name: ours - each for name, each in after.items() if None not in (ours, each)}
