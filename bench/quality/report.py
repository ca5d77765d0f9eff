"""``python -m bench quality-report``: README.md and the plots, from the result files alone."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .methods import METHODS
from .overview import overview, verdicts
from .plots import draw_plots
from .sections import SECTIONS
from .store import RESULTS, Store
from .study import SCALES, SEEDS, Scale, study, timings
from .tables import Results, comparison, groups_of, of, quality, searched, usable
from .tasks import TASKS

HEAD = """\
# Does it learn better?

Full fine-tuning, LoRA, DoRA, PiSSA, GaLore and LoSiA on SmolLM2-135M-Instruct (float32) and real data. Written by
`python -m bench quality-report`; every figure comes from the files in `results/`.

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
into pieces. Each run is one JSON file, written when it ends; a run that is stopped is run again.

**How.** Every method sees the same batches in the same order. Its learning rate is the best of {trials} tried with a
seed of its own on a search split that is in no other table, by the cost of right answers alone; the other settings are
those of the LoSiA paper, and stand below. The rate warms up over 10 % of the steps and falls to zero on a line. Weight
decay is 0. LoSiA calibrates its first subnets on the first
{calibration} batches, which cost it as many forward and backward passes more, and its period gives every block one
turn. No item (verb, word, problem, file) is in two splits.

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
AUTO = """\
## What this says about the defaults

"Defaults on trial" above compares what could be chosen for the user with the paper's fixed values, on the items that
all other figures are of, so a choice made here looks a little better here than elsewhere. A rule becomes an option
where it is at least as good as them on every task that has been run, and another choice the default where it is at
least as good as the default.

`period="auto"` is offered: two cycles in the run, with the paper's period of 100 as the longest. In runs as short as
these, in which a period of 100 would move nothing, it is compared with it as "two cycles, against the period of 100";
in long runs it is the paper's. `rank_factor="auto"` (rank factors by importance, as many values in all) is not.

`importance="marginal"` ("Importance by sums only") does not become the default: in short runs it is as good or better,
but with slots as long as the paper's it is worse, by little and in every seed. It stays a way to save memory."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench quality-report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    arguments = parser.parse_args(argv)
    path = arguments.results.parent / "README.md"
    path.write_text(render(Store(arguments.results)))
    print(path)
    return 0


def render(store: Store) -> str:
    everything = store.all()
    trials = sorted({len(method.lrs) for method in METHODS.values()})
    parts = [HEAD.format(trials="/".join(map(str, trials)), calibration=4, seeds=len(SEEDS))]
    parts.append(
        "\n".join(
            [
                "| task | data |",
                "| --- | --- |",
                *(f"| {task.title} | {task.source} |" for task in TASKS.values()),
            ]
        )
    )
    parts.append(
        "\n".join(
            [
                "| method | settings | learning rates tried |",
                "| --- | --- | --- |",
                *(
                    f"| {method.title} | {method.settings} | {', '.join(f'{lr:.0e}' for lr in method.lrs)} |"
                    for method in METHODS.values()
                ),
            ]
        )
    )
    for name in ("large", "small"):
        here = [result for result in everything if result["run"]["scale"] == name]
        if here:
            parts.append(one_scale(here, SCALES[name], store))
    parts.append(AUTO)
    return "\n\n".join(parts) + "\n"


def one_scale(everything: Results, scale: Scale, store: Store) -> str:
    results, dropped = usable(everything)
    tasks = [task for task in TASKS if of(results, task=task)]
    parts = [
        f"## {scale.name.capitalize()} scale: {scale.steps} steps of {scale.batch}",
        REGIME.format(samples=scale.steps * scale.batch, turn=scale.steps // 30),
        remaining(scale, store),
    ]
    for what, section in {"At a glance": overview, "Where LoSiA is worse": verdicts}.items():
        if text := section(results, tasks):
            parts.append(f"### {what}\n\n{text}")
    pictures = draw_plots(results, tasks, scale.name, store.folder / "plots")

    def pictured(beginning: str) -> list[str]:
        return [
            f"![{p.stem}]({store.folder.name}/plots/{p.name})"
            for p in pictures
            if p.stem.startswith(beginning)
        ]

    for task in tasks:
        pairs = [comparison(results, task, group) for group in ("", *groups_of(results, task))]
        tables = {
            "at equal steps": quality(results, task),
            "paired over items": "\n\n".join(filter(None, pairs)),
            "the search, nats a token on the search split": searched(results, task),
        }
        for what, text in tables.items():
            if text:
                parts.append(f"### {TASKS[task].title.capitalize()}: {what}\n\n{text}")
        parts += pictured(f"{scale.name}-{task}-")
    for what, section in SECTIONS.items():
        text = section(results)
        if text:
            parts.append(f"### {what}\n\n{text}")
    parts += pictured(f"{scale.name}-all-")
    parts.append(f"### Where it was run\n\n{origin(everything)}")
    parts.append("### Dropped\n\n" + ("\n".join(f"- {line}" for line in dropped) or "Nothing."))
    return "\n\n".join(parts)


def remaining(scale: Scale, store: Store) -> str:
    """How much of the study these figures are."""
    runs = study(scale) + timings(scale)
    missing: dict[str, list[int]] = {}
    for run in runs:
        kind = "data scales" if run.kind.startswith("scale-") else run.kind
        counts = missing.setdefault(
            f"{run.task} {kind}" if run.kind in ("search", "main") else kind, [0, 0]
        )
        counts[0] += 1
        counts[1] += not store.is_done(run)
    done = len(runs) - sum(left for _, left in missing.values())
    text = f"**{done} of {len(runs)} runs are done.** "
    left = [f"{name} {left} of {count}" for name, (count, left) in missing.items() if left]
    return text + (f"Not run yet: {'; '.join(left)}." if left else "Nothing is missing.")


def origin(results: Results) -> str:
    """Which machines, versions and commits the figures come from."""

    def found(value: Any) -> str:
        return ", ".join(sorted({str(value(result["provenance"])) for result in results}))

    peers = sorted(
        {
            f"{name} {version}"
            for r in results
            for name, version in r["provenance"]["peers"].items()
            if version and name in ("peft", "galore-torch", "transformers")
        }
    )
    return (
        f"{found(lambda p: p['device'])}; torch {found(lambda p: p['torch'])}, {', '.join(peers)}, Python "
        f"{found(lambda p: p['python'])}; commit {found(lambda p: p['commit'])}; "
        f"{found(lambda p: p['started'][:10])}."
    )
