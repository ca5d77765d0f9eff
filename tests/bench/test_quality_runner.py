"""What is run, in which order, what is kept, what is run again."""

import json
from dataclasses import asdict, replace

import pytest

pytest.importorskip("transformers")

from bench.quality import runner, store
from bench.quality.methods import METHODS
from bench.quality.store import NotReady, Store
from bench.quality.study import (
    EQUAL_MEMORY,
    SCALES,
    SEARCH_SEED,
    SEEDS,
    Run,
    finals,
    searches,
    study,
    ten_minutes,
    timings,
)

SMALL = SCALES["small"]
ORIGIN = {"quiet": True, "commit": "abc", "device": "test"}


def fake_result(run: Run, nll: float = 1.0, status: str = "ok", step: float = 1.0) -> dict:
    split = "search" if run.kind == "search" else "held_out"
    return {"run": asdict(run), "status": status, "items": split, "seconds": {"step": step},
            "scores": {split: {"": {"right": 50.0, "tokens": 60.0, "nll": nll, "items": 1}}}}  # fmt: skip


@pytest.fixture
def ran(monkeypatch):
    """The ids of what was carried out, in order."""
    ids = []

    def carry_out(run, base, store):
        ids.append(run.id)
        return fake_result(run)

    monkeypatch.setattr(runner, "_carry_out", carry_out)
    return ids


def run_all(runs, folder, minutes=None):
    lines = []
    kept = Store(folder)
    todo = [run for run in runs if not kept.is_done(run)]
    failed = runner.run_all(todo, kept, None, ORIGIN, minutes, lines.append)
    return failed, lines


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_the_list_is_whole_and_fair(scale):
    runs = study(scale)
    ids = [run.id for run in runs + timings(scale)]
    assert len(set(ids)) == len(ids)
    for task in ("past-tense", "pronunciation", "arithmetic", "code"):
        for method in METHODS:
            mine = [run for run in runs if (run.task, run.method) == (task, method)]
            if not mine:
                assert method == EQUAL_MEMORY and task != "pronunciation"
                continue
            assert len([run for run in mine if run.kind == "search"]) == 4
            assert [run.seed for run in mine if run.kind == "main"] == list(SEEDS)
    assert SEARCH_SEED not in SEEDS
    place = {run.id: number for number, run in enumerate(runs)}
    for run in runs:
        if run.lr is None and run.kind in ("main", "ablation", "oracle"):
            before = [place[trial.id] for trial in searches(scale, run.task, run.method)]
            assert max(before) < place[run.id], f"{run.id} comes before its search"
    assert set(ten_minutes()) <= set(study(SMALL))


def test_best_rate_is_of_the_whole_search_and_of_what_came_to_an_end(tmp_path):
    kept = Store(tmp_path)
    trials = list(searches(SMALL, "past-tense", "fft"))
    for trial, nll in zip(trials[:-1], (0.9, 0.5, 0.7), strict=True):
        kept.write(trial, fake_result(trial, nll))
    (final, *_) = finals(SMALL, "past-tense", "fft")
    with pytest.raises(NotReady, match="has not run"):
        kept.resolve(final)
    kept.write(trials[-1], fake_result(trials[-1], nll=0.1, status="diverged"))
    assert kept.resolve(final).lr == trials[1].lr
    assert Store(tmp_path / "elsewhere", fallback=tmp_path).resolve(final).lr == trials[1].lr


def test_a_run_is_done_until_its_search_finds_another_rate(tmp_path):
    kept = Store(tmp_path)
    trials = list(searches(SMALL, "past-tense", "fft"))
    for trial in trials:
        kept.write(trial, fake_result(trial, nll=trial.lr))
    final = next(finals(SMALL, "past-tense", "fft"))
    assert not kept.is_done(final)
    kept.write(final, fake_result(kept.resolve(final)))
    assert kept.is_done(final)
    kept.write(trials[0], fake_result(trials[0], nll=9.0))
    assert not kept.is_done(final)


def test_stopped_and_started_again(tmp_path, ran, monkeypatch):
    runs = [*searches(SMALL, "past-tense", "fft"), *finals(SMALL, "past-tense", "fft")]
    carry_out = runner._carry_out

    def stopped(run, base, store):
        if len(ran) == 2:
            raise KeyboardInterrupt
        return carry_out(run, base, store)

    monkeypatch.setattr(runner, "_carry_out", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_all(runs, tmp_path)
    assert ran == [run.id for run in runs[:2]]
    monkeypatch.setattr(runner, "_carry_out", carry_out)
    run_all(runs, tmp_path)
    assert ran == [run.id for run in runs]  # none twice
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == sorted(ran)
    assert json.loads((tmp_path / f"{runs[0].id}.json").read_text())["provenance"] == ORIGIN
    run_all(runs, tmp_path)
    assert len(ran) == len(runs)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    run = next(searches(SMALL, "past-tense", "fft"))
    kept = Store(tmp_path)

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            kept.write(run, fake_result(run))
    assert not kept.is_done(run) and kept.all() == []
    kept.write(run, fake_result(run))
    assert kept.is_done(run) and len(kept.all()) == 1


def test_one_that_fails_does_not_stop_the_others(tmp_path, ran, monkeypatch):
    carry_out = runner._carry_out

    def sometimes(run, base, store):
        if run.lr == 3e-5:
            raise RuntimeError("boom")
        return carry_out(run, base, store)

    monkeypatch.setattr(runner, "_carry_out", sometimes)
    runs = [*searches(SMALL, "past-tense", "fft"), *finals(SMALL, "past-tense", "fft")]
    failed, lines = run_all(runs, tmp_path)
    assert failed == 1 and len(ran) == 3 and any("boom" in line for line in lines)
    assert sum("not run" in line for line in lines) == 3  # the finals wait for the whole search


def test_nothing_begins_that_would_not_end_in_time(tmp_path, ran, monkeypatch):
    clock = iter(range(0, 10**6))  # every look at the clock is a minute later
    monkeypatch.setattr(runner.time, "perf_counter", lambda: 60.0 * next(clock))
    runs = list(searches(SMALL, "past-tense", "fft"))
    _, lines = run_all(runs, tmp_path, minutes=7)
    assert ran == [run.id for run in runs[:2]]
    assert sum("left for the next time" in line for line in lines) == len(runs) - 2


def test_equal_time_takes_the_steps_of_a_quiet_machine(tmp_path):
    kept = Store(tmp_path)
    for timing, step in (("fft", 3.0), ("lora-r8", 2.0)):
        run = next(run for run in timings(SMALL) if run.kind == "timing" and run.method == timing)
        kept.write(run, fake_result(run, step=step) | {"provenance": ORIGIN | {"quiet": timing == "fft"}})
    for trial in searches(SMALL, "pronunciation", "lora-r8"):
        kept.write(trial, fake_result(trial))
    wanted = next(run for run in timings(SMALL) if run.kind == "equal-time" and run.method == "lora-r8")
    with pytest.raises(NotReady, match="quiet"):
        kept.resolve(wanted)
    kept.write(run, fake_result(run, step=2.0) | {"provenance": ORIGIN})
    assert kept.resolve(wanted) == replace(wanted, steps=90, lr=METHODS["lora-r8"].lrs[0])


def test_command_line_lists_without_a_model(tmp_path, capsys):
    from bench.__main__ import main

    assert main(["quality", "--list", "--only", "past-tense_search_fft", "--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.count("small_past-tense_search_fft") == 4 and "4 runs, 0 done" in said
