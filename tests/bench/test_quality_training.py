"""Every method trains and gives a plain model back; the reference agrees; sequences are scored."""

from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

from bench.harness.jobs import MissingPeer
from bench.methods import STUDY
from bench.quality import analyses, oracle, sections, sequence, training
from bench.quality.study import Run
from bench.quality.tasks import TASKS
from bench.quality.training import options_of
from tests.bench.quality_tiny import tiny_base, tiny_tasks


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, task in tiny_tasks().items():
        monkeypatch.setitem(TASKS, name, task)
    monkeypatch.setattr(training, "english", lambda windows=0: TASKS["code"].splits.held_out)
    monkeypatch.setattr(training, "SCORED_ENGLISH", 1)


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture(scope="module")
def plain_runs(base):
    """The default run of LoSiA and the untrained model, made once."""
    made = {}

    def result(kind):
        if kind not in made:
            made[kind] = training.carry_out(
                run_of("losia-p8" if kind == "main" else "fft", kind=kind), base
            )
        return made[kind]

    return result


def run_of(method: str, kind: str = "main", steps: int = 8, lr: float | None = None) -> Run:
    lr = lr or STUDY[method].lrs[2]
    return Run(kind, "small", "pronunciation", method, 0, lr, steps)


RATES = {"losia-wide-p16": 3e-2, "losia-wide-head": 1e-4}  # few values; full fine-tuning's rate
BF16 = ("losia-wide-bf16", "losia-wide-bf16-stochastic", "losia-wide-bf16-nearest")


@pytest.mark.parametrize("method", STUDY)
def test_every_method_learns(method, base, plain_runs):
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    try:
        result = training.carry_out(run_of(method, lr=RATES.get(method, 3e-3)), base)
    except MissingPeer as missing:
        pytest.skip(str(missing))
    losses = [loss for _, loss in result["curve"]]
    assert (
        result["status"] == "ok" and len(losses) == 8 and sum(losses[-3:]) < 0.9 * sum(losses[:3])
    )
    assert set(result["scores"]) == {"held_out", "english", "code"} and len(result["each"]) == 3
    untrained = plain_runs("untrained")
    assert result["scores"]["held_out"][""]["nll"] < untrained["scores"]["held_out"][""]["nll"]
    assert result["memory"]["trained_values"] > 0 and result["memory"]["optimizer_bytes"] > 0
    assert all(torch.equal(value, before[key]) for key, value in base.model.state_dict().items()), (
        "base has changed"
    )


@pytest.mark.parametrize("method", STUDY)
def test_what_is_left_is_the_plain_model_with_the_trained_function(method, base):
    model = base.fresh()
    try:
        trained, options = training.prepare(
            run_of(method, steps=4, lr=3e-3), TASKS["pronunciation"], model, base
        )
    except MissingPeer as missing:
        pytest.skip(str(missing))
    training.train(trained, options)
    batch = next(options.batches())
    trained.module.eval()
    with torch.no_grad():
        logits = trained.module(input_ids=batch["input_ids"]).logits
        plain = trained.finish()
        torch.testing.assert_close(
            plain(input_ids=batch["input_ids"]).logits, logits, rtol=1e-4, atol=1e-4
        )
    assert plain.state_dict().keys() == base.model.state_dict().keys()
    assert all(type(m) is nn.Linear for name, m in plain.named_modules() if name.endswith("proj"))


@pytest.mark.parametrize("method", [name for name in STUDY if STUDY[name].explored])
def test_every_change_that_was_tried_changes_the_run(method, base):
    ours, theirs = (
        training.carry_out(run_of(name, lr=3e-3, steps=10), base)
        for name in (sections.OURS, method)
    )
    assert ours["curve"] != theirs["curve"]
    if method in ("losia-quarter", "losia-stream"):  # as many values, to the rounding of such sizes
        values = [each["memory"]["trained_values"] for each in (ours, theirs)]
        assert 0.5 < values[0] / values[1] < 2
    else:
        assert ours["memory"]["trained_values"] == theirs["memory"]["trained_values"]


def test_values_that_stay_trained_keep_their_moments(base):
    run = run_of("losia-moments", lr=3e-3, steps=8)
    trained, options = training.prepare(run, TASKS["pronunciation"], base.fresh(), base)
    optimizer, moved = trained.optimizer, []

    def before_move(layer, subnet):
        state = optimizer.state[layer.subnet]
        values = {key: state[key].clone() for key in ("exp_avg", "exp_avg_sq")}
        moved.append((layer, values, layer.out_idx.tolist(), layer.in_idx.tolist()))

    optimizer.timeline.listeners.append(before_move)
    kept = fresh = 0

    def after(step):
        nonlocal kept, fresh
        for layer, values, out_before, in_before in moved:
            state = optimizer.state[layer.subnet]
            for row, out in enumerate(layer.out_idx.tolist()):
                for column, into in enumerate(layer.in_idx.tolist()):
                    stays = out in out_before and into in in_before
                    for key, then in values.items():
                        mean = then.mean() if key == "exp_avg_sq" else torch.tensor(0.0)
                        old = then[out_before.index(out), in_before.index(into)] if stays else mean
                        torch.testing.assert_close(state[key][row, column], old)
                    kept, fresh = kept + stays, fresh + (not stays)
        moved.clear()

    training.train(trained, options, after)
    assert kept and fresh


def test_ways_of_rounding_differ(base):
    """Weights after a few small updates, most of which a 16-bit value cannot hold: only a master
    keeps them all."""
    curves = [training.carry_out(run_of(name, steps=6, lr=1e-4), base)["curve"] for name in BF16]
    assert len({str(curve) for curve in curves}) == 3


def test_learning_rate_warms_up_and_falls_to_zero():
    factors = [training.schedule(step, steps=10, warmup=2) for step in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0] and factors[-1] == pytest.approx(1 / 8)
    assert all(a >= b for a, b in zip(factors[1:], factors[2:], strict=False))


def test_a_search_sees_the_search_split_only(base, plain_runs):
    result = training.carry_out(run_of("lora-r8", kind="search", steps=2), base)
    assert set(result["scores"]) == {"search", "english"} and "each" not in result
    assert result["items"] != plain_runs("untrained")["items"]


def test_a_run_that_diverges_is_a_result(base):
    result = training.carry_out(run_of("fft", lr=1e18), base)
    assert result["status"] == "diverged" and "step" in result["reason"] and "scores" not in result


def test_the_period_gives_every_group_a_turn(base, plain_runs):
    assert plain_runs("main")["made"] == {"period": 4, "calibration_batches": 4}
    random = training.carry_out(run_of("losia-wide-r8"), base)["made"]
    assert random == {"period": 2, "calibration_batches": 0}


def test_bytes_are_counted(base):
    found = training.carry_out(run_of("lora-r8", steps=2), base)["memory"]
    per_block = 4 * (128 + 128) + 3 * (128 + 256)
    assert found["trained_values"] == 2 * 8 * per_block
    assert found["gradient_bytes"] == 4 * found["trained_values"]
    assert found["optimizer_bytes"] == pytest.approx(8 * found["trained_values"], rel=0.01)
    losia = training.carry_out(run_of("losia-p8", steps=2), base)["memory"]
    assert losia["observing_bytes"] == 8 * (4 * 128 * 128 + 3 * 128 * 256)
    default = training.carry_out(run_of("losia-wide-r8", steps=2), base)["memory"]
    assert "observing_bytes" not in default, "moves at random need no importance"
    try:
        galore = training.carry_out(run_of("galore", steps=2), base)["memory"]
    except MissingPeer as missing:
        pytest.skip(str(missing))
    linears = [(128, 128)] * 8 + [
        (256, 128),
        (256, 128),
        (128, 256),
    ] * 2  # [out, in]; rank 16 of the shorter side
    # two moments and the projection
    projected = sum(2 * 16 * max(shape) + 16 * min(shape) for shape in linears)
    plain = 2 * (galore["trained_values"] - sum(out * in_ for out, in_ in linears))
    assert galore["optimizer_bytes"] == pytest.approx(4 * (projected + plain), rel=0.01)


def test_the_reference_agrees(base):
    result = oracle.carry_out_oracle(run_of("losia-p8", kind="oracle"), base)
    assert result["largest_loss_difference"] < 1e-4
    assert result["same_subnets"] == result["layers"] == 14 and result["shared_subnet"] == 1.0
    assert result["same_at_start"] == 14
    mine, other = (result[key]["held_out"][""]["nll"] for key in ("scores", "reference_scores"))
    assert mine == pytest.approx(other, rel=1e-4)


def test_the_reference_would_notice(base, monkeypatch):
    # another learning rate than the package's
    monkeypatch.setattr(oracle, "schedule", lambda *arguments: 0.5)
    result = oracle.carry_out_oracle(run_of("losia-p8", kind="oracle"), base)
    assert result["largest_loss_difference"] > 1e-3


def test_the_reference_would_notice_another_start(base, monkeypatch):
    run = run_of("losia-p8", kind="oracle")
    random = {"changes": {"init_subnet": "random"}}
    monkeypatch.setattr(training, "options_of", lambda *args: replace(options_of(*args), **random))
    result = oracle.carry_out_oracle(run, base)
    assert result["same_at_start"] < 14 and result["same_subnets"] == 14


def test_a_sequence_is_scored_after_each_task(base):
    class Searched:
        def sequence_lrs(self, run):
            return [3e-3, 3e-3]

    run = Run("sequence", "small", "past-tense+plural", "lora-r8", 0, None, 4)
    result = sequence.carry_out_sequence(run, base, Searched())
    assert (
        len(result["after"]) == 2
        and all(len(row) == 2 for row in result["after"])
        and result["lrs"] == [3e-3, 3e-3]
    )
    assert all(0 < nats < 20 for row in result["after_nats"] for nats in row)


def test_a_sequence_is_scored_on_the_items_of_a_single_task(base, plain_runs, monkeypatch):
    """Both are of a small run's few items, though the task holds more."""
    assert (
        len(TASKS["plural"].splits.held_out)
        > TASKS["plural"].few
        == len(sequence.scored_items("plural", "small"))
    )
    monkeypatch.setattr(sequence, "SCORED", 2)
    assert len(sequence.scored_items("plural", "small")) == 2
    single = plain_runs("main")
    trained = sequence.single_task(single)
    each = single["each"][:2]
    assert trained["nll"] == sum(item[0] for item in each) / sum(item[1] for item in each)


def test_measures_of_a_sequence():
    after = [[80.0, 10.0, 5.0], [70.0, 60.0, 10.0], [50.0, 55.0, 90.0]]
    found = sequence.measures(after, single=[80.0, 65.0, 85.0])
    assert found == pytest.approx({"AP": 65.0, "FWT": 0.0, "BWT": (-30.0 - 5.0) / 2})
    assert sequence.single_task({"each": [[1.0, 3, 3, 1, 1], [2.0, 3, 1, 0, 1]]}) == {
        "right": 50.0,
        "nll": 0.5,
    }


def test_analysis(base):
    result = analyses.carry_out_analysis(run_of("losia-wide-r8", kind="analysis"), base)
    for values in result["captured"].values():
        assert values["random"] < values["greedy"] <= values["entries"] <= 1
        assert values["restarts"] <= values["entries"]
    assert 0.8 < result["small_matrices"]["worst"] <= result["small_matrices"]["mean"] <= 1
    assert result["moves"] > 0
    assert "Greedy over the optimum" in sections.captured(
        [result]
    ) and "LoSiA" in sections.singular([result])
    assert all(0 < values["mean"] <= 1 for values in result["singular"].values())
    for name, counts in result["selected"].items():
        assert sum(counts) == base.model.get_submodule(name).in_features


def test_analysis_of_another_method(base):
    result = analyses.carry_out_analysis(
        run_of("lora-r64", kind="analysis", steps=4, lr=3e-3), base
    )
    assert result["selected"] == {} and result["moves"] == 0
    assert all(values["least"] < 0.99999 for values in result["singular"].values()), (
        "these weights were trained"
    )
    assert sections.captured([result]) == "" and "LoRA r 64" in sections.singular([result])


def test_sums_alone_may_capture_less_than_greedy():
    scores = torch.zeros(16, 16)
    scores[:2, :2] = 1.0
    scores[2, 4:] = 0.25  # the largest row, of which no column is large
    found = analyses.captured(scores)
    assert (found["greedy"], found["sums"]) == (round(4 / 7, 4), round(2 / 7, 4))


def test_optimum_and_concentration_of_known_matrices():
    block = torch.zeros(6, 6)
    block[:2, :2] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    block[5, 5] = 9.0
    assert analyses.optimum(block, 2) == pytest.approx(13 / 19)  # the 9 with the 4
    assert analyses.optimum(block, 3) == pytest.approx(1.0)
    shares = [15 / 120, 29 / 120, 54 / 120, 92 / 120]
    assert analyses.concentration(torch.arange(16.0)) == pytest.approx(shares, abs=1e-4)
    weight = torch.randn(8, 12)
    assert analyses.similarity(weight, 3 * weight)["least"] == pytest.approx(1.0, abs=1e-3)
