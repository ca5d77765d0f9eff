"""torch.distributed.checkpoint, as torchtitan, accelerate and torchtune use it, in one process: nested
and flattened, at any step of a slot, and from a run whose config had other fields."""

import json
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from losia_kernels import LoSiAAdamW, LoSiAConfig, apply_losia, attach
from tests.tiny import make_batches, paper, same_tensors, snapshot, take_step, tiny_lm

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


ATTACHED = {
    "attach": partial(torch.optim.AdamW, lr=0.01),
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.5),  # zeros are no first step
    "NAdam": partial(torch.optim.NAdam, lr=0.01),  # its state begins with ones
}


def make_run(kind: str, steps: int, **options):
    config = paper(**{"rank_factor": 0.5, "period": 2, "output_dim_factor": 0.5} | options)
    model = apply_losia(tiny_lm(), config)
    if kind in ATTACHED:
        optimizer = ATTACHED[kind]([p for p in model.parameters() if p.requires_grad])
        attach(optimizer, model)
    else:
        optimizer = LoSiAAdamW(model, lr=0.01)
    for batch in make_batches(steps):
        take_step(model, optimizer, batch)
    return model, optimizer


def save(folder, run, options):
    model_state, optimizer_state = get_state_dict(*run, options=options)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def load(folder, run, options):
    model_state, optimizer_state = get_state_dict(*run, options=options)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(
        *run,
        model_state_dict=model_state,
        optim_state_dict=optimizer_state,
        options=options,
    )


FORMS = pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])


@FORMS
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("options", [{}, {"importance": "gradient"}, {"modules_to_save": ["norm"]}])
def test_a_run_goes_on_bit_by_bit(tmp_path, flat, steps, options):
    form = StateDictOptions(flatten_optimizer_state_dict=flat)
    run = make_run("LoSiAAdamW", steps, **options)
    save(tmp_path, run, form)
    resumed = make_run("LoSiAAdamW", 0, seed=7, **options)
    resumed[1].timeline.resume_at(steps)
    load(tmp_path, resumed, form)
    for batch in make_batches(5, seed=1):
        take_step(*run, batch)
        take_step(*resumed, batch)
    assert same_tensors(snapshot(run[0]), snapshot(resumed[0]))
    assert resumed[1].timeline.step == steps + 5


@FORMS
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ATTACHED)
def test_attached_it_goes_on_bit_by_bit(tmp_path, flat, steps, kind):
    """Also right after a move, when the optimizer has no state of what has moved."""
    form = StateDictOptions(flatten_optimizer_state_dict=flat)
    run, resumed = make_run(kind, steps), make_run(kind, 0, seed=7)
    save(tmp_path, run, form)
    resumed[1].timeline.resume_at(steps)
    load(tmp_path, resumed, form)
    for batch in make_batches(5, seed=1):
        take_step(*run, batch)
        take_step(*resumed, batch)
    assert same_tensors(snapshot(run[0]), snapshot(resumed[0]))


@FORMS
@pytest.mark.parametrize("kind", ["LoSiAAdamW", *ATTACHED])
def test_a_run_that_goes_back_to_its_checkpoint_goes_on_bit_by_bit(tmp_path, flat, kind):
    """As after a spike of the loss, and right after a move."""
    form = StateDictOptions(flatten_optimizer_state_dict=flat)
    run, control = make_run(kind, 3), make_run(kind, 3)
    save(tmp_path, run, form)
    take_step(*run, make_batches(1, seed=2)[0])
    run[1].timeline.resume_at(3)
    load(tmp_path, run, form)
    for batch in make_batches(5, seed=1):
        take_step(*run, batch)
        take_step(*control, batch)
    assert same_tensors(snapshot(run[0]), snapshot(control[0]))


@FORMS
def test_fields_that_came_and_went_do_not_matter(tmp_path, flat):
    form = StateDictOptions(flatten_optimizer_state_dict=flat)
    run = make_run("LoSiAAdamW", 3)
    _, state = saved = get_state_dict(*run, options=form)

    def older(config: str) -> str:
        fields = json.loads(config) | {"of_then": 1}
        del fields["alignment"]
        return json.dumps(fields)

    for holder in [state] if flat else state["param_groups"]:
        for key in [key for key in holder if key.endswith("losia_config")]:
            holder[key] = older(holder[key])
    dcp.save({"model": saved[0], "optimizer": state}, checkpoint_id=tmp_path)
    resumed = make_run("LoSiAAdamW", 0)
    resumed[1].timeline.resume_at(3)
    load(tmp_path, resumed, form)
    assert same_tensors(snapshot(run[0]), snapshot(resumed[0]))


def test_the_config_is_one_text_that_weights_only_reads(tmp_path):
    model, optimizer = make_run("LoSiAAdamW", 3, rank_pattern={"up_proj": 0.25})
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    state = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    config = state["param_groups"][0]["losia_config"]
    assert LoSiAConfig.from_dict(json.loads(config)) == optimizer.timeline.config


def test_names_that_a_save_leaves_in_the_optimizer_hinder_no_step():
    """Whatever is asked for its state, between any two steps, with every kind of forgetting."""
    for kind in ("LoSiAAdamW", "attach"):
        for reset_step in (True, False):
            run = make_run(kind, 0, reset_step=reset_step)
            control = make_run(kind, 0, reset_step=reset_step)
            for batch in make_batches(7):
                run[1].state_dict()
                take_step(*run, batch)
                take_step(*control, batch)
            assert same_tensors(snapshot(run[0]), snapshot(control[0]))
            before = run[1].state_dict()
            run[1].load_state_dict(before)
            run[1].timeline.detach()
            held = [*run[1].param_groups, *run[1].state.values()]
            assert not [key for part in held for key in part if key.startswith("losia_")]
