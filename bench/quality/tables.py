"""Tables of the report, each from result files alone."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

from .methods import METHODS, VARIANTS
from .paired import holm, item_differences, mean_and_spread, sign_flip_test
from .sequence import measures, single_task
from .study import SCALES
from .tasks import TASKS

OURS = "losia-p8"
SIGNIFICANT = 0.05
Results = list[dict[str, Any]]


def of(results: Results, **wanted: Any) -> Results:
    """Those whose run has these values, by seed."""
    found = [result for result in results if all(result["run"][key] == value for key, value in wanted.items())]
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
    """What may be compared, and what was dropped and why: diverged runs, runs at a learning rate that is no longer the
    search's best, runs scored on other items than most of their task."""
    best = {key: min(trials, key=lambda trial: trial["scores"]["search"][""]["nll"])["run"]["lr"]
            for key, trials in _searches(results).items() if trials}  # fmt: skip
    most = {}
    for result in results:
        if "items" in result:
            run = result["run"]
            most.setdefault((run["scale"], run["task"], run["kind"] == "search"), Counter())[result["items"]] += 1
    kept, dropped = [], []
    for result in results:
        run = result["run"]
        where = f"{run['task']} {run['kind']}, {title(run['method'], run['variant'])}, seed {run['seed']}"
        chosen = best.get((run["scale"], run["task"], run["method"]))
        items = most.get((run["scale"], run["task"], run["kind"] == "search"))
        if result["status"] != "ok":
            dropped.append(f"{where}, lr {run['lr']}: {result['status']}, {result.get('reason', '')}")
        elif run["kind"] not in ("search", "timing", "untrained", "sequence") and chosen != run["lr"]:
            dropped.append(f"{where}: at lr {run['lr']}, but the search's best is {chosen}")
        elif "items" in result and result["items"] != items.most_common(1)[0][0]:
            dropped.append(f"{where}: scored on other items (another version of the data)")
        else:
            kept.append(result)
    return kept, dropped


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
    groups = [group for group in (untrained or of(results, task=task, kind="main") or [{}])[0]
              .get("scores", {}).get("held_out", {}) if group]  # fmt: skip
    others = [name for name in ("english", "code") if name != task]
    head = ["method", "lr", f"{TASKS[task].unit}, %", *(f"{group}, %" for group in groups), "tokens right, %",
            "nats a token", *(f"{name}, nats a token" for name in others)]  # fmt: skip
    rows = []
    trained = {method: of(results, task=task, kind="main", method=method) for method in METHODS}
    for method, found in ({"untrained": untrained} | trained).items():
        if found:
            rows.append([
                title(method) if method in METHODS else method,
                f"{found[0]['run']['lr']:.0e}" if method in METHODS else "",
                show([held_out(r, "right") for r in found], 1),
                *(show([held_out(r, "right", group) for r in found], 1) for group in groups),
                show([held_out(r, "tokens") for r in found], 1),
                show([held_out(r, "nll") for r in found], 3),
                *(show([r["scores"][name][""]["nll"] for r in found], 3) for name in others),
            ])  # fmt: skip
    return table(head, rows) if len(rows) > 1 else ""


def compared(results: Results, task: str) -> list[dict[str, Any]]:
    """LoSiA p 1/8 against every other method: differences over items and their p, Holm's over all of the task's."""
    ours = of(results, task=task, kind="main", method=OURS)
    rows = []
    for method in METHODS:
        theirs = of(results, task=task, kind="main", method=method)
        shared = {r["run"]["seed"] for r in ours} & {r["run"]["seed"] for r in theirs}
        if method == OURS or not shared:
            continue
        row = {"method": method, "seeds": len(shared)}
        for value in ("nll", "right"):
            differences = item_differences(ours, theirs, value)
            row[value] = sum(differences) / len(differences)
            row[f"{value}_p"] = sign_flip_test(differences)
        better = [_nats_an_item(a) < _nats_an_item(b) for a in ours for b in theirs
                  if a["run"]["seed"] == b["run"]["seed"]]  # fmt: skip
        rows.append(row | {"better": sum(better)})
    adjusted = holm([row[f"{value}_p"] for row in rows for value in ("nll", "right")])
    for place, row in enumerate(rows):
        row["nll_p"], row["right_p"] = adjusted[2 * place], adjusted[2 * place + 1]
    return rows


def _nats_an_item(result: dict) -> float:
    """Of all held-out items, as in the paired test."""
    return sum(nll for nll, *_ in result["each"]) / len(result["each"])


def comparison(results: Results, task: str) -> str:
    head = ["LoSiA p 1/8 against", "nats an item", "p", f"{TASKS[task].unit}, lines an item", "p",
            "seeds in which it is better"]  # fmt: skip
    rows = [[title(row["method"]), f"{row['nll']:+.3f}", show_p(row["nll_p"]), f"{row['right']:+.3f}",
             show_p(row["right_p"]), f"{row['better']} of {row['seeds']}"]
            for row in compared(results, task)]  # fmt: skip
    return table(head, rows) if rows else ""


def searched(results: Results, task: str) -> str:
    """Every trial of every search."""
    trials = {method: of(results, task=task, kind="search", method=method) for method in METHODS}
    rates = sorted({r["run"]["lr"] for found in trials.values() for r in found})
    rows = []
    for method, found in trials.items():
        costs = {r["run"]["lr"]: r["scores"]["search"][""]["nll"] for r in found}
        if costs:
            best = min(costs, key=costs.__getitem__)
            whole = len(costs) == len(METHODS[method].lrs)
            edge = whole and best in (min(METHODS[method].lrs), max(METHODS[method].lrs))
            cells = [(f"**{costs[r]:.3f}**" if r == best and whole else f"{costs[r]:.3f}") if r in costs else ""
                     for r in rates]  # fmt: skip
            rows.append([title(method), str(len(costs)), *cells, "at the edge" if edge else ""])
    return table(["method", "trials", *(f"{rate:.0e}" for rate in rates), ""], rows) if rows else ""


def ablations(results: Results, task: str = "pronunciation") -> str:
    """One choice changed, the same seeds, the same learning rate."""
    base = of(results, task=task, kind="main", method=OURS)
    rows = []
    for name, variant in VARIANTS.items():
        found = of(results, task=task, kind="ablation", variant=name)
        shared = {r["run"]["seed"] for r in found} & {r["run"]["seed"] for r in base}
        if shared:
            differences = item_differences(found, base, "nll")
            more = f"{sum(differences) / len(differences):+.3f}"
            rows.append([variant.title, *_three(found), more, show_p(sign_flip_test(differences))])
    if not rows:
        return ""
    head = ["changed", "nats a token", "tokens right, %", "english, nats a token", "nats an item more than the default",
            "p (of one test)"]  # fmt: skip
    return table(head, [["nothing", *_three(base), "", ""], *rows])


def _three(found: Results) -> list[str]:
    return [show([held_out(r, "nll") for r in found], 3), show([held_out(r, "tokens") for r in found], 1),
            show([r["scores"]["english"][""]["nll"] for r in found], 3)]  # fmt: skip


def data_scales(results: Results) -> str:
    """Cost by number of steps, of LoSiA with several cycles (the paper's Table 4) and of others."""
    found = [r for r in results if r["run"]["kind"].startswith("scale-") or
             (r["run"]["task"] == "pronunciation" and r["run"]["kind"] in ("main", "ablation"))]  # fmt: skip
    lengths = {r["run"]["steps"] for r in found if r["run"]["kind"].startswith("scale-")}
    if not lengths:
        return ""
    cycles = {"cycles-half": "1/2 cycle", "": "1 cycle", "cycles-2": "2 cycles", "period-100": "period 100"}
    columns = {f"{title(OURS)}, {name}": (OURS, variant) for variant, name in cycles.items()}
    columns |= {title(method): (method, "") for method in METHODS if of(found, method=method, steps=max(lengths))
                and method != OURS}  # fmt: skip
    rows = [
        [str(steps), *(show([held_out(r, "nll") for r in of(found, steps=steps, method=method, variant=variant)], 3)
                       for method, variant in columns.values())]
        for steps in sorted(lengths | {SCALES[found[0]["run"]["scale"]].steps})
    ]  # fmt: skip
    note = "Nats a token. Learning rates are those found for the scale's own number of steps."
    return f"{table(['steps', *columns], rows)}\n\n{note}"


FORMS = {"marginal": "", "together-100-marginal": "together-100"}
RIVALS = {
    "cycles-quarter": "a quarter of a cycle", "cycles-half": "half a cycle", "cycles-2": "two cycles",
    "period-100": "the paper's period of 100", "budget": "rank factors by importance",
    "marginal": "importance by sums only", "alignment-16": "runs of 16",
}  # fmt: skip


def automatic(results: Results) -> str:
    """What could replace a default, against it, in words from the paired tests."""
    parts = []
    for task in TASKS:
        base = of(results, task=task, kind="main", method=OURS)
        found = {variant: of(results, task=task, kind="ablation", variant=variant) for variant in RIVALS}
        lines = [verdict(name, found[variant], base) for variant, name in RIVALS.items()]
        lines.append(verdict("two cycles, against the period of 100", found["cycles-2"], found["period-100"]))
        if any(lines):
            parts.append(f"Against LoSiA p 1/8 with one cycle a run, on {TASKS[task].title}:\n\n" +
                         "\n".join(filter(None, lines)))  # fmt: skip
    return "\n\n".join(parts)


def importance_forms(results: Results) -> str:
    """Importance by sums only against the paper's, wherever both were run, by length of the slots."""
    rows = []
    for result in of(results, method=OURS, seed=0):
        run = result["run"]
        if run["variant"] in FORMS:
            same = {key: run[key] for key in ("method", "task", "steps", "kind")}
            found = of(results, **same, variant=run["variant"])
            whole = "main" if run["kind"] == "ablation" else run["kind"]
            base = of(results, **same | {"kind": whole}, variant=FORMS[run["variant"]])
            if base:
                differences = item_differences(found, base, "nll")
                rows.append([TASKS[run["task"]].title, str(run["steps"]), str(result["made"]["period"]),
                             show([held_out(r, "nll") for r in base], 3), show([held_out(r, "nll") for r in found], 3),
                             f"{sum(differences) / len(differences):+.3f}",
                             show_p(sign_flip_test(differences))])  # fmt: skip
    head = ["task", "steps", "steps of a slot", "the paper's importance, nats a token", "sums only",
            "nats an item more", "p (of one test)"]  # fmt: skip
    return table(head, rows) if rows else ""


def verdict(name: str, found: Results, base: Results) -> str:
    """One line, if they share a seed."""
    if not {r["run"]["seed"] for r in found} & {r["run"]["seed"] for r in base}:
        return ""
    differences = item_differences(found, base, "nll")
    mean, p = sum(differences) / len(differences), sign_flip_test(differences)
    word = "no difference" if p >= SIGNIFICANT else "better" if mean < 0 else "worse"
    return f"- {name}: {word} ({mean:+.3f} nats an item, p {show_p(p)}, one test)"


def costs(results: Results, task: str = "pronunciation") -> str:
    """Bytes that a method adds to the weights, and seconds where the machine was quiet."""
    rows = []
    for method in METHODS:
        found = of(results, task=task, kind="main", method=method)
        timed = [r for r in of(results, kind="timing", method=method) if r["provenance"]["quiet"]]
        if found:
            memory = found[0]["memory"]
            added = 0 if method in ("fft", "galore") else 4 * memory["trained_values"]
            rest = sum(memory.get(key, 0) for key in ("gradient_bytes", "optimizer_bytes", "observing_bytes"))
            rows.append([title(method), f"{memory['trained_values'] / 1e6:.2f}", f"{(added + rest) / 1e6:.0f}",
                         show([held_out(r, "nll") for r in found], 3),
                         f"{timed[0]['seconds']['step']:.3f}" if timed else "not measured",
                         show([held_out(r, "nll") for r in of(results, task=task, kind="equal-time", method=method)], 3)
                         or ("" if method == "fft" else "not run")])  # fmt: skip
    head = ["method", "values trained, M", "MB added, activations aside", "nats a token at equal steps",
            "seconds a step", "nats a token in full fine-tuning's time"]  # fmt: skip
    return table(head, rows) if rows else ""


MEASURES = ("AP", "FWT", "BWT")
UNITS = (("right", "after", "%"), ("nll", "after_nats", "nats"))


def continual(results: Results) -> str:
    """Table 5 of the paper."""
    rows = []
    for method in METHODS:
        found = []
        for result in of(results, kind="sequence", method=method):
            names = result["run"]["task"].split("+")
            alone = [of(results, kind="main", method=method, task=name, seed=result["run"]["seed"]) for name in names]
            if all(alone):
                ones = [single_task(singles[0]) for singles in alone]
                found.append([measures(result[after], [one[key] for one in ones]) for key, after, _ in UNITS])
        if found:
            rows.append([title(method), *(show([pair[place][name] for pair in found], digits)
                                          for place, digits in enumerate((1, 3)) for name in MEASURES)])  # fmt: skip
    if not rows:
        return ""
    head = ["method", *(f"{name}, {unit}" for *_, unit in UNITS for name in MEASURES)]
    return table(head, rows) + (
        "\n\nPercent right, and nats a token of right answers, in which less is better and a positive BWT is what was "
        "forgotten. Of spelling and arithmetic next to nothing is right in runs of this length: there only nats tell."
    )


def oracle(results: Results) -> str:
    rows = []
    for r in of(results, kind="oracle"):
        mine, other = (r[key]["held_out"][""] for key in ("scores", "reference_scores"))
        rows.append([r["run"]["task"], f"{r['largest_loss_difference']:.1e}", f"{r['same_subnets']} of {r['layers']}",
                     f"{r['shared_subnet']:.4f}", f"{r['same_at_start']} of {r['layers']}",
                     f"{mine['nll']:.4f} / {other['nll']:.4f}",
                     f"{mine['right']:.1f} / {other['right']:.1f}"])  # fmt: skip
    head = ["task", "largest difference of a loss", "same subnets at the end", "weights shared",
            "same calibrated subnets", "nats a token, package / reference", "right, %"]  # fmt: skip
    return table(head, rows) if rows else ""


def captured(results: Results) -> str:
    found = of(results, kind="analysis", method=OURS)
    if not found:
        return ""
    result = found[0]
    keys = {"greedy": "greedy, %", "sums": "by sums only, %", "restarts": "best of restarts, %", "random": "random, %",
            "entries": "as many entries anywhere, %"}  # fmt: skip
    rows = [[name.removeprefix("model."), *(f"{100 * values[key]:.1f}" for key in keys),
             f"{100 * result['gradients'][name]['out'][1]:.1f}", f"{100 * result['gradients'][name]['in'][1]:.1f}"]
            for name, values in result["captured"].items()]  # fmt: skip
    head = ["layer", *keys.values(), "gradient in the top 1/8 outputs, %", "in the top 1/8 inputs, %"]
    small = result["small_matrices"]
    worst = f"{small['mean']:.3f} on average, {small['worst']:.3f} at worst"
    return f"{table(head, rows)}\n\nGreedy over the optimum on 12 x 12 blocks, k = 4: {worst}."


def singular(results: Results) -> str:
    """How much of a weight's leading singular vectors is left after training (the paper's Figure 8)."""
    found = {r["run"]["method"]: r["singular"] for r in of(results, kind="analysis")}
    if not found:
        return ""
    rows = [[name.removeprefix("model."), *(f"{of_method[name]['mean']:.4f}" for of_method in found.values())]
            for name in next(iter(found.values()))]  # fmt: skip
    return table(["mean cosine, before and after", *map(title, found)], rows)


SECTIONS: dict[str, Callable[[Results], str]] = {
    "Ablations of LoSiA p 1/8, past tense": functools.partial(ablations, task="past-tense"),
    "Ablations of LoSiA p 1/8, spelling to sounds": ablations,
    "Ablations of LoSiA p 1/8, arithmetic": functools.partial(ablations, task="arithmetic"),
    "Ablations of LoSiA p 1/8, completing code": functools.partial(ablations, task="code"),
    "Ablations of LoSiA p 1/8, plurals": functools.partial(ablations, task="plural"),
    "Number of steps and cycles, spelling to sounds": data_scales,
    "Importance by sums only": importance_forms,
    "Defaults on trial": automatic,
    "Memory and time, spelling to sounds": costs,
    "Five tasks in sequence": continual,
    "The same run by the dense-gradient reference": oracle,
    "What a subnet captures": captured,
    "Singular vectors, spelling to sounds": singular,
}
