"""How a search finds its rate: where it begins, when it ends, what it takes."""

import math

import pytest

pytest.importorskip("transformers")

from bench.harness.jobs import NotReady
from bench.methods import STUDY
from bench.quality import runner
from bench.quality.store import Store
from bench.quality.study import (
    EXPLORED,
    NEAR,
    RATES,
    SCALES,
    SEEDS,
    finals,
    searches,
    study,
    trial_of,
)
from tests.bench.quality_tiny import ORIGIN, SMALL, fake_result


@pytest.mark.parametrize("scale", [SCALES["long"], SCALES["batch-16"]], ids=["long", "batch-16"])
def test_a_search_begins_around_the_best_of_the_scale_that_it_is_near(tmp_path, scale):
    kept = Store(tmp_path)
    run = next(run for run in study(scale) if run.method == "lora-r8")
    own = [trial_of(scale, run.task, "lora-r8", lr) for lr in STUDY["lora-r8"].lrs]
    assert kept.more_trials(run) == own
    for trial, nll in zip(searches(SMALL, run.task, "lora-r8"), (0.7, 0.5, 0.6, 0.9), strict=True):
        kept.write(trial, fake_result(trial, nll))
    around = [trial_of(scale, run.task, "lora-r8", lr) for lr in (3e-4, 1e-3, 3e-3)]
    assert kept.more_trials(run) == around
    for trial, nll in zip(around, (0.4, 0.5, 0.6), strict=True):
        kept.write(trial, fake_result(trial, nll))
    assert kept.more_trials(run) == [trial_of(scale, run.task, "lora-r8", 1e-4), *around]
    lower = kept.more_trials(run)[0]
    kept.write(lower, fake_result(lower, 0.45))
    assert kept.resolve(run).lr == 3e-4
    listed = study(scale)
    assert {run.kind for run in listed} == {"untrained", "main"}
    assert sum(run.method == "lora-r8" for run in listed) == len(SEEDS)


def test_best_rate_is_of_the_whole_search_and_of_what_came_to_an_end(tmp_path):
    kept = Store(tmp_path)
    trials = list(searches(SMALL, "past-tense", "fft"))
    for trial, nll in zip(trials[:-1], (0.9, 0.5, 0.7), strict=True):
        kept.write(trial, fake_result(trial, nll))
    (final, *_) = finals(SMALL, "past-tense", "fft")
    with pytest.raises(NotReady, match="has not been tried at 3e-04"):
        kept.resolve(final)
    kept.write(trials[-1], fake_result(trials[-1], nll=0.1, status="diverged"))
    assert kept.resolve(final).lr == trials[1].lr
    assert Store(tmp_path / "elsewhere", fallback=Store(tmp_path)).resolve(final).lr == trials[1].lr


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (3e-5, [1e-5, 3e-5, 1e-4, 3e-4]),
        (1e-5, [3e-6, 1e-5, 3e-5, 1e-4, 3e-4]),
        (1e-6, [3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4]),
        (1e-3, [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3]),
    ],
)
def test_a_search_goes_on_until_the_best_rate_has_a_worse_one_on_both_sides(
    tmp_path, monkeypatch, best, tried
):
    order = []

    def carry_out(run, store):
        order.append((run.kind, run.lr))
        return {"result": fake_result(run, nll=1.0 + abs(math.log10(run.lr / best)))}

    monkeypatch.setattr(runner, "_carry_out", carry_out)
    later = list(searches(SMALL, "plural", "fft"))
    runs = [*searches(SMALL, "past-tense", "fft"), *finals(SMALL, "past-tense", "fft"), *later]
    kept = Store(tmp_path)

    def wanted():
        return [run for each in runs for run in (*kept.more_trials(each), each)]

    assert runner.run_study(wanted, kept, ORIGIN, say=lambda line: None) == 0
    first = order[: -len(later)]
    assert sorted(lr for kind, lr in first if kind == "search") == tried
    assert first[-3:] == [("main", best)] * 3  # before what stands after them in the list
    assert kept.best_lr("small", "past-tense", "fft") == best


def test_a_search_that_nothing_waits_for_goes_on_too(tmp_path):
    kept, method = Store(tmp_path), EXPLORED[0]
    trials = list(searches(SMALL, "pronunciation", method))
    assert not kept.more_trials(trials[0])
    for trial, nll in zip(trials, (0.9, 0.8, 0.7), strict=True):
        kept.write(trial, fake_result(trial, nll))
    (more,) = kept.more_trials(trials[0])
    assert more == trial_of(SMALL, "pronunciation", method, 3e-2)


def test_a_trial_that_diverges_is_worse_than_any(tmp_path):
    kept = Store(tmp_path)
    for trial in searches(SMALL, "past-tense", "fft"):
        kept.write(trial, fake_result(trial, status="diverged"))
    assert min(kept.trials("small", "past-tense", "fft")) == 3e-6
    for lr in RATES:
        trial = trial_of(SMALL, "past-tense", "fft", lr)
        kept.write(trial, fake_result(trial, status="diverged"))
    with pytest.raises(NotReady, match="came to an end"):
        kept.best_lr("small", "past-tense", "fft")


def test_a_search_goes_on_while_its_edge_is_as_good_as_the_best(tmp_path):
    kept, scale = Store(tmp_path), SMALL
    costs = {1e-5: 0.6 + 0.9 * NEAR, 3e-5: 0.6, 1e-4: 0.7, 3e-4: 0.8}
    for lr, nll in costs.items():
        trial = trial_of(scale, "past-tense", "fft", lr)
        kept.write(trial, fake_result(trial, nll))
    assert {
        lr for lr, cost in kept.trials("small", "past-tense", "fft").items() if cost is None
    } == {3e-6}
    trial = trial_of(scale, "past-tense", "fft", 1e-5)
    kept.write(trial, fake_result(trial, 0.6 + 1.1 * NEAR))
    assert kept.trials("small", "past-tense", "fft").keys() == costs.keys()


def test_of_rates_that_are_as_good_the_smallest_is_taken(tmp_path):
    kept = Store(tmp_path)
    for lr, nll in {1e-5: 0.9, 3e-5: 0.6 + 0.9 * NEAR, 1e-4: 0.6, 3e-4: 0.8}.items():
        trial = trial_of(SMALL, "past-tense", "fft", lr)
        kept.write(trial, fake_result(trial, nll))
    assert kept.best_lr("small", "past-tense", "fft") == 3e-5
