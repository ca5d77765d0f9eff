"""Which layers a LoSiA adapter takes, several adapters in one model, and what is refused."""

import contextlib
import re

import pytest
import torch
from torch import nn

from tests.integrations.paper_adapter import paper_adapter
from tests.integrations.test_peft import (
    CHOICES,
    IDS,
    assert_equal,
    layer_of,
    llama,
    logits,
    train,
    trained,
    untied,
    weights,
)
from tests.integrations.tiny_llama import make_model

pytest.importorskip("peft")

from peft import PeftModel, get_peft_model  # noqa: E402

from losia_kernels import LoSiAAdamW, LoSiALinear
from losia_kernels.layers.module import losia_layers


def adapted(model):
    """Names of the adapted linears in the plain model, with the shapes of their subnets."""
    found = {name: tuple(layer.subnet.shape) for name, layer in losia_layers(model)}
    return {
        re.sub(r"base_model\.model\.(.*)\.losia_adapter\.\w+", r"\1", name): k
        for name, k in found.items()
    }


# which layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (
            "all-linear",
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        ),
        (None, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        (["q_proj", "mlp.up_proj"], ["q_proj", "up_proj"]),
        (r".*\.(k|gate)_proj", ["k_proj", "gate_proj"]),
    ],
)
@pytest.mark.parametrize("output_dim_factor", [0.0, 0.125])
def test_targets(targets, expected, output_dim_factor):
    config = paper_adapter(target_modules=targets, output_dim_factor=output_dim_factor)
    found = adapted(get_peft_model(untied(), config))
    head = {"lm_head": (int(261 * 0.125), 32)} if output_dim_factor else {}
    assert {name: found.pop(name) for name in head} == head
    assert {name.rpartition(".")[2] for name in found} == set(expected)
    assert len(found) == 2 * len(expected)


def test_excluded_modules_and_rank_pattern():
    config = paper_adapter(
        exclude_modules=["o_proj"], rank_factor=0.25, rank_pattern={r"layers\.1\..*up_proj": 0.5}
    )
    found = adapted(get_peft_model(llama(), config))
    assert not any("o_proj" in name for name in found)
    assert found["model.layers.0.mlp.up_proj"] == (12, 8)
    assert found["model.layers.1.mlp.up_proj"] == (24, 16)


def test_a_dense_output_layer():
    model = get_peft_model(untied(), paper_adapter(output_dim_factor=1.0, rank_factor=0.25))
    optimizer = LoSiAAdamW(model, lr=1e-2)
    assert [layer.name for layer in optimizer.timeline.dense] == ["lm_head"]
    train(model)
    with model.disable_adapter():
        assert_equal(weights(model), weights(untied()))


def test_modules_to_save_are_trained_saved_and_loaded(tmp_path):
    model = trained(untied, modules_to_save=["embed_tokens"])
    assert "model.embed_tokens" not in adapted(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(untied(), tmp_path)
    saved = model.base_model.model.model.embed_tokens.modules_to_save["default"].weight
    assert torch.equal(
        loaded.base_model.model.model.embed_tokens.modules_to_save["default"].weight, saved
    )
    assert not torch.equal(saved, untied().model.embed_tokens.weight)
    assert torch.equal(logits(loaded), logits(model))


def test_it_counts_the_subnets_as_trainable(capsys):
    model = get_peft_model(llama(), paper_adapter(rank_factor=0.25))
    subnets = sum(k_out * k_in for k_out, k_in in adapted(model).values())
    base = sum(parameter.numel() for parameter in llama().parameters())
    assert model.get_nb_trainable_parameters() == (subnets, base + subnets)
    model.print_trainable_parameters()
    assert (
        f"trainable params: {subnets:,} || all params: {base + subnets:,}"
        in capsys.readouterr().out
    )


# several adapters ---------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    """Two adapters trained apart, saved, and loaded into one model; and the weights of each."""
    expected = {}
    for seed, name in enumerate(("first", "second")):
        model = trained(seed=seed)
        expected[name] = weights(model)
        model.save_pretrained(tmp_path / name)
    assert not torch.equal(
        *(each["model.layers.0.mlp.up_proj.weight"] for each in expected.values())
    )
    both = PeftModel.from_pretrained(llama(), tmp_path / "first", adapter_name="first")
    both.load_adapter(tmp_path / "second", adapter_name="second")
    return both, expected


def test_switching_exchanges_the_values(two, tmp_path):
    model, expected = two
    for name in ("first", "second", "first", "second"):
        model.set_adapter(name)
        assert_equal(weights(model), expected[name])
        with model.disable_adapter():
            assert_equal(weights(model), weights(llama()))
    model.save_pretrained(tmp_path / "again")
    for name in ("first", "second"):
        again = PeftModel.from_pretrained(llama(), tmp_path / "again" / name, adapter_name=name)
        assert_equal(weights(again), expected[name])


def test_an_adapter_that_is_not_active_can_be_merged(two):
    model, expected = two
    assert_equal(weights(model.merge_and_unload(adapter_names=["second"])), expected["second"])


def test_deleting_the_active_adapter_leaves_the_other(two):
    model, expected = two
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("first")
    assert_equal(weights(model), expected["second"])
    model.delete_adapter("second")
    assert_equal(weights(model), weights(llama()))


def test_two_adapters_of_one_layer_cannot_act_at_once(two):
    model, expected = two
    message = "do not add up: first and second cannot be active or merged at once"
    with pytest.raises(ValueError, match=message):
        model.base_model.set_adapter(["first", "second"])
    with pytest.raises(ValueError, match=message):
        model.merge_adapter(["first", "second"])
    assert model.active_adapters == ["first"] and not layer_of(model).merged
    model.merge_adapter(["first"])
    with (
        pytest.raises(ValueError, match=message),
        pytest.warns(UserWarning, match="additionally merging second"),
    ):
        model.merge_adapter(["second"])
    assert_equal(weights(model), expected["first"])


def test_a_refused_choice_of_adapters_changes_nothing():
    model = get_peft_model(
        llama(), paper_adapter(target_modules=["up_proj"], init_weights=False), "first"
    )
    model.add_adapter(
        "second", paper_adapter(target_modules=["q_proj", "up_proj"], init_weights=False)
    )
    before = weights(model)
    with pytest.raises(ValueError, match="up_proj: .* first and second cannot be active"):
        model.base_model.set_adapter(["first", "second"])  # q_proj alone, which comes first, could
    assert_equal(weights(model), before)


def test_adapters_of_different_layers_act_together():
    model = get_peft_model(
        llama(), paper_adapter(target_modules=["up_proj"], init_weights=False), "first"
    )
    model.add_adapter("second", paper_adapter(target_modules=["q_proj"], init_weights=False))
    model.base_model.set_adapter(["first", "second"])
    values, base = weights(model), weights(llama())
    changed = {name.split(".")[-2] for name in values if not torch.equal(values[name], base[name])}
    assert changed == {"up_proj", "q_proj"}
    assert_equal(weights(model.merge_and_unload()), values)


def test_one_batch_cannot_mix_adapters(two):
    model, _ = two
    with pytest.raises(ValueError, match="one batch cannot mix adapters"):
        model(input_ids=IDS, adapter_names=["first", "second"])


# what is refused ----------------------------------------------------------------------------------


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight


@pytest.mark.parametrize(
    ("make", "choices", "message"),
    [
        (llama, {"target_modules": ["embed_tokens"]}, "matches 'model.embed_tokens', a Embedding"),
        (
            llama,
            {"target_modules": ["up_proj", "lm_head"]},
            "'lm_head', the output layer, .*output_dim_factor",
        ),
        (
            llama,
            {"rank_pattern": {"down_proj": 0.01}},
            "down_proj: a rank factor of 0.01 selects none of 32 neurons",
        ),
        (Shared, {"target_modules": ["one", "two"]}, "'one' and 'two' share one weight"),
        (
            lambda: nn.Sequential(nn.Linear(8, 8)),
            {"output_dim_factor": 0.5},
            "needs an nn.Linear output layer",
        ),
        (
            lambda: make_model().to(torch.float8_e4m3fn),
            {},
            "is quantized: a Linear with a torch.float8_e4m3fn weight",
        ),
    ],
)
def test_a_target_that_cannot_be_trained_is_refused_and_nothing_has_changed(make, choices, message):
    model = make()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, paper_adapter(**choices))
    assert [type(module) for module in model.modules()] == kinds
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("choices", [{"rank_factor": 2}, {"period": 0}, {"update_type": "both"}])
def test_a_config_out_of_range_is_refused(choices):
    with pytest.raises(ValueError, match=f"LoSiAConfig.{next(iter(choices))} must be"):
        paper_adapter(**choices)


def test_a_disabled_adapter_cannot_move():
    model = get_peft_model(llama(), paper_adapter(**CHOICES))
    adapter = layer_of(model).losia_adapter["default"]
    with (
        model.disable_adapter(),
        pytest.raises(RuntimeError, match="up_proj: a subnet can only move while"),
    ):
        adapter.set_subnet_(adapter.out_idx.clone(), adapter.in_idx.clone())


def test_blocks_that_do_not_fit_are_refused():
    model, name = trained(), "base_model.model.model.layers.0.mlp.up_proj.losia_adapter.default"
    state = {key: value.clone() for key, value in model.state_dict().items() if name in key}
    before = weights(model)
    for key, change, message in [
        ("block_out_idx", lambda idx: idx + 1000, "out_idx must be in"),
        ("block_values", lambda values: values[:, 1:], "blocks do not agree"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.load_state_dict(
                {**state, f"{name}.{key}": change(state[f"{name}.{key}"])}, strict=False
            )
        model.set_adapter("default")
        assert_equal(weights(model), before)


# what else writes or switches while it trains -----------------------------------------------------


def test_an_edit_of_the_weight_is_trained_on_and_evaluation_writes_nothing():
    model = get_peft_model(llama(), paper_adapter(rank_factor=0.25, period=100))
    optimizer = LoSiAAdamW(model, lr=1e-6)
    weight = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").base_layer.weight
    for _ in range(2):
        with torch.no_grad():
            weight.fill_(0.25)
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert (weight - 0.25).abs().max() < 1e-4
    version = weight._version
    with torch.no_grad():
        model(input_ids=IDS)
    assert weight._version == version


@pytest.mark.parametrize("switch", ["disable", "other"])
def test_a_step_while_the_adapter_is_out_is_refused_and_the_base_stays(switch):
    model = get_peft_model(llama(), paper_adapter(rank_factor=0.25))
    model.add_adapter("other", paper_adapter(rank_factor=0.25))
    optimizer, base = LoSiAAdamW(model, lr=0.1), weights(llama())
    model(input_ids=IDS, labels=IDS).loss.backward()
    with contextlib.ExitStack() as stack:
        if switch == "disable":
            stack.enter_context(model.disable_adapter())
        else:
            model.set_adapter("other")
        with pytest.raises(
            RuntimeError, match="has a gradient, but its adapter is not in the weight"
        ):
            optimizer.step()
    assert_equal(weights(model.unload()), base)


def test_a_reference_forward_makes_no_comparisons(monkeypatch):
    """Each waits for the GPU."""
    model = get_peft_model(llama(), paper_adapter(rank_factor=0.25, period=100))
    optimizer = LoSiAAdamW(model, lr=1e-3)
    for step in range(3):
        if step == 1:
            monkeypatch.setattr(
                LoSiALinear, "_agree", lambda *args: pytest.fail("values were compared")
            )
        with torch.no_grad(), model.disable_adapter():
            model(input_ids=IDS)
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_an_adapter_that_trl_would_copy_is_warned_of():
    model = get_peft_model(llama(), paper_adapter(rank_factor=0.25))
    with pytest.warns(UserWarning, match="an adapter named 'ref' beside another: TRL's trainers"):
        model.add_adapter("ref", paper_adapter(rank_factor=0.25))
