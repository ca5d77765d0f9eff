"""Of a trained model only subnets kept: what is kept, where, and what the report makes of it."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from bench.methods import STUDY
from bench.methods.base import decoder_linears
from bench.quality import masked, plots, runner, sections, training
from bench.quality.items import Splits
from bench.quality.store import Store
from bench.quality.study import SMALL, Run, searches, study
from bench.quality.tasks import TASKS
from csrc_ref.selection import select_ref
from losia_kernels.layers.subnet import Subnet
from tests.bench.quality_tiny import tiny_base, tiny_splits, tiny_tasks


def learned_splits() -> Splits:
    """Scored on what was trained: so few items teach so small a model nothing about others."""
    splits = tiny_splits()
    return Splits(splits.train, splits.search, splits.train[:4])


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, task in tiny_tasks().items():
        monkeypatch.setitem(TASKS, name, replace(task, make=learned_splits))
    monkeypatch.setattr(training, "english", lambda: TASKS["code"].splits.held_out)


@pytest.fixture(scope="module")
def base():
    return tiny_base()


def run_of(method: str = "fft", steps: int = 24, lr: float = 1e-3) -> Run:
    return Run("masked", "small", "past-tense", method, 0, lr, steps)


def test_the_more_is_kept_the_more_it_still_does(base):
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    result = masked.carry_out_masked(run_of(), base)
    assert all(torch.equal(value, before[key]) for key, value in base.model.state_dict().items())
    main = training.carry_out(Run("main", "small", "past-tense", "fft", 0, 1e-3, 24), base)
    found = main["scores"]["held_out"][""]
    assert result["items"] == main["items"]
    assert result["whole"] == pytest.approx([found["right"], found["nll"]], abs=1e-2)
    assert result["whole"][1] < 0.5 * result["untrained"][1]
    for outside in ("zero", "untrained"):
        for kind in masked.KINDS:
            rows = result["masked"][outside][kind]
            assert [row[0] for row in rows] == list(masked.MASKED)
            cost = [nll for _, _, nll in rows]
            assert result["whole"][1] < cost[0] < cost[len(cost) // 2] < cost[-1]
    for outside, share in (("zero", 1 / 16), ("untrained", 15 / 16)):
        place = masked.MASKED.index(share)
        cost = {kind: rows[place][2] for kind, rows in result["masked"][outside].items()}
        assert max(cost["sensitivity"], cost["gradient"]) < 0.9 * cost["random"]


def test_what_is_kept_and_what_is_outside():
    model = nn.ModuleDict({"a": nn.Linear(5, 4), "b": nn.Linear(3, 3)})
    kept = {name: torch.full_like(each.weight, 2.0) for name, each in model.items()}
    outside = {name: torch.full_like(each.weight, -1.0) for name, each in model.items()}
    subnets = {"a": Subnet(torch.tensor([1, 3]), torch.tensor([0, 4]))}
    masked.keep_only_(model, subnets, kept, outside)
    expected = torch.full((4, 5), -1.0)
    expected[1, 0] = expected[1, 4] = expected[3, 0] = expected[3, 4] = 2.0
    assert torch.equal(model["a"].weight, expected)
    assert torch.equal(model["b"].weight, outside["b"]), "it has no subnet"
    masked.keep_only_(model, subnets, kept, None)
    assert torch.equal(model["a"].weight, expected.clamp(min=0))


def scores_by_hand(model: nn.Module, name: str, batches: list) -> dict[str, torch.Tensor]:
    """Eqs. 3-6 and |g|, in float64, straight from the paper."""
    weight = model.get_submodule(name).weight
    importance, uncertainty, total = (torch.zeros_like(weight, dtype=torch.float64) for _ in "123")
    for batch in batches:
        (grad,) = torch.autograd.grad(model(**batch).loss, weight)
        product = grad.double() * weight.detach().double()
        now = (product - product**2 / 2).abs()
        importance = 0.85 * importance + 0.15 * now
        uncertainty = 0.85 * uncertainty + 0.15 * (now - importance).abs()
        total += grad.double()
    return {"sensitivity": importance * uncertainty, "gradient": total.abs()}


@pytest.mark.parametrize("kind", ["sensitivity", "gradient"])
def test_subnets_are_those_of_the_score(kind, base):
    model = base.fresh()
    batches = list(training.options_of(run_of(steps=3), TASKS["past-tense"], base).batches())
    found = masked.localize(model, batches, kind, seed=0)
    assert list(found) == list(masked.MASKED)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        score = scores_by_hand(model, name, batches)[kind]
        for share, subnets in found.items():
            k_out, k_in = (int(math.sqrt(1 - share) * side) for side in score.shape)
            out_idx, in_idx, *_ = select_ref(score, k_out, k_in)
            best = score[out_idx][:, in_idx].sum()
            mine = score[subnets[name].out_idx][:, subnets[name].in_idx].sum()
            assert subnets[name].shape == (k_out, k_in)
            assert mine == pytest.approx(float(best), rel=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_random_subnets_are_of_the_seed_and_the_right_size(base):
    one, same, other = (masked.localize(base.fresh(), [], "random", seed) for seed in (0, 0, 1))
    for name, linear in decoder_linears(base.model).items():
        for share in masked.MASKED:
            subnet = one[share][name]
            assert torch.equal(subnet.out_idx, same[share][name].out_idx)
            kept = subnet.out_idx.numel() * subnet.in_idx.numel() / linear.weight.numel()
            assert kept == pytest.approx(1 - share, abs=0.02)
    name = "model.layers.0.mlp.up_proj"
    assert not torch.equal(one[1 / 2][name].out_idx, other[1 / 2][name].out_idx)


def test_the_study_runs_it_and_the_report_shows_it(base, tmp_path, monkeypatch):
    runs = [run for run in study(SMALL) if run.kind == "masked"]
    assert [run.id for run in runs] == ["small_past-tense_masked_fft_seed0"]
    monkeypatch.setattr(runner, "_base", base)
    monkeypatch.setattr(masked, "MASKED", (1 / 16, 15 / 16))
    kept = Store(tmp_path)
    for trial in searches(SMALL, "past-tense", "fft"):
        nll = abs(math.log(trial.lr / STUDY["fft"].lrs[2]))
        scores = {"search": {"": {"nll": nll}}}
        kept.write(trial, {"run": vars(trial), "status": "ok", "scores": scores})
    (run,) = (kept.resolve(run) for run in runs)
    result = runner._carry_out(run, kept)["result"]
    assert result["run"]["lr"] == STUDY["fft"].lrs[2]
    text = sections.masked([result])
    assert sections.SECTIONS["Only subnets kept"] is sections.masked
    rows = [line for line in text.splitlines() if line.startswith(("| 6.2 ", "| 93.8 ", "| 100 "))]
    assert len(rows) == 5 and all(row.count("|") == 5 for row in rows)
    assert "full fine-tuning, 60 steps, one seed" in text and "set back to what they were" in text
    pictures = plots.draw_plots([result], [], "small", tmp_path / "plots")
    assert [path.name for path in pictures] == ["small-all-masked.svg"]
