"""What is run, in which order, what is kept, what is run again."""

import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest

pytest.importorskip("transformers")

from bench.harness import jobs as harness_jobs
from bench.harness.jobs import NotReady
from bench.methods import STUDY
from bench.quality import runner
from bench.quality.store import Store
from bench.quality.study import (
    EXPLORED,
    PAPER,
    PEERS,
    RATES,
    SCALES,
    SEARCH_SEED,
    SEEDS,
    SIZES,
    Run,
    finals,
    searches,
    study,
    ten_minutes,
    timings,
)
from tests.bench.quality_tiny import ORIGIN, SMALL, fake_result


@pytest.fixture
def ran(monkeypatch):
    """The ids of what was carried out, in order."""
    ids = []

    def carry_out(run, store):
        ids.append(run.id)
        return {"result": fake_result(run)}

    monkeypatch.setattr(runner, "_carry_out", carry_out)
    return ids


def run_all(runs, folder, minutes=None, pool=None, jobs=1):
    lines = []
    kept = Store(folder)
    return runner.run_study(lambda: runs, kept, ORIGIN, minutes, pool, jobs, lines.append), lines


@pytest.mark.parametrize("scale", [SMALL, SCALES["large"]], ids=["small", "large"])
def test_the_list_is_whole_and_fair(scale):
    runs = study(scale)
    ids = [run.id for run in runs + timings(scale)]
    assert len(set(ids)) == len(ids)
    for task in ("past-tense", "pronunciation", "arithmetic", "code"):
        for method in STUDY:
            mine = [run for run in runs if (run.task, run.method) == (task, method)]
            if not mine:
                some = STUDY[method].chooses or method in EXPLORED
                some |= method in PEERS and task == "code"
                assert method == PAPER or (some and task != "pronunciation")
                continue
            tried = [run.lr for run in mine if run.kind == "search"]
            assert tried == list(STUDY[method].lrs) and set(tried) < set(RATES)
            assert len(tried) >= 3
            seeds = [run.seed for run in mine if run.kind == "main"]
            assert seeds == list(SEEDS) or (method in (*SIZES, *EXPLORED) and not seeds)
    assert SEARCH_SEED not in SEEDS
    place = {run.id: number for number, run in enumerate(runs)}
    for run in runs:
        if run.lr is None and run.kind in ("main", "oracle"):
            before = [place[trial.id] for trial in searches(scale, run.task, run.method)]
            assert max(before) < place[run.id], f"{run.id} comes before its search"
    assert set(ten_minutes()) <= set(study(SMALL))


def test_a_run_is_done_until_its_search_finds_another_rate(tmp_path):
    kept = Store(tmp_path)
    trials = list(searches(SMALL, "past-tense", "fft"))
    for trial in trials:
        kept.write(trial, fake_result(trial))
    final = next(finals(SMALL, "past-tense", "fft"))
    assert not kept.is_done(final)
    kept.write(final, fake_result(kept.resolve(final)))
    assert kept.is_done(final)
    kept.write(trials[2], fake_result(trials[2], nll=0.5))
    assert not kept.is_done(final)


def test_a_sequence_is_run_again_when_a_search_finds_another_rate(tmp_path):
    kept, tasks = Store(tmp_path), ("past-tense", "plural")
    for task in tasks:
        for trial in searches(SMALL, task, "fft"):
            kept.write(trial, fake_result(trial))
    run = Run("sequence", "small", "+".join(tasks), "fft", 0, None, 4)
    row = {"run": asdict(run), "status": "ok", "provenance": ORIGIN}
    kept.write(run, row | {"lrs": kept.sequence_lrs(run)})
    assert kept.is_done(run)
    kept.write(run, row | {"lrs": [1e-4, 3e-4]})
    assert not kept.is_done(run)


def test_stopped_and_started_again(tmp_path, ran, monkeypatch):
    runs = [*searches(SMALL, "past-tense", "fft"), *finals(SMALL, "past-tense", "fft")]
    carry_out = runner._carry_out

    def stopped(run, store):
        if len(ran) == 2:
            raise KeyboardInterrupt
        return carry_out(run, store)

    monkeypatch.setattr(runner, "_carry_out", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_all(runs, tmp_path)
    assert ran == [run.id for run in runs[:2]]
    monkeypatch.setattr(runner, "_carry_out", carry_out)
    run_all(runs, tmp_path)
    assert ran == [run.id for run in runs]  # none twice
    kept = Store(tmp_path).all()
    assert [row["id"] for row in kept] == sorted(ran)
    assert all(row["provenance"] == ORIGIN for row in kept)
    run_all(runs, tmp_path)
    assert len(ran) == len(runs)


def test_one_that_fails_does_not_stop_the_others(tmp_path, ran, monkeypatch):
    carry_out = runner._carry_out

    def sometimes(run, store):
        if run.lr == 3e-5:
            raise RuntimeError("boom")
        return carry_out(run, store)

    monkeypatch.setattr(runner, "_carry_out", sometimes)
    runs = [*searches(SMALL, "past-tense", "fft"), *finals(SMALL, "past-tense", "fft")]
    failed, lines = run_all(runs, tmp_path)
    assert failed == 1 and len(ran) == 3 and any("boom" in line for line in lines)
    assert sum("not run" in line for line in lines) == 3  # the finals wait for the whole search


def test_nothing_begins_that_would_not_end_in_time(tmp_path, ran, monkeypatch):
    """The clock says that each takes a minute, whatever it declares."""
    monkeypatch.setattr(harness_jobs.time, "perf_counter", lambda: 60.0 * len(ran))
    monkeypatch.setattr(harness_jobs.time, "monotonic", lambda: 60.0 * len(ran))
    runs = list(searches(SMALL, "past-tense", "fft"))
    _, lines = run_all(runs, tmp_path, minutes=2.5)
    assert ran == [run.id for run in runs[:2]]
    assert "not begun in 2.5 minutes: 2 jobs, about 2:00" in lines[-1]


def test_a_run_made_again_is_told_beside_the_studys(tmp_path, ran):
    (run, *_) = searches(SMALL, "past-tense", "fft")
    studied, lines = Store(tmp_path / "study"), []
    studied.write(run, fake_result(run, nll=0.75))
    again = Store(tmp_path / "again", fallback=studied)
    runner.run_study(lambda: [run], again, ORIGIN, say=lines.append)
    assert "1.477 nats (the study's: 50.0 % right, 0.750 nats)" in lines[0]
    _, lines = run_all([run], tmp_path / "alone")
    assert "the study's" not in lines[0]


def test_several_at_a_time_wait_for_what_they_need(tmp_path, monkeypatch):
    """The finals come after the whole search though there is a worker that has nothing else to do."""
    together, running, order = threading.Barrier(2), [], []

    def carry_out(run, store):
        running.append(run.id)
        if run.kind == "search":
            together.wait(30)  # fails unless two are under way
        order.append((run.kind, len(running)))
        running.remove(run.id)
        return {"result": fake_result(run)}

    monkeypatch.setattr(runner, "_carry_out", carry_out)
    runs = [*searches(SMALL, "past-tense", "fft"), *finals(SMALL, "past-tense", "fft")]
    with ThreadPoolExecutor(2) as pool:
        failed, lines = run_all(runs, tmp_path, pool=pool, jobs=2)
    assert failed == 0 and not any("not run" in line for line in lines)
    assert [kind for kind, _ in order] == ["search"] * 4 + ["main"] * 3
    assert len(Store(tmp_path).all()) == len(runs)


def test_what_a_sequence_needs_is_known_before_it_begins(tmp_path, ran):
    run = Run("sequence", "small", "past-tense+plural", "lora-r8", 0, None, 4)
    for trial in searches(SMALL, "past-tense", "lora-r8"):
        Store(tmp_path).write(trial, fake_result(trial))
    _, lines = run_all([run], tmp_path)
    assert ran == [] and len(lines) == 1 and "LoRA r 8 on plural has not been tried" in lines[0]
    run_all([*searches(SMALL, "plural", "lora-r8"), run], tmp_path)
    assert ran[-1] == run.id


@pytest.fixture
def model_folder(tmp_path):
    """A tiny model, and a tokenizer that knows single characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = {chr(code): code for code in range(128)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="\0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="\0").save_pretrained(
        tmp_path / "model"
    )
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_two_processes_share_the_work(tmp_path, model_folder, capfd):
    words = "--jobs 2 --only small_arithmetic_search_fft --device cpu".split()
    words += ["--model", str(model_folder)]
    assert runner.main([*words, "--results", str(tmp_path / "results")]) == 0
    found = Store(tmp_path / "results").all()
    rates = {result["run"]["lr"] for result in found}
    assert rates >= set(STUDY["fft"].lrs) and len(found) == len(rates)
    assert all(result["status"] == "ok" for result in found)
    assert {result["provenance"]["jobs"] for result in found} == {2}
    assert "0 to go" in capfd.readouterr().out


def test_a_worker_that_dies_leaves_what_was_done(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner, "make_pool", lambda *arguments: ProcessPoolExecutor(1))
    monkeypatch.setattr(runner, "_carry_out", _die_in_the_second)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    words = ["--only", "small_past-tense_search_fft", "--results", str(tmp_path)]
    words += ["--model", str(tmp_path / "model")]
    assert runner.main(words) == 1
    assert "a worker died" in capsys.readouterr().err and len(Store(tmp_path).all()) == 1


def _die_in_the_second(run, store):
    if run.lr == STUDY["fft"].lrs[1]:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"result": fake_result(run)}


@pytest.mark.parametrize(
    "words", ["--jobs 0", "--jobs 2 --quiet-machine", "--only [", "--model nowhere --jobs 2"]
)
def test_what_cannot_be_is_refused_before_anything_runs(words, tmp_path, capsys):
    words = words.split()
    with pytest.raises(SystemExit) as error:
        runner.main([*words, "--results", str(tmp_path)])
    assert error.value.code == 2 and f"argument {words[0]}" in capsys.readouterr().err


def test_equal_time_takes_the_steps_of_a_quiet_machine(tmp_path):
    kept = Store(tmp_path)
    for timing, step in (("fft", 3.0), ("lora-r8", 2.0)):
        run = next(run for run in timings(SMALL) if run.kind == "timing" and run.method == timing)
        kept.write(
            run, fake_result(run, step=step) | {"provenance": ORIGIN | {"quiet": timing == "fft"}}
        )
    for trial in searches(SMALL, "pronunciation", "lora-r8"):
        kept.write(trial, fake_result(trial))
    wanted = next(
        run for run in timings(SMALL) if run.kind == "equal-time" and run.method == "lora-r8"
    )
    with pytest.raises(NotReady, match="quiet"):
        kept.resolve(wanted)
    kept.write(run, fake_result(run, step=2.0) | {"provenance": ORIGIN})
    assert kept.resolve(wanted) == replace(wanted, steps=90, lr=STUDY["lora-r8"].lrs[1])
    slow_start = fake_result(run, step=2.0)["seconds"] | {"prepare": 15.0}
    kept.write(run, fake_result(run) | {"provenance": ORIGIN, "seconds": slow_start})
    assert kept.resolve(wanted).steps == 85  # ten seconds of its preparation are five steps


def test_command_line_lists_without_a_model(tmp_path, capsys):
    from bench.__main__ import main

    assert (
        main(["quality", "--list", "--only", "past-tense_search_fft", "--results", str(tmp_path)])
        == 0
    )
    said = capsys.readouterr().out
    assert said.count("small_past-tense_search_fft") == 4 and "4 runs, 0 done" in said
