"""``python -m bench quality-report``: README.md and the plots, from the results alone."""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..harness.markdown import table
from ..methods import STUDY
from ..methods.losia import CALIBRATION_BATCHES
from . import tables
from .choice import choice
from .plots import draw_plots
from .sections import SECTIONS
from .store import RESULTS, Store
from .study import NEAR, SCALES, SEEDS, Run, Scale, study, timings
from .tables import Results, of
from .tasks import TASKS

TITLE = "# Does it learn better?"
HEAD = """\
Full fine-tuning, LoRA, DoRA, PiSSA, GaLore and LoSiA on SmolLM2-135M-Instruct (float32) and real data. Written by
`python -m bench quality-report`; every figure comes from `results/runs.jsonl`.

```
python examples/past_tense/smollm.py .cache        # the model, once
python -m bench quality --list                     # what there is, what is done
python -m bench quality --minutes 60               # runs what is missing, most telling first; stop it when you like
python -m bench quality --set ten-minutes --results runs/quality   # four runs again, to see whether they come out alike
python -m bench quality --set timings --quiet-machine              # seconds; only where nothing else runs
python -m bench quality-report
```

`--jobs 2` runs two at a time, each with half of the cores. On a GPU the same commands run the larger scale: one run of
so small a model leaves most of a GPU idle, so share it, `--jobs 12`; `--minutes 8.5`, again and again, cuts the study
into pieces. Each run is one line of JSON, written when it ends; a run that is stopped is run again.

**How.** Every method sees the same batches in the same order. Its learning rate is the best on a search split that is
in no other table, tried with a seed of its own, by the cost of right answers alone: of those within {near} of the least
the smallest, which learn alike while it loses least. Rates are tried beyond those below until the best has one on both
sides that costs more than that. The other settings stand below. The rate warms up over 10 % of the steps and falls to
zero on a line. Weight decay is 0. Where LoSiA is calibrated, it is on the first {calibration} batches, which cost it as
many forward and backward passes more. No item (verb, word, problem, file) is in two splits.

**What is counted.** *Exact match*: greedy decoding would give the whole answer, to its newline; of several right
answers any counts. *Lines right*: the same of each line of code, given the right code before it. *Tokens right*: the
same of each token. *Nats a token*: the cost of the right answer, which separates methods long before exact match does.
*english, code*: the same on text that was not trained, Python's language reference and held-out sources: what was lost.
± is the standard deviation over seeds.

**Tests.** Differences are paired over the held-out items (means over seeds), with random flips of their signs; p is
Holm's over a task's comparisons. It says whether a difference would hold for other items of the same kind; whether it
holds for other seeds is in the last column, and with {seeds} seeds that cannot be much: "worse" and "better" are said
only where all of them agree. Irregular verbs, of which the data hold 60 more than chance would draw, are kept apart.
"""

REGIME = """\
A run learns from {samples} samples, and in a run of one cycle each of the 30 layers observes for {turn} steps. The
paper's runs have many thousands of samples, slots of 50 to 150 steps and about eleven cycles. What is found here is
what a user of so short a run sees; it need not hold for longer ones."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench quality-report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    arguments = parser.parse_args(argv)
    path = arguments.results.parent / "README.md"
    path.write_text(render(Store(arguments.results)))
    print(path)
    return 0


def render(store: Store) -> str:
    def words(head: list[str], rows: list[list[str]]) -> str:
        return table(head, rows).replace("---:", "---")  # all to the left

    everything = store.all()
    tasks = [[task.title, task.source] for task in TASKS.values()]
    methods = []
    for each in STUDY.values():
        methods.append([each.title, each.settings, ", ".join(f"{lr:.0e}" for lr in each.lrs)])
    parts = [
        TITLE,
        choice(store),
        HEAD.format(calibration=CALIBRATION_BATCHES, seeds=len(SEEDS), near=NEAR),
        words(["task", "data"], tasks),
        words(["method", "settings", "learning rates tried first"], methods),
    ]
    for name in SCALES:
        here = [result for result in everything if result["run"]["scale"] == name]
        if here:
            parts.append(one_scale(here, SCALES[name], store))
    return "\n\n".join(filter(None, parts)) + "\n"


def one_scale(everything: Results, scale: Scale, store: Store) -> str:
    results, dropped = tables.usable(everything)
    tasks = [task for task in TASKS if of(results, task=task)]
    pictures = draw_plots(results, tasks, scale.name, store.folder / "plots")

    def section(heading: str, text: str) -> list[str]:
        return [f"### {heading}\n\n{text}"] if text else []

    def pictured(beginning: str) -> list[str]:
        folder, start = f"{store.folder.name}/plots", f"{scale.name}-{beginning}-"
        return [f"![{p.stem}]({folder}/{p.name})" for p in pictures if p.stem.startswith(start)]

    parts = [
        f"## {scale.name.capitalize()} scale: {scale.steps} steps of {scale.batch}",
        REGIME.format(samples=scale.steps * scale.batch, turn=scale.steps // 30),
        remaining(scale, store),
        *section("At a glance", tables.overview(results, tasks)),
        *section("Where LoSiA is worse", tables.verdicts(results, tasks)),
    ]
    for task in tasks:
        groups = ("", *tables.groups_of(results, task))
        pairs = [tables.comparison(results, task, group) for group in groups]
        for what, text in (
            ("at equal steps", tables.quality(results, task)),
            ("paired over items", "\n\n".join(filter(None, pairs))),
            ("the search, nats a token on the search split", tables.searched(results, task)),
        ):
            parts += section(f"{TASKS[task].title.capitalize()}: {what}", text)
        parts += pictured(task)
    for what, make in SECTIONS.items():
        parts += section(what, make(results))
    parts += pictured("all")
    parts += section("Where it was run", origin(everything))
    parts += section("Dropped", "\n".join(f"- {line}" for line in dropped) or "Nothing.")
    return "\n\n".join(parts)


def remaining(scale: Scale, store: Store) -> str:
    runs = study(scale) + timings(scale)
    counts, missing = Counter(map(_part, runs)), Counter()
    for run in runs:
        missing[_part(run)] += not store.is_done(run)
    left = [f"{name} {count} of {counts[name]}" for name, count in missing.items() if count]
    rest = f"Not run yet: {'; '.join(left)}." if left else "Nothing is missing."
    return f"**{len(runs) - missing.total()} of {len(runs)} runs are done.** {rest}"


def _part(run: Run) -> str:
    return f"{run.task} {run.kind}" if run.kind in ("search", "main") else run.kind


def origin(results: Results) -> str:
    origins = [result["provenance"] for result in results]

    def found(key: str, length: int | None = None) -> str:
        return ", ".join(sorted({str(each[key])[:length] for each in origins}))

    named = ("peft", "galore-torch", "transformers")
    versions = {(n, v) for each in origins for n, v in each["peers"].items() if v and n in named}
    peers = ", ".join(sorted(f"{name} {version}" for name, version in versions))
    return (
        f"{found('device')}; torch {found('torch')}, {peers}, Python {found('python')}; "
        f"commit {found('commit')}; {found('started', 10)}."
    )
