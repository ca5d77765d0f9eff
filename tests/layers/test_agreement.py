"""Weight and subnet are one thing in two tensors: what happens when something else writes one of
them, or both."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from losia_kernels import (
    LoSiAAdamW,
    LoSiALinear,
    apply_losia,
    attach,
    export_state_dict,
    remove_losia,
)
from losia_kernels.layers.module import losia_layers
from tests.tiny import make_batches, paper, same_tensors, take_step, tiny_lm


def make(tied: bool = False, dtype: torch.dtype = torch.float32, **options):
    return apply_losia(
        tiny_lm(tied=tied).to(dtype), paper(**{"rank_factor": 0.5, "period": 1} | options)
    )


def make_optimizer(kind: str, model, lr: float):
    if kind == "attach":
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
        attach(optimizer, model)
        return optimizer
    return LoSiAAdamW(model, lr=lr, in_backward=kind == "in_backward")


def weights(model) -> dict[str, torch.Tensor]:
    return {name: layer.weight.detach().clone() for name, layer in losia_layers(model)}


KINDS = pytest.mark.parametrize("kind", ["LoSiAAdamW", "in_backward", "attach"])


# the weight alone ---------------------------------------------------------------------------------


def test_a_models_own_initialisation_is_what_it_trains():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = LoSiALinear(16, 16, rank_factor=0.5)
            self.apply(self.init)

        def init(self, module):
            if isinstance(module, nn.Linear):
                nn.init.constant_(module.weight, 0.5)

    layer = Net().linear
    layer(torch.ones(2, 16)).sum().backward()
    assert torch.equal(layer.subnet, torch.full((8, 8), 0.5))
    layer.write_back_()
    assert torch.equal(layer.weight, torch.full((16, 16), 0.5))


@KINDS
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_an_edit_between_steps_stays(kind, steps):
    model, batches = make(), make_batches(steps + 1)
    optimizer = make_optimizer(kind, model, lr=0.01)
    for batch in batches[:steps]:
        take_step(model, optimizer, batch)
    layer = model.model.layers[1].up_proj
    with torch.no_grad():
        layer.weight.fill_(0.25)
    for group in optimizer.param_groups:
        group["lr"] = 1e-6
    take_step(model, optimizer, batches[-1])
    assert (layer.weight - 0.25).abs().max() < 1e-4


def test_an_edited_token_of_a_tied_embedding_stays():
    model, batches = make(tied=True, output_dim_factor=0.5), make_batches(2)
    optimizer = LoSiAAdamW(model, lr=1e-6)
    take_step(model, optimizer, batches[0])
    row = int(model.lm_head.out_idx[0])
    with torch.no_grad():
        model.model.embed_tokens.weight[row] = 7.0
    take_step(model, optimizer, batches[1])
    assert (model.model.embed_tokens.weight[row] - 7.0).abs().max() < 1e-4


def cast(model):
    return model.double()


def moved(model):
    return model.to("cpu")


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def chosen(model):
    for _, layer in losia_layers(model):
        layer.set_subnet_(layer.out_idx.flip(0).sort().values, layer.in_idx.clone())
    return model


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("then", [moved, cast, copy.deepcopy, pickled, chosen])
def test_an_edit_outlives_what_is_done_to_the_model(then, steps):
    model, batches = make(), make_batches(3)
    for batch in batches[:steps]:
        take_step(model, LoSiAAdamW(model, lr=0.01), batch)
    with torch.no_grad():
        model.model.layers[1].up_proj.weight.fill_(0.25)
    model = then(model)
    take_step(model, LoSiAAdamW(model, lr=1e-6), batches[2])
    assert (model.model.layers[1].up_proj.weight - 0.25).abs().max() < 1e-4


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.data.fill_(0.25),
        lambda layer: setattr(layer.weight, "data", torch.full_like(layer.weight, 0.25)),
        lambda layer: setattr(
            layer, "weight", nn.Parameter(torch.full_like(layer.weight, 0.25), requires_grad=False)
        ),
    ],
)
def test_before_the_first_step_any_way_of_writing_counts(write):
    model = make()
    layer, optimizer = model.model.layers[1].up_proj, LoSiAAdamW(model, lr=1e-6)
    write(layer)
    take_step(model, optimizer, make_batches(1)[0])
    assert (layer.weight - 0.25).abs().max() < 1e-4


@KINDS
def test_an_edit_between_backward_and_step_stays(kind):
    model, batches = make(period=100), make_batches(2)
    # which observes
    optimizer, layer = (
        make_optimizer(kind, model, lr=1e-6),
        model.model.layers[0].up_proj,
    )
    for batch in batches:
        model(**batch).loss.backward()
        with torch.no_grad():
            layer.weight.fill_(0.25)
        optimizer.step()
        optimizer.zero_grad()
        assert (layer.weight - 0.25).abs().max() < 1e-4


def test_weights_that_stand_in_for_a_while_stay_out():
    model, (batch,) = make(), make_batches(1)
    optimizer = LoSiAAdamW(model, lr=0.0)
    take_step(model, optimizer, batch)
    before = weights(model)
    noisy = {f"{name}.weight": weight + 0.1 for name, weight in before.items()}
    torch.func.functional_call(model, noisy, kwargs=batch).loss.backward()
    optimizer.step()
    assert same_tensors(weights(model), before)


@KINDS
def test_training_compares_no_values(kind, monkeypatch):
    """For on a GPU each comparison waits for it."""
    model = make(output_dim_factor=0.5)
    optimizer = make_optimizer(kind, model, lr=0.01)
    first, *batches = make_batches(6)
    take_step(model, optimizer, first)
    monkeypatch.setattr(LoSiALinear, "_agree", lambda *args: pytest.fail("values were compared"))
    for batch in batches:
        take_step(model, optimizer, batch)


# averages -----------------------------------------------------------------------------------------


@KINDS
def test_an_averaged_model_is_the_average_of_the_weights(kind):
    model = make()
    optimizer = make_optimizer(kind, model, lr=0.1)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    expected = weights(model)
    for number, batch in enumerate(make_batches(6)):
        take_step(model, optimizer, batch)
        averaged.update_parameters(model)
        share = 1.0 if number == 0 else 0.5  # the first one is copied
        expected = {
            name: (1 - share) * expected[name] + share * now for name, now in weights(model).items()
        }
    exported = export_state_dict(averaged.module)
    plain = remove_losia(averaged.module).state_dict()
    assert same_tensors(plain, exported)
    for name, weight in expected.items():
        torch.testing.assert_close(plain[f"{name}.weight"], weight)


def test_of_averaged_checkpoints_the_weights_are_trained_on():
    model, saved = make(), []
    optimizer = LoSiAAdamW(model, lr=0.1)
    for batch in make_batches(6):
        take_step(model, optimizer, batch)
        saved.append(copy.deepcopy(model.state_dict()))
    mean = {
        key: (
            torch.stack([state[key] for state in saved]).mean(0)
            if value.is_floating_point()
            else value
        )
        for key, value in saved[-1].items()
    }
    fresh = make()
    fresh.load_state_dict(mean)
    before = weights(fresh)
    take_step(fresh, LoSiAAdamW(fresh, lr=0.0), make_batches(1)[0])
    assert same_tensors(weights(fresh), before)
    assert all(torch.equal(before[name], mean[f"{name}.weight"]) for name in before)


def test_an_averaged_model_is_trained_on():
    model = make()
    optimizer = LoSiAAdamW(model, lr=0.1)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for batch in make_batches(6):
        take_step(model, optimizer, batch)
        averaged.update_parameters(model)
    with torch.no_grad():
        for parameter, mean in zip(model.parameters(), averaged.module.parameters(), strict=True):
            parameter.copy_(mean)
    for trained in (model, averaged.module, copy.deepcopy(averaged.module).double()):
        before = weights(trained)
        take_step(trained, LoSiAAdamW(trained, lr=0.0), make_batches(1)[0])
        assert same_tensors(weights(trained), before)


def one_tensor_each(state):
    return [{key: value} for key, value in state.items()]


def parameters_first(state):
    last = {key for key in state if key.endswith("_idx")}
    return [
        {key: state[key] for key in state if key not in last},
        {key: state[key] for key in last},
    ]


def subnets_first(state):
    first = {key for key in state if key.endswith(("_idx", "subnet"))}
    return [
        {key: state[key] for key in first},
        {key: state[key] for key in state if key not in first},
    ]


@pytest.mark.parametrize("order", [list, reversed])
@pytest.mark.parametrize("cut", [one_tensor_each, parameters_first, subnets_first])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_in_parts_keeps_its_bits(cut, order, dtype):
    model, fresh = make(dtype=dtype), make(dtype=dtype, seed=7)
    optimizer = LoSiAAdamW(model, lr=0.01)
    for batch in make_batches(4):
        take_step(model, optimizer, batch)
    for part in order(cut(model.state_dict())):
        fresh.load_state_dict(part, strict=False)
    export_state_dict(fresh)  # a use
    assert same_tensors(fresh.state_dict(), model.state_dict())


def test_an_averaged_checkpoint_of_a_tied_model_without_the_heads_key():
    options = {"tied": True, "output_dim_factor": 0.5}
    model, fresh = make(**options), make(**options)
    optimizer, saved = LoSiAAdamW(model, lr=0.1), []
    for batch in make_batches(6):
        take_step(model, optimizer, batch)
        saved.append(copy.deepcopy(model.state_dict()))
    mean = {
        key: (
            torch.stack([state[key] for state in saved]).mean(0)
            if value.is_floating_point()
            else value
        )
        for key, value in saved[-1].items()
        if key != "lm_head.weight"
    }
    fresh.load_state_dict(mean, strict=False)
    take_step(fresh, LoSiAAdamW(fresh, lr=0.0), make_batches(1)[0])
    assert torch.equal(fresh.lm_head.weight, mean["model.embed_tokens.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("master", ["float32", "none"])
def test_a_checkpoint_keeps_its_bits(dtype, master):
    model, fresh = (make(dtype=dtype, master=master) for _ in range(2))
    optimizer = LoSiAAdamW(model, lr=0.01)
    for batch in make_batches(3):
        take_step(model, optimizer, batch)
    fresh.load_state_dict(model.state_dict())
    assert same_tensors(fresh.state_dict(), model.state_dict())


# the subnet alone ---------------------------------------------------------------------------------


def test_subnets_without_weights_are_loaded_into_the_weights():
    model, fresh = make(period=100), make(period=100)
    take_step(model, LoSiAAdamW(model, lr=0.1), make_batches(1)[0])
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert not same_tensors(weights(fresh), weights(model))
    fresh.load_state_dict(trained, strict=False)
    with torch.no_grad():
        fresh(**make_batches(1)[0])
    assert same_tensors(weights(fresh), weights(model))


@pytest.mark.parametrize("finish", [lambda m: remove_losia(m).state_dict(), export_state_dict])
def test_the_last_step_of_an_optimizer_that_knows_no_weights_is_kept(finish):
    layer = LoSiALinear(6, 4, rank_factor=0.5)
    with torch.no_grad():
        layer.subnet.fill_(3.0)
    for model in (copy.deepcopy(nn.Sequential(layer)), nn.Sequential(layer)):
        assert int((finish(model)["0.weight"] == 3.0).sum()) == 6


# dtypes -------------------------------------------------------------------------------------------


def test_a_cast_to_what_it_is_changes_no_bit():
    model = make(dtype=torch.bfloat16)
    take_step(model, LoSiAAdamW(model, lr=1e-4), make_batches(1)[0])
    before = copy.deepcopy(model.state_dict())
    assert same_tensors(model.to(torch.bfloat16).state_dict(), before)


def test_a_wider_weight_takes_what_the_master_has_collected():
    model = make(dtype=torch.bfloat16)
    take_step(model, LoSiAAdamW(model, lr=1e-4), make_batches(1)[0])
    layer = model.model.layers[1].up_proj  # has not moved, which would have rounded it
    master = layer.subnet.detach().clone()
    model.float()
    assert torch.equal(layer.subnet, master) and torch.equal(
        layer.current_subnet.gather(layer.weight), master
    )
    assert not torch.equal(master, master.bfloat16().float())


def by_load(model, state):
    model.load_state_dict(state)


def by_copying_data(model, state):
    model.model.embed_tokens.weight.data.copy_(state["model.embed_tokens.weight"])


def by_exchanging_data(model, state):
    model.model.embed_tokens.weight.data = state["model.embed_tokens.weight"].clone()


@pytest.mark.parametrize("write", [by_load, by_copying_data, by_exchanging_data])
def test_a_dense_parameter_that_was_written_is_not_taken_back(write):
    """16-bit parameters have a float32 copy in the optimizer's state."""
    model, batches = make(dtype=torch.bfloat16, modules_to_save=["embed_tokens"]), make_batches(5)
    optimizer, best = LoSiAAdamW(model, lr=0.1), copy.deepcopy(model.state_dict())
    for batch in batches[:4]:
        take_step(model, optimizer, batch)
    write(model, best)
    for group in optimizer.param_groups:
        group["lr"] = 1e-7
    take_step(model, optimizer, batches[4])
    embedding = model.model.embed_tokens.weight
    assert (embedding.float() - best["model.embed_tokens.weight"].float()).abs().max() < 1e-3
