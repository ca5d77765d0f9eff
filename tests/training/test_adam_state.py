"""The forms of the optimizer's state that take less memory, and updates inside the backward."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn

from losia_kernels import LoSiAAdamW, apply_losia
from losia_kernels.layers.module import losia_layers
from losia_kernels.ops import adamw
from losia_kernels.ops.rounding import join_float
from losia_kernels.training.adam_state import MOMENTS, SUBNET_STATE
from tests.tiny import make_batches, paper, same_tensors, take_step, tiny_lm

BF16 = torch.bfloat16
FORMS = {
    f"{moments}, {master}": ({"moments": moments}, master)
    for moments, master in itertools.product(MOMENTS, ("float32", "split", "none"))
}


def make_run(form=None, master="float32", dtype=BF16, seed=0, tied=False, lr=0.01, **options):
    config = {
        "rank_factor": 0.5,
        "period": 2,
        "output_dim_factor": 0.5,
        "master": master,
    } | options
    model = apply_losia(tiny_lm(tied=tied).to(dtype), paper(**config, seed=seed))
    return model, LoSiAAdamW(model, lr=lr, weight_decay=0.1, **(form or {}))


def gradients(model) -> list[str]:
    return [name for name, layer in losia_layers(model) if layer.subnet.grad is not None]


# State --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form, master", FORMS.values(), ids=FORMS.keys())
def test_what_is_kept_and_its_bytes(form, master):
    model, optimizer = make_run(form, master, period=100)
    take_step(model, optimizer, make_batches(1)[0])
    layer = model.model.layers[0].up_proj
    state = optimizer.state[layer.subnet]
    assert set(state) <= set(SUBNET_STATE) and ("remainder" in state) == (master == "split")
    per_value = {"float32": 8, "bfloat16": 4, "int8": 2}[form["moments"]]
    per_value += 2 * (master == "split")
    held = sum(
        value.nbytes for key, value in state.items() if key != "step" and not key.endswith("_scale")
    )
    assert held == per_value * layer.subnet.numel()
    assert layer.subnet.element_size() == (4 if master == "float32" else 2)
    assert [key for key in state if key.endswith("_scale")] == (
        ["exp_avg_scale", "exp_avg_sq_scale"] if form["moments"] == "int8" else []
    )


@pytest.mark.parametrize("form, master", FORMS.values(), ids=FORMS.keys())
def test_it_learns_as_with_float32_state(form, master):
    """48 steps on four batches, each group moved four times; the loss falls by more than half of a
    nat either way."""
    losses = {}
    for name, (options, kept) in {"float32": ({}, "float32"), "form": (form, master)}.items():
        model, optimizer = make_run(options, kept, period=4, lr=0.05)
        batches = make_batches(4)
        run = [take_step(model, optimizer, batches[step % 4]) for step in range(48)]
        losses[name] = sum(run[-4:]) / 4
        assert losses[name] < sum(run[:4]) / 4 - 0.5
    assert losses["form"] == pytest.approx(losses["float32"], abs=0.02)


def test_importance_in_bfloat16_learns_as_in_float32_and_moves_to_nearly_the_same_places():
    losses, places = {}, {}
    for importance in ("sensitivity", "sensitivity_bfloat16", "gradient"):
        model, optimizer = make_run(period=4, lr=0.05, importance=importance)
        batches = make_batches(4)
        run = [take_step(model, optimizer, batches[step % 4]) for step in range(48)]
        losses[importance] = sum(run[-4:]) / 4
        first = make_run(period=4, lr=0.05, importance=importance)
        for step in range(12):  # one cycle: later choices follow from earlier ones
            take_step(*first, batches[step % 4])
        places[importance] = {
            (name, key, int(i))
            for name, layer in losia_layers(first[0])
            for key in ("out_idx", "in_idx")
            for i in getattr(layer, key)
        }
    assert losses["sensitivity_bfloat16"] == pytest.approx(losses["sensitivity"], abs=0.02)
    shared = {
        kind: len(places["sensitivity"] & chosen) / len(chosen) for kind, chosen in places.items()
    }
    assert shared["sensitivity_bfloat16"] > 0.95 > shared["gradient"]


def test_a_remainder_makes_the_run_of_a_float32_master():
    """Given the same (bfloat16) gradients: values, moments, weights, moves."""
    plain, exact = make_run(), make_run(master="split")
    for batch in make_batches(2 * plain[1].timeline.schedule.cycle):
        for model, _ in (plain, exact):
            model(**batch).loss.backward()
        for (_, layer), (_, twin) in zip(
            losia_layers(plain[0]), losia_layers(exact[0]), strict=True
        ):
            layer.subnet.grad = twin.subnet.grad.float()
        for _, optimizer in (plain, exact):
            optimizer.step()
            optimizer.zero_grad()
        for (name, layer), (_, twin) in zip(
            losia_layers(plain[0]), losia_layers(exact[0]), strict=True
        ):
            state = exact[1].state[twin.subnet]
            if state:  # else it has just moved, and is the weight's own value in both
                assert torch.equal(
                    join_float(twin.subnet.detach(), state["remainder"]), layer.subnet
                ), name
                assert torch.equal(state["exp_avg_sq"], plain[1].state[layer.subnet]["exp_avg_sq"])
            assert torch.equal(layer.weight, twin.weight) and torch.equal(
                layer.out_idx, twin.out_idx
            )
            assert twin.subnet.dtype == BF16 and twin.subnet.grad is None


def test_a_remainder_collects_what_bf16_cannot_hold():
    model, optimizer = make_run(master="split", period=1000, output_dim_factor=0.0)
    layer = model.model.layers[0].up_proj
    start = layer.subnet.detach().float()
    optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"] = 1e-5, 0.0
    for _ in range(30):
        layer.subnet.grad = torch.ones_like(layer.subnet)
        optimizer.step()
    value = join_float(layer.subnet.detach(), optimizer.state[layer.subnet]["remainder"])
    torch.testing.assert_close(value, start - 30e-5, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reset_step", [True, False])
@pytest.mark.parametrize("form, master", FORMS.values(), ids=FORMS.keys())
def test_stopped_and_resumed_is_the_same_run(form, master, reset_step):
    whole, saved = make_run(form, master, reset_step=reset_step), {}
    batches = make_batches(10)
    for step, batch in enumerate(batches):
        if step in (1, 4, 7):
            file = io.BytesIO()
            torch.save([part.state_dict() for part in whole], file)
            saved[step] = file.getvalue()
        take_step(*whole, batch)
    for stop, checkpoint_ in saved.items():
        resumed = make_run(form, master, reset_step=reset_step)
        for part, state in zip(
            resumed, torch.load(io.BytesIO(checkpoint_), weights_only=True), strict=True
        ):
            part.load_state_dict(state)
        for batch in batches[stop:]:
            take_step(*resumed, batch)
        assert same_tensors(resumed[0].state_dict(), whole[0].state_dict())
        ours, theirs = (run[1].state_dict()["state"] for run in (resumed, whole))
        assert ours.keys() == theirs.keys() and all(same_tensors(ours[i], theirs[i]) for i in ours)


def test_rows_of_several_scales_resume():
    def run():
        torch.manual_seed(0)
        model = apply_losia(
            nn.Sequential(nn.Linear(600, 8), nn.Linear(8, 4)), paper(rank_factor=0.5)
        )
        return model, LoSiAAdamW(model, lr=0.01, moments="int8")

    def step(model, optimizer):
        model(torch.linspace(-1, 1, 1200).view(2, 600)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    whole, resumed = run(), run()
    step(*whole)
    assert whole[1].state[whole[0][0].subnet]["exp_avg_scale"].shape == (4, 2)
    for part, other in zip(resumed, whole, strict=True):
        part.load_state_dict(other.state_dict())
    step(*whole)
    step(*resumed)
    assert same_tensors(whole[0].state_dict(), resumed[0].state_dict())


@pytest.mark.parametrize("form, master", FORMS.values(), ids=FORMS.keys())
def test_a_move_forgets_all_of_it(form, master):
    for reset_step in (True, False):
        model, optimizer = make_run(
            form, master, reset_step=reset_step, period=3, output_dim_factor=0.0
        )
        for batch in make_batches(3):
            take_step(model, optimizer, batch)
        moved, stayed = (optimizer.state[block.up_proj.subnet] for block in model.model.layers)
        assert all(value.any() for value in stayed.values())
        assert not moved if reset_step else moved["step"] == 3
        zeroed = [
            moved[key] for key in moved if key.endswith("scale") or key in ("exp_avg", "remainder")
        ]
        assert not any(value.any() for value in zeroed)


def test_a_checkpoint_of_another_form_is_refused_before_anything_changes():
    runs = {name: make_run(form, master) for name, (form, master) in FORMS.items()}
    for run in runs.values():
        take_step(*run, make_batches(1)[0])
    for (name, (_, optimizer)), (other, saved) in itertools.permutations(runs.items(), 2):
        differ = [a != b for a, b in zip(name.split(", "), other.split(", "), strict=True)]
        if not differ[0] and "split" not in name + other:
            continue  # what differs is the model's subnet alone
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match="moments|master"):
            optimizer.load_state_dict(saved[1].state_dict())
        after = optimizer.state_dict()["state"]
        assert all(same_tensors(after[i], before["state"][i]) for i in after)


def test_forms_that_cannot_be():
    with pytest.raises(
        ValueError, match="moments must be one of float32, bfloat16, int8, got 'fp8'"
    ):
        make_run({"moments": "fp8"})
    with pytest.raises(ValueError, match="layers.0.up_proj's is torch.float32.*convert a bfloat16"):
        make_run(master="split", dtype=torch.float32)
    with pytest.raises(ValueError, match="master='split' keeps subnets in bfloat16"):
        make_run(master="split", dtype=torch.float16)
    with pytest.raises(ValueError, match="float64, moments='int8'"):
        make_run({"moments": "int8"}, dtype=torch.float64)


# Launches -----------------------------------------------------------------------------------------


def test_a_step_is_one_call_for_all_layers(monkeypatch):
    model, optimizer = make_run()
    called, plain = [], adamw.subnets_adamw_

    def count(weights, *args):
        called.append(len(weights))
        plain(weights, *args)

    monkeypatch.setattr(adamw, "subnets_adamw_", count)
    take_step(model, optimizer, make_batches(1)[0])
    optimizer.param_groups[1]["weight_decay"] = 0.0
    take_step(model, optimizer, make_batches(1)[0])
    assert called == [5, 3, 2]


@pytest.mark.parametrize("form, master", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("in_backward", [False, True])
def test_no_step_reads_a_value(form, master, in_backward):
    """Meta tensors have none: whatever would wait for a GPU (item, nonzero, a copy to the host)
    raises here."""
    config = paper(
        rank_factor=0.5,
        period=100,
        output_dim_factor=0.5,
        master=master,
        modules_to_save=["norm"],
        fused_loss=False,
    )
    model = apply_losia(tiny_lm().to(BF16).to("meta"), config)
    optimizer = LoSiAAdamW(model, lr=0.01, in_backward=in_backward, **form)
    for _ in range(3):
        model(
            **{key: value.to("meta") for key, value in make_batches(1)[0].items()}
        ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (
        optimizer.timeline.step == 3
        and optimizer.state[model.model.layers[1].up_proj.subnet]["step"] == 3
    )


@pytest.mark.gpu
@pytest.mark.parametrize("form, master", FORMS.values(), ids=FORMS.keys())
def test_no_step_waits_for_the_gpu(form, master):
    model = apply_losia(
        tiny_lm().to(BF16).cuda(), paper(rank_factor=0.5, period=100, master=master)
    )
    optimizer = LoSiAAdamW(model, lr=0.01, **form)
    batch = {key: value.cuda() for key, value in make_batches(1)[0].items()}
    take_step(model, optimizer, batch)  # tile maps and code tables come to the device once
    for _ in range(2):
        model(**batch).loss.backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.zero_grad()
