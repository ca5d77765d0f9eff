"""Sections of the report beyond the comparison of methods, each from results alone."""

from collections.abc import Callable

from ..harness.markdown import table
from ..methods import STUDY
from .lost import learned_and_lost
from .rates import one_rate
from .sequence import measures, single_task
from .study import OURS, SCALES, best_rate
from .tables import Results, nats, of, show, title, trials_of
from .tasks import TASKS


def costs(results: Results, task: str = "pronunciation") -> str:
    """Bytes that a method adds to the weights, and seconds where the machine was quiet."""
    rows = []
    for method in STUDY:
        found = of(results, task=task, kind="main", method=method)
        if not found:
            continue
        timed = [r for r in of(results, kind="timing", method=method) if r["provenance"]["quiet"]]
        memory = found[0]["memory"]
        added = 0 if method in ("fft", "galore") else 4 * memory["trained_values"]
        parts = ("gradient_bytes", "optimizer_bytes", "observing_bytes")
        added += sum(memory.get(key, 0) for key in parts)
        equal = nats(of(results, task=task, kind="equal-time", method=method))
        cells = f"{memory['trained_values'] / 1e6:.2f}", f"{added / 1e6:.0f}", nats(found)
        step = f"{timed[0]['seconds']['step']:.3f}" if timed else "not measured"
        equal = equal or ("" if method == "fft" else "not run")
        rows.append([title(method), *cells, step, equal])
    head = (
        "method | values trained, M | MB added, activations aside | nats a token at equal steps"
        " | seconds a step | nats a token in full fine-tuning's time"
    )
    steps = SCALES[results[0]["run"]["scale"]].steps
    note = (
        "\n\nSeconds are of one process and good to about a tenth. In "
        f"full fine-tuning's time: that of its {steps} steps, preparation included, at the learning rate found for "
        f"{steps}."
    )
    return table(head, rows) + note if rows else ""


def tried(results: Results, task: str = "pronunciation") -> str:
    """The default with one change, by the best trial of each one's search."""
    rows = []
    for method in (OURS, *(name for name in STUDY if STUDY[name].explored)):
        trials = of(results, task=task, kind="search", method=method)
        if trials:
            rate = best_rate(trials_of(results, task, method))
            (best,) = of(trials, lr=rate)
            costs = [
                best["scores"][name][""]["nll"]
                for name in ("search", "english")
                if name in best["scores"]
            ]
            cells = f"{best['run']['lr']:.0e}", *(f"{cost:.3f}" for cost in costs)
            rows.append([title(method), STUDY[method].settings, str(len(trials)), *cells])
    head = (
        "method | what is changed | trials | best rate | nats a token on the search split"
        " | English after, nats a token"
    )
    note = "\n\nOne seed: differences below 0.03 say nothing. None of these is in the package."
    return table(head, rows) + note if len(rows) > 1 else ""


MEASURES = ("AP", "FWT", "BWT")
UNITS = (("right", "after", "%"), ("nll", "after_nats", "nats"))


def continual(results: Results) -> str:
    """Table 5 of the paper."""
    rows = []
    for method in STUDY:
        found = []
        for result in of(results, kind="sequence", method=method):
            same = {"kind": "main", "method": method, "seed": result["run"]["seed"]}
            alone = [of(results, task=name, **same) for name in result["run"]["task"].split("+")]
            if all(alone) and [each[0]["run"]["lr"] for each in alone] == result["lrs"]:
                ones = [single_task(singles[0]) for singles in alone]
                keys = ((result[after], [one[key] for one in ones]) for key, after, _ in UNITS)
                found.append([measures(*each) for each in keys])
        if found:
            places = [(place, digits, m) for place, digits in ((0, 1), (1, 3)) for m in MEASURES]
            cells = (show([pair[place][m] for pair in found], d) for place, d, m in places)
            rows.append([title(method), *cells])
    if not of(results, kind="sequence", method=OURS):
        return ""
    head = ["method", *(f"{name}, {unit}" for *_, unit in UNITS for name in MEASURES)]
    note = (
        "\n\nPercent right, and nats a token of right answers, in which less is better and a positive BWT is what was "
        "forgotten. Of spelling and arithmetic next to nothing is right in runs of this length: there only nats tell."
    )
    return table(head, rows) + note if rows else ""


def oracle(results: Results) -> str:
    rows = []
    for r in of(results, kind="oracle"):
        mine, other = (r[key]["held_out"][""] for key in ("scores", "reference_scores"))
        cells = [r["run"]["task"], f"{r['largest_loss_difference']:.1e}"]
        cells += [f"{r['same_subnets']} of {r['layers']}", f"{r['shared_subnet']:.4f}"]
        cells += [
            f"{r['same_at_start']} of {r['layers']}",
            f"{mine['nll']:.4f} / {other['nll']:.4f}",
        ]
        rows.append([*cells, f"{mine['right']:.1f} / {other['right']:.1f}"])
    head = (
        "task | largest difference of a loss | same subnets at the end | weights shared"
        " | same calibrated subnets | nats a token, package / reference | right, %"
    )
    return table(head, rows)


def captured(results: Results) -> str:
    found = of(results, kind="analysis", method=OURS)
    if not found:
        return ""
    result, rows = found[0], []
    for name, values in result["captured"].items():
        shares = [values[key] for key in ("greedy", "sums", "restarts", "random", "entries")]
        shares += [result["gradients"][name][side][1] for side in ("out", "in")]
        rows.append([name.removeprefix("model."), *(f"{100 * share:.1f}" for share in shares)])
    head = (
        "layer | greedy, % | by sums only, % | best of restarts, % | random, % | as many entries anywhere, %"
        " | gradient in the top 1/8 outputs, % | in the top 1/8 inputs, %"
    )
    small = result["small_matrices"]
    return table(head, rows) + (
        "\n\nShare of the importance |gW - (gW)²/2|, mean over 8 batches of the untrained model, that a subnet of "
        "p = 1/8 holds. Greedy over the optimum on 12 x 12 blocks of the first layer's, k = 4: "
        f"{small['mean']:.3f} on average, {small['worst']:.3f} at worst."
    )


def singular(results: Results) -> str:
    """How much of a weight's leading singular vectors is left after training (the paper's Figure 8)."""
    analysed = of(results, kind="analysis")
    if not analysed:
        return ""
    found, rows = {r["run"]["method"]: r["singular"] for r in analysed}, []
    for name in analysed[0]["singular"]:
        means = (f"{each[name]['mean']:.4f}" for each in found.values())
        rows.append([name.removeprefix("model."), *means])
    steps = analysed[0]["run"]["steps"]
    note = f"After {steps} steps (LoSiA moves twice), one seed; of the 100 leading left singular vectors."
    return f"{table(['mean cosine, before and after', *map(title, found)], rows)}\n\n{note}"


def masked(results: Results) -> str:
    """Of a trained model only subnets kept, by share of the weights that are not (after the paper's Figure 10)."""
    parts = []
    for result in of(results, kind="masked"):
        run, measured = result["run"], result["masked"]
        task, kinds = TASKS[run["task"]], list(measured["zero"])
        ends = {name: f"{result[name][0]:.1f} % right" for name in ("untrained", "whole")}
        trained = f"{title(run['method'])}, {run['steps']} steps, one seed; {task.title}"
        parts.append(f"{trained}: {ends['untrained']} untrained, {ends['whole']} trained. {MASKED}")
        for outside, words in OUTSIDE.items():
            rows = []
            for of_share in zip(*measured[outside].values(), strict=True):
                cells = (f"{right:.1f} ({nll:.3f})" for _, right, nll in of_share)
                rows.append([f"{100 * of_share[0][0]:.1f}", *cells])
            if outside == "untrained":
                right, nll = result["linears_untrained"]
                rows.append(["100", *[f"{right:.1f} ({nll:.3f})"] * len(kinds)])
            parts += [f"{words}:", table(["masked, %", *kinds], rows)]
    return "\n\n".join(parts)


MASKED = (
    "Of each linear of the decoder blocks one subnet is kept, the root of the share kept of both sides; embeddings and "
    "norms stay as trained. Subnets are the greedy choice (Algorithm 1) by the score in the column, from 8 training "
    "batches: *sensitivity*, importance times its uncertainty, smoothed over the batches (Eqs. 3-6); *gradient*, |g| "
    "of all batches together; *random*, the control. In cells percent right, in brackets nats a token."
)
OUTSIDE = {
    "zero": "All other weights set to zero; scores of the trained model",
    "untrained": "All other weights set back to what they were before training, so that only the change of the subnets "
    "is kept; scores of the untrained model",
}
SECTIONS: dict[str, Callable[[Results], str]] = {
    "Learned against lost": learned_and_lost,
    "One rate for every p": one_rate,
    "What else was tried, spelling to sounds": tried,
    "Memory and time, spelling to sounds": costs,
    "Five tasks in sequence": continual,
    "The same run by the dense-gradient reference": oracle,
    "What a subnet captures": captured,
    "Singular vectors, spelling to sounds": singular,
    "Only subnets kept": masked,
}
