"""LoSiAAdamW: torch's AdamW on the subnets, nothing outside them, and whole after an error."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from losia_kernels import LoSiAAdamW, NonFiniteScoreError, apply_losia
from losia_kernels.layers.convert import trained_parameters
from losia_kernels.layers.module import losia_layers
from tests.tiny import make_batches, paper, same_tensors, snapshot, take_step, tiny_lm, trainable

NEVER = 10_000  # a period after the end of the run


def make_model(dtype=torch.float32, tied=False, blocks=2, **options) -> nn.Module:
    config = paper(**{"rank_factor": 0.5, "period": 2} | options)
    return apply_losia(tiny_lm(tied=tied, blocks=blocks).to(dtype), config)


def step_by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, batch) -> None:
    """What a user of any torch optimizer does: step, then write back."""
    take_step(model, optimizer, batch)
    for _, layer in losia_layers(model):
        layer.write_back_()


# Updates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"output_dim_factor": 0.5},
        {"output_dim_factor": 1.0},
        {"modules_to_save": ["embed_tokens", "norm"]},
    ],
    ids=["blocks", "head", "dense head", "modules to save"],
)
def test_without_a_move_it_is_torchs_adamw_on_the_subnets(dtype, options):
    ours = make_model(dtype, period=NEVER, **options)
    theirs = copy.deepcopy(ours)
    hyper = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    optimizer, reference = LoSiAAdamW(ours, **hyper), torch.optim.AdamW(trainable(theirs), **hyper)
    for batch in make_batches(6):
        take_step(ours, optimizer, batch)
        step_by_hand(theirs, reference, batch)
    tolerance = (
        {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    )
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **tolerance)
    assert not same_tensors(
        ours.state_dict(), make_model(dtype, period=NEVER, **options).state_dict()
    )
    for (name, layer), (_, twin) in zip(losia_layers(ours), losia_layers(theirs), strict=True):
        mine, other = optimizer.state[layer.subnet], reference.state[twin.subnet]
        for key in ("step", "exp_avg", "exp_avg_sq"):  # a checkpoint names them
            torch.testing.assert_close(mine[key], other[key], **tolerance, msg=f"{name}: {key}")


@pytest.mark.parametrize(
    "options", [{}, {"update_type": "sync"}, {"importance": "gradient"}, {"tied": True}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_outside_the_subnets_keep_their_bits_through_two_cycles(dtype, options):
    """Each step changes at most the block that was trained in it; frozen parameters never
    change."""
    model = make_model(dtype, output_dim_factor=0.5, **options)
    optimizer = LoSiAAdamW(model, lr=0.01, weight_decay=0.1)
    moved = set()
    for batch in make_batches(2 * optimizer.timeline.schedule.cycle):
        before, subnets = (
            snapshot(model),
            {n: copy.deepcopy(x.current_subnet) for n, x in losia_layers(model)},
        )
        take_step(model, optimizer, batch)
        for name, layer in losia_layers(model):
            subnet, old = subnets[name], before.pop(f"{name}.weight")
            inside = torch.zeros_like(old, dtype=torch.bool)
            inside[subnet.out_idx[:, None], subnet.in_idx] = True
            assert torch.equal(layer.weight[~inside], old[~inside])
            assert (layer.weight[inside] != old[inside]).float().mean() > 0.5
            assert torch.equal(layer.subnet.to(dtype), layer.current_subnet.gather(layer.weight))
            moved |= {name} if not torch.equal(layer.out_idx, subnet.out_idx) else set()
        now = model.state_dict()
        frozen = {
            key: value for key, value in before.items() if "subnet" not in key and "idx" not in key
        }
        if options.get("tied"):
            frozen.pop("model.embed_tokens.weight")
        assert frozen and same_tensors(frozen, {key: now[key] for key in frozen})
    assert len(moved) == 5


def test_a_layer_without_a_gradient_stays_and_its_clock_too():
    model = make_model()
    optimizer = LoSiAAdamW(model, lr=0.01)
    unused = model.model.layers[0]
    before = snapshot(unused)
    unused.forward = lambda x: x
    for batch in make_batches(9):
        take_step(model, optimizer, batch)
    assert same_tensors(unused.state_dict(), before)
    assert optimizer.state[unused.up_proj.subnet] == {} and optimizer.timeline.step == 9


def test_dense_bf16_parameters_collect_what_bf16_cannot_hold():
    """40 steps of 1e-4 on weights of size 1: each alone is below half an ulp (2^-9)."""
    model = make_model(torch.bfloat16, modules_to_save=["norm"], period=NEVER)
    start = model.model.norm.weight.clone()
    optimizer = LoSiAAdamW(model, lr=1e-4)
    for _ in range(40):
        for _, parameter in trained_parameters(model):
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    master = optimizer.state[model.model.norm.weight]["master"]
    torch.testing.assert_close(master, start.float() - 40e-4, rtol=0, atol=1e-5)
    assert torch.equal(model.model.norm.weight, master.bfloat16())
    assert (model.model.norm.weight < start).all()


def test_the_master_of_a_subnet_collects_what_bf16_cannot_hold():
    model = make_model(torch.bfloat16, period=NEVER)
    layer = model.model.layers[0].up_proj
    start = layer.subnet.detach().clone()
    optimizer = LoSiAAdamW(model, lr=1e-5)
    for _ in range(30):
        layer.subnet.grad = torch.ones_like(layer.subnet)
        optimizer.step()
    torch.testing.assert_close(layer.subnet.detach(), start - 30e-5, rtol=0, atol=1e-6)
    assert torch.equal(layer.current_subnet.gather(layer.weight), layer.subnet.bfloat16())


def test_without_a_master_rounding_is_stochastic_unbiased_and_repeatable():
    def run(seed: int) -> torch.Tensor:
        model = make_model(torch.bfloat16, master="none", period=NEVER, seed=seed, rank_factor=1.0)
        subnets = [layer.subnet for _, layer in losia_layers(model)]
        optimizer = LoSiAAdamW(model, lr=1e-3)
        for _, layer in losia_layers(model):
            layer.weight.data.fill_(1.0)
        for _ in range(20):
            for subnet in subnets:
                subnet.grad = torch.ones_like(subnet)
            optimizer.step()
        assert all(torch.equal(layer.weight, layer.subnet) for _, layer in losia_layers(model))
        assert not torch.equal(subnets[0], subnets[2])  # layers round differently
        return torch.cat([subnet.detach().flatten() for subnet in subnets])

    first, again, other = run(0), run(0), run(1)
    assert (
        first.dtype == torch.bfloat16
        and torch.equal(first, again)
        and not torch.equal(first, other)
    )
    assert abs(first.float().mean() - 0.98) < 1e-3  # rounding to nearest would leave 1.0
    assert first.unique().numel() > 2


# Moves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset_step", [True, False])
def test_a_move_forgets_the_moments_and_perhaps_the_step(reset_step):
    model = make_model(period=3, reset_step=reset_step)
    optimizer = LoSiAAdamW(model, lr=0.01)
    first, second = (block.up_proj.subnet for block in model.model.layers)
    for batch in make_batches(3):
        take_step(model, optimizer, batch)
    assert optimizer.state[second]["step"] == 3 and optimizer.state[second]["exp_avg"].any()
    if reset_step:
        assert not optimizer.state[first]
    else:
        assert optimizer.state[first]["step"] == 3
        assert (
            not optimizer.state[first]["exp_avg"].any()
            and not optimizer.state[first]["exp_avg_sq"].any()
        )
    take_step(model, optimizer, make_batches(1)[0])
    assert optimizer.state[first]["step"] == (1 if reset_step else 4)


def test_the_observing_group_alone_has_importance():
    model = make_model()
    optimizer = LoSiAAdamW(model, lr=0.01)
    for step, batch in enumerate(make_batches(9)):
        assert optimizer.timeline.observing == (step // 2 % 2,)
        observing = [
            name for name, layer in losia_layers(model) if layer.observe_callback is not None
        ]
        assert observing == [
            f"model.layers.{step // 2 % 2}.{name}" for name in ("up_proj", "down_proj")
        ]
        take_step(model, optimizer, batch)


@pytest.mark.parametrize("importance", ["sensitivity", "gradient", "marginal"])
def test_the_choice_does_not_depend_on_a_scaling_of_the_loss(importance):
    """As a GradScaler does it: scale, backward, unscale, step; the clock knows by loss_divisor."""
    plain, scaled = (make_model(torch.float64, importance=importance) for _ in "ab")
    optimizer, other = LoSiAAdamW(plain, lr=0.01), LoSiAAdamW(scaled, lr=0.01)
    other.timeline.loss_divisor = 1 / 1024
    for batch in make_batches(9):
        take_step(plain, optimizer, batch)
        (scaled(**batch).loss * 1024).backward()
        for parameter in trainable(scaled):
            parameter.grad /= 1024
        other.step()
        other.zero_grad()
        assert same_tensors(plain.state_dict(), scaled.state_dict())


def test_accumulation_is_one_tick_and_each_micro_batch_is_judged_by_its_own_loss():
    """Halved losses give the importance of whole ones; without the divisor they would give
    another."""
    chosen = {}
    for divisor in (1.0, 2.0):
        model = make_model(torch.float64, blocks=1, period=1)
        with torch.no_grad():
            model.lm_head.weight.mul_(50)  # large gradients: the second-order term of Eq. 3 decides
        optimizer = LoSiAAdamW(model, lr=0.0)
        optimizer.timeline.loss_divisor = divisor
        seen = optimizer.timeline.observers[model.model.layers[0].up_proj]
        for batch in make_batches(2):
            (model(**batch).loss / 2).backward()
        optimizer.step()
        chosen[divisor] = seen.tensors["importance"]
        assert optimizer.timeline.step == 1
    whole = make_model(torch.float64, blocks=1, period=1)
    with torch.no_grad():
        whole.lm_head.weight.mul_(50)
    optimizer = LoSiAAdamW(whole, lr=0.0)
    seen = optimizer.timeline.observers[whole.model.layers[0].up_proj]
    for batch in make_batches(2):
        whole(**batch).loss.backward()
    optimizer.step()
    torch.testing.assert_close(chosen[2.0], seen.tensors["importance"])
    assert not torch.allclose(chosen[1.0], seen.tensors["importance"], rtol=0.01)


# Errors and warnings ------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", ["sensitivity", "gradient", "marginal"])
@pytest.mark.parametrize("update_type", ["async", "sync"])
def test_a_score_that_is_not_finite_names_the_layer_and_leaves_all_whole(importance, update_type):
    """Something has written an infinity into the importance of one layer; what is saved after the
    error resumes and goes on."""
    model = make_model(importance=importance, update_type=update_type)
    optimizer = LoSiAAdamW(model, lr=0.01)
    first, batch = make_batches(2)
    take_step(model, optimizer, first)
    layer = model.model.layers[0].down_proj
    model(**batch).loss.backward()
    optimizer.timeline.observe()
    for tensor in optimizer.timeline.observers[layer].tensors.values():
        tensor.fill_(torch.inf)
    before = {n: (x.out_idx.clone(), x.in_idx.clone()) for n, x in losia_layers(model)}
    with pytest.raises(
        NonFiniteScoreError, match=r"model\.layers\.0\.down_proj: importance is not finite for"
    ):
        optimizer.step()
    for name, moved in losia_layers(model):
        assert torch.equal(moved.out_idx, before[name][0]) and torch.equal(
            moved.in_idx, before[name][1]
        )
        assert torch.equal(moved.current_subnet.gather(moved.weight), moved.subnet)
        assert optimizer.state[moved.subnet]["step"] == 2
    assert optimizer.timeline.step == 2
    optimizer.zero_grad()

    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = make_model(importance=importance, update_type=update_type, seed=3)
    other = LoSiAAdamW(resumed, lr=0.01)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    for batch in make_batches(5, seed=1):
        take_step(model, optimizer, batch)
        take_step(resumed, other, batch)
    assert same_tensors(model.state_dict(), resumed.state_dict())
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize(
    "hyper",
    [
        {"lr": -1e-5},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"betas": (0.9,)},
        {"betas": 0.9},
        {"eps": -1e-8},
        {"weight_decay": -0.1},
        {"weight_decay": float("inf")},
    ],
)
def test_bad_hyperparameters_are_refused_before_anything_observes(hyper):
    model = make_model()
    with pytest.raises(ValueError, match=rf"LoSiAAdamW: {next(iter(hyper))} must be .* got "):
        LoSiAAdamW(model, **hyper)
    assert all(layer.observe_callback is None for _, layer in losia_layers(model))


def test_parameters_in_the_place_of_the_model_are_refused():
    with pytest.raises(TypeError, match="expected the model, an nn.Module, got generator"):
        LoSiAAdamW(make_model().parameters())


@pytest.mark.parametrize("model", [nn.Linear(4, 4), nn.ModuleList([nn.ReLU()])])
def test_a_model_without_subnets_is_refused(model):
    with pytest.raises(ValueError, match="call apply_losia"):
        LoSiAAdamW(model)


def test_a_run_shorter_than_a_cycle_warns_once():
    model = make_model(period=5)
    with pytest.warns(
        UserWarning, match="9 steps are less than 2 slots of 5 steps: 1 of 2 .* a turn is 4"
    ) as caught:
        LoSiAAdamW(model, total_steps=9)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoSiAAdamW(model, total_steps=10)
        LoSiAAdamW(model)


def test_one_parameter_group_per_layer_group_and_one_for_the_rest():
    model = make_model(output_dim_factor=1.0, modules_to_save=["model.norm"])
    optimizer = LoSiAAdamW(model)
    assert optimizer.timeline.group_names == ["model.layers.0", "model.layers.1"]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2, 3]
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in trainable(model)
    }
