"""Statistics, and the report from files made up so that what it must say is known."""

import math
import re
from dataclasses import asdict, replace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from bench.quality import report, sections
from bench.quality.paired import Paired, holm, mean_and_spread, paired, sign_flip_test
from bench.quality.store import Store
from bench.quality.study import (
    EXPLORED,
    SCALES,
    Run,
    finals,
    searches,
    study,
    trial_of,
)
from bench.quality.tables import compared, show, show_p, usable

SMALL = SCALES["small"]
ORIGIN = {"device": "a CPU", "torch": "2", "peers": {"peft": "1"}, "python": "3.11"}
ORIGIN |= {"commit": "abc", "started": "2026-01-01T", "quiet": False}
ITEMS = 30


def result(run: Run, nll: float, right: float = 0.5, english: float = 3.0, **more) -> dict:
    """Each item costs ``nll`` and a little that depends on the item."""
    rights = [int(i < right * ITEMS) for i in range(ITEMS)]
    each = [[nll + 0.1 * math.sin(i + run.seed), 1, 1, rights[i], 1] for i in range(ITEMS)]
    splits = ("search",) if run.kind == "search" else ("held_out", "english", "code")
    one = {"right": 100 * right, "tokens": 70.0, "nll": nll, "items": ITEMS}
    scores = {name: {"": dict(one)} for name in splits}
    if run.kind != "search":
        scores["english"][""]["nll"] = english
    found = {"run": asdict(run), "status": "ok", "items": splits[0], "each": each}
    found |= {"scores": scores, "curve": [[0, 2.0], [1, 1.0]], "provenance": ORIGIN}
    memory = {"trained_values": 10**6, "gradient_bytes": 4, "optimizer_bytes": 8}
    return found | {"made": {"period": 2}, "memory": memory} | more


def table_under(text: str, heading: str, part: int = 1) -> list[list[str]]:
    """Cells of the table that stands under a heading: its head, then its rows."""
    lines = text.split(f"### {heading}")[1].split("\n\n")[part].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:1] + lines[2:]]


@pytest.fixture
def filled(tmp_path):
    """Full fine-tuning is better, LoRA r 8 worse, the others alike; the search's best rate is the second."""
    kept = Store(tmp_path / "results")
    costs = {"fft": 0.5, "lora-r8": 1.5, "losia-wide-r8": 1.0, "losia-p8": 1.0, "lora-r64": 1.0}
    for method, nll in costs.items():
        for place, trial in enumerate(searches(SMALL, "pronunciation", method)):
            kept.write(trial, result(trial, nll + abs(place - 1)))
        for run in finals(SMALL, "pronunciation", method):
            run = kept.resolve(run)
            jitter = 0.01 * (run.seed - 1) if method == "lora-r64" else 0
            kept.write(
                run, result(run, nll + jitter, english=3.2 if method == "losia-wide-r8" else 3.0)
            )
    return kept


def test_mean_and_spread():
    assert mean_and_spread([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert mean_and_spread([5.0]) == (5.0, None)
    assert show([1.0, 2.0, 3.0], 1) == "2.0 ± 1.0"
    assert (show([4.0], 1), show([])) == ("4.0 (n=1)", "")


def test_sign_flips_by_hand():
    assert sign_flip_test([1.0, 2.0, 4.0]) == pytest.approx(2 / 8)
    assert sign_flip_test([3.0, -1.0]) == pytest.approx(4 / 4)  # |2| is the least of |±3 ± 1|
    assert sign_flip_test([1.0, 2.0, -2.5]) == pytest.approx(8 / 8)
    assert sign_flip_test([5.0, 1.0, -1.0]) == pytest.approx(6 / 8)
    assert sign_flip_test([0.0] * 40) == 1.0
    with pytest.raises(ValueError):
        sign_flip_test([])


def test_many_sign_flips_are_drawn():
    assert sign_flip_test([0.2 + 0.1 * math.sin(i) for i in range(60)]) < 0.001
    mixed = [(-1) ** i * (1 + i / 60) for i in range(60)]
    assert sign_flip_test(mixed) > 0.5
    assert sign_flip_test(mixed) == sign_flip_test(mixed)
    # of 20 equal ones the exact p is that of all heads or all tails
    assert sign_flip_test([1.0] * 16) == pytest.approx(2 / 2**16, abs=3e-4)
    # 15 of 20 or more extreme
    binomial = sum(math.comb(20, k) for k in (*range(6), *range(15, 21))) / 2**20
    assert sign_flip_test([1.0] * 15 + [-1.0] * 5) == pytest.approx(binomial, abs=0.006)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert show_p(0.0004) == "< 0.001" and show_p(0.0312) == "0.031"


def test_pairs_are_items_over_shared_seeds():
    run = Run("main", "small", "pronunciation", "fft", 0, 1e-4, 60)
    first = [result(run, 2.0), result(Run(**asdict(run) | {"seed": 7}), 9.0)]
    found = paired(first, [result(run, 1.5)], "nll")
    assert found.differences == pytest.approx([0.5] * ITEMS) and found.seeds == pytest.approx([0.5])
    assert sum(paired([result(run, 1, 0.5)], [result(run, 1, 0.3)], "right").differences) == 6
    assert paired(first[1:], [result(run, 1.5)], "nll") is None
    with pytest.raises(ValueError, match="items"):
        paired(first, [result(run, 1.5, items="other")], "nll")


@pytest.mark.parametrize(
    "groups", [None, [["", 20], ["irregular", 10]], [["", 5], ["irregular", 10], ["", 15]]]
)
def test_groups_of_items_are_compared_apart(groups):
    run = Run("main", "small", "past-tense", "fft", 0, 1e-4, 60)
    mine, other = (result(run, nll) for nll in (2.0, 1.0))
    scores = {name: {"nll": 1.0, "items": count} for name, count in (("", 20), ("irregular", 10))}
    for one in (mine, other):
        one["scores"]["held_out"] = scores
        if groups:
            one["groups"] = groups
    names = [name for name, count in groups or [["", 20], ["irregular", 10]] for _ in range(count)]
    for place, name in enumerate(names):
        mine["each"][place][0] = 5.0 if name else 2.0
        other["each"][place][0] = 1.0
    assert paired([mine], [other], "nll").differences == [1.0] * 20
    assert paired([mine], [other], "nll", "irregular").differences == [4.0] * 10


def test_what_items_and_seeds_say():
    found = Paired([1.0, 2.0, 3.0, 4.0], [2.0, 3.0])
    assert found.mean == 2.5 and (found.verdict(0.04), found.verdict(0.05)) == ("more", "")
    assert Paired([-1.0, -2.0], [-3.0]).verdict(0.01) == "less"
    assert Paired([1.0, 2.0], [4.0, -1.0]).verdict(0.001) == "", "the seeds do not agree"
    assert found.half_width == pytest.approx(1.96 * math.sqrt(5 / 3) / 2)


@pytest.fixture
def no_plots(monkeypatch):
    """Drawing takes most of a report's time."""
    monkeypatch.setattr(report, "draw_plots", lambda *arguments: [])


def test_the_report_says_where_losia_is_worse(filled, no_plots):
    worse = "full fine-tuning (+0.50 ± 0.00)"
    others = "full fine-tuning", "LoRA r 8", "LoSiA calibrated, p 1/8", "LoRA r 64"
    english = ", ".join(f"{name} (+0.20)" for name in others)
    neither = "LoSiA calibrated, p 1/8 (+0.00 ± 0.00), LoRA r 64 (-0.00 ± 0.00)"
    better = "LoRA r 8 (-0.50 ± 0.00)"
    row = ["spelling to sounds", worse, neither, better, english, "none"]
    assert table_under(report.render(filled), "Where LoSiA is worse")[1:] == [row]


def test_worse_is_said_where_every_seed_says_so(filled, no_plots):
    """Full fine-tuning costs less of every item, but for one seed in which it costs more."""
    run = filled.resolve(next(finals(SMALL, "pronunciation", "fft")))
    filled.write(run, result(run, 1.4))
    cells = table_under(report.render(filled), "Where LoSiA is worse")[1]
    assert cells[1] == "none" and cells[2].startswith("full fine-tuning (+0.20 ± 0.00)")


def test_all_methods_and_tasks_stand_in_one_table(filled, no_plots):
    for trial in searches(SMALL, "plural", "fft"):
        filled.write(trial, result(trial, 1 + (trial.lr > 3e-5) + 0.005 * (trial.lr < 3e-5)))
    for run in finals(SMALL, "plural", "fft"):
        filled.write(run, result(replace(run, lr=1e-5), 2.0, english=4.0))
    head, *rows = table_under(report.render(filled), "At a glance", part=2)
    assert head[2:] == ["spelling to sounds", "plural of nouns", "english after, mean over tasks"]
    assert rows[0] == ["full fine-tuning", "1.00", "0.500 ± 0.000", "2.000 ± 0.000 †", "3.500"]
    assert rows[2] == ["LoSiA calibrated, p 1/8", "1.00", "1.000 ± 0.000", "", ""]


def test_the_report_names_trials_and_what_is_missing(filled, no_plots):
    text = report.render(filled)
    assert "34 of " in re.search(r"\*\*(.*) runs are done", text)[0]
    every = [r for r in study(SMALL) if (r.task, r.kind) == ("pronunciation", "main")]
    assert f"pronunciation main {len(every) - 15} of {len(every)}" in text
    assert "analysis 3 of 3" in text
    assert "equal-time" in text
    assert "| LoSiA calibrated, p 1/8 | 4 |  |  |  | 2.000 | **1.000** | 2.000 | 3.000 |" in text
    assert "Nothing." in text.split("### Dropped")[1]
    assert "not measured" in text


def test_what_cannot_be_compared_is_dropped_and_named(filled, no_plots):
    runs = [filled.resolve(run) for run in finals(SMALL, "pronunciation", "lora-r8")]
    filled.write(runs[0], result(runs[0], 1.0, items="other"))
    diverged = {"run": asdict(runs[1]), "status": "diverged", "reason": "loss nan"}
    filled.write(runs[1], diverged | {"provenance": ORIGIN})
    filled.write(runs[2], result(Run(**asdict(runs[2]) | {"lr": 0.5}), 1.0))
    kept, dropped = usable(filled.all())
    assert len(dropped) == 3 and len(kept) == 31
    text = report.render(filled)
    reasons = "scored on other items", "diverged, loss nan", "at lr 0.5, but the search's best is"
    for reason in reasons:
        assert reason in text.split("### Dropped")[1]
    assert [row.method for row in compared(kept, "pronunciation")] == [
        "fft",
        "losia-p8",
        "lora-r64",
    ]


def test_the_same_files_give_the_same_report(filled, capsys):
    assert report.main(["--results", str(filled.folder)]) == 0
    path = filled.folder.parent / "README.md"
    pictures = re.findall(r"\((results/plots/.*?)\)", path.read_text())
    names = [
        f"small-pronunciation-{what}.svg"
        for what in ("learned-and-lost", "search", "loss", "one-rate")
    ]
    assert [name.split("/")[-1] for name in pictures] == names
    assert all((path.parent / picture).exists() for picture in pictures)
    first = path.read_text(), {p.name: p.read_bytes() for p in (filled.folder / "plots").iterdir()}
    assert report.main(["--results", str(filled.folder)]) == 0
    assert first == (
        path.read_text(),
        {p.name: p.read_bytes() for p in (filled.folder / "plots").iterdir()},
    )


def test_the_report_begins_with_what_to_choose(filled, no_plots):
    for trial in searches(SMALL, "pronunciation", "losia-wide"):
        filled.write(trial, result(trial, 1.5))
    first = report.render(filled).split("\n\n")[1].splitlines()
    assert "LoSiA: 1.00 M" in first[0] and "1.00 M trained values" in first[0]
    assert "over 1 tasks" in first[0]
    assert "against LoRA r 8 (1.00 M values): better on spelling to sounds." in first[1]
    assert "against LoRA r 64 (1.00 M values): level on spelling to sounds." in first[2]
    assert "against full fine-tuning (1.00 M values): worse on spelling to sounds." in first[3]
    assert first[4].endswith("costs less than LoSiA p 1/8 on 1 of 1 tasks.")
    assert "LoRA r 8 3.00, LoRA r 64 3.00" in first[5] and len(first) <= 9


def test_what_was_tried_stands_beside_the_default(filled, no_plots):
    assert "What else was tried" not in report.render(filled)
    trial = next(searches(SMALL, "pronunciation", EXPLORED[0]))
    filled.write(trial, result(trial, 1.25))
    _, *rows = table_under(report.render(filled), "What else was tried, spelling to sounds")
    ours, theirs = ({"rate": row[3], "cost": row[4]} for row in rows)
    assert ours == {"rate": "3e-03", "cost": "1.000"} and theirs["cost"] == "1.250"


def test_longer_runs_are_told_beside_the_choice(filled, no_plots):
    for method, nll in {"losia-wide-r8": 0.7, "lora-r8": 0.8}.items():
        trial = trial_of(SCALES["long"], "pronunciation", method, 1e-3)
        filled.write(trial, result(trial, nll))
        final = replace(trial, kind="main", seed=0)
        filled.write(final, result(final, nll, english=3.1))
    text = report.render(filled)
    (line,) = (
        line for line in text.splitlines() if line.startswith("- in runs of 1,000 steps of 4")
    )
    assert "LoSiA 0.700 (n=1) (English 3.10)" in line and "LoRA r 8 0.800" in line
    assert "## Long scale: 1000 steps of 4" in text and "of 16 runs are done" in text


def test_what_is_learned_stands_against_what_is_lost(filled, no_plots):
    (start,) = (r for r in study(SMALL) if (r.kind, r.task) == ("untrained", "pronunciation"))
    before = result(start, 3.0, english=2.9)
    before["scores"]["search"] = before["scores"]["held_out"]
    filled.write(start, before)
    lost = {3e-4: 2.95, 1e-3: 3.05, 3e-3: 3.5}
    for lr, english in lost.items():
        trial = trial_of(SMALL, "pronunciation", "lora-r8", lr)
        found = result(trial, {3e-4: 2.5, 1e-3: 2.0, 3e-3: 1.5}[lr])
        found["scores"]["english"] = {"": {"nll": english}}
        filled.write(trial, found)
    head, *rows = table_under(report.render(filled), "Learned against lost", part=3)
    assert head[-1] == "learned at most 0.2 lost"
    (row,) = (row for row in rows if row[0] == "LoRA r 8")
    assert "0.50 / +0.05" in row and "1.00 / +0.15" in row and "1.50 / +0.60" in row
    assert row[-1] == "1.000"


def test_sequences_at_the_rates_of_the_single_tasks_are_told_where_ours_is_among_them(filled):
    def row(method: str, lrs: list[float]) -> dict:
        run = Run("sequence", "small", "pronunciation+plural", method, 0, None, 60)
        scores = [[50.0, 40.0], [45.0, 60.0]]
        return {"run": asdict(run), "lrs": lrs, "after": scores, "after_nats": scores}

    singles = []
    for task in ("pronunciation", "plural"):
        for method in ("losia-wide-r8", "lora-r8"):
            run = Run("main", "small", task, method, 0, 1e-3, 60)
            singles.append(result(run, 1.0))
    ours, theirs = row("losia-wide-r8", [1e-3, 1e-3]), row("lora-r8", [1e-3, 3e-3])
    text = sections.continual([*singles, ours, theirs])
    assert "| LoSiA |" in text and "LoRA" not in text, "LoRA's was run at another rate"
    assert sections.continual([*singles, row("lora-r8", [1e-3, 1e-3])]) == ""
