"""LoSiA as a PEFT method: adapters that go into the weights and out of them, bit for bit; what is
saved; what fails."""

import dataclasses

import pytest
import torch
from torch import nn

from tests.integrations.paper_adapter import paper_adapter
from tests.integrations.tiny_llama import make_model

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, PeftType, get_peft_model  # noqa: E402
from peft.utils.save_and_load import get_base_model_state_dict, set_base_model_state_dict  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

from losia_kernels import LoSiAAdamW, LoSiAConfig, apply_losia
from losia_kernels.integrations.peft import LoSiAPeftConfig

CHOICES = dict(rank_factor=1 / 4, period=2, output_dim_factor=0.125)
IDS = torch.arange(24).reshape(2, 12) * 7 % 256


def llama(dtype=torch.float32):
    return make_model().to(dtype)


def untied():
    return make_model(tie_word_embeddings=False)


def gpt2(dtype=torch.float32):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).to(dtype).eval()


def train(model, steps=7, lr=1e-2):
    """Four groups of two steps each: most have moved, and moved blocks overlap."""
    optimizer = LoSiAAdamW(model, lr=lr)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def trained(make=llama, seed=0, adapter="default", **changes):
    return train(
        get_peft_model(make(), paper_adapter(**{**CHOICES, "seed": seed, **changes}), adapter)
    )


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def layer_of(model):
    return model.base_model.model.model.layers[0].mlp.up_proj


def weights(model):
    """The linears' weights by their names in the plain model."""
    plain = model.base_model.model if isinstance(model, PeftModel) else model
    return {
        name.replace(".base_layer", ""): value.detach().clone()
        for name, value in plain.named_parameters()
        if "losia_" not in name
    }


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert value.dtype == two[name].dtype and torch.equal(value, two[name]), name


def test_the_method_is_registered_beside_pefts_own():
    assert "LOSIA" not in list(PeftType)
    assert paper_adapter().peft_type == "LOSIA"


# in and out of the weights ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, gpt2], ids=["tied", "conv1d"])
def test_disabled_it_is_the_base_and_enabled_what_was_trained(make, dtype):
    model = trained(lambda: make(dtype))
    base, before = make(dtype), weights(model)
    assert not torch.equal(logits(model), logits(base))
    after = logits(model)
    with model.disable_adapter():
        assert_equal(weights(model), weights(base))
        assert torch.equal(logits(model), logits(base))
    assert_equal(weights(model), before)
    assert torch.equal(logits(model), after)


def test_training_goes_on_after_a_look_at_the_base():
    model, other = (get_peft_model(llama(), paper_adapter(**CHOICES)) for _ in range(2))
    for each in (model, other):
        train(each, 3)
    with model.disable_adapter():
        logits(model)
    assert_equal(weights(train(model, 3)), weights(train(other, 3)))


def test_a_reference_forward_may_come_between_forward_and_backward():
    """As in preference training. A backward with the other weights than its forward's is an error,
    never wrong."""
    model = get_peft_model(llama(), paper_adapter(**CHOICES, init_weights=False))
    subnet = layer_of(model).losia_adapter["default"].subnet

    def gradient(between):
        loss = model(input_ids=IDS, labels=IDS).loss
        between()
        loss.backward()
        grad, subnet.grad = subnet.grad, None
        return grad

    def look_at_the_base():
        with model.disable_adapter():
            logits(model)

    assert torch.equal(gradient(lambda: None), gradient(look_at_the_base))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(model.base_model.disable_adapter_layers)
    embedded = torch.randn(2, 12, 32, requires_grad=True)
    of_the_base = model(inputs_embeds=embedded, labels=IDS).loss
    model.base_model.enable_adapter_layers()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        of_the_base.backward()


def test_merged_it_is_a_plain_model_with_the_trained_values():
    model = trained()
    values, after = weights(model), logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), after)
    model.unmerge_adapter()
    assert_equal(weights(model), values)
    merged = model.merge_and_unload(safe_merge=True)
    assert (
        type(merged) is type(llama()) and merged.state_dict().keys() == llama().state_dict().keys()
    )
    assert_equal(weights(merged), values)


def test_unloaded_it_is_the_base():
    base = trained().unload()
    assert_equal(weights(base), weights(llama()))
    assert base.state_dict().keys() == llama().state_dict().keys()


def test_safe_merge_finds_values_that_are_not_finite():
    model = trained()
    with torch.no_grad():
        layer_of(model).losia_adapter["default"].subnet[0, 0] = torch.nan
    with pytest.raises(
        ValueError, match="NaNs detected in the merged weights. The adapter default"
    ):
        model.merge_and_unload(safe_merge=True)


# what is kept -------------------------------------------------------------------------------------


def test_no_more_is_kept_than_the_weight():
    model = get_peft_model(llama(), paper_adapter(rank_factor=0.5, period=1))
    train(model, 12)  # up to six moves of a quarter each
    for layer in (layer_of(model), model.base_model.model.model.layers[1].self_attn.q_proj):
        adapter = layer.losia_adapter["default"]
        assert adapter.block_values.shape == (1, *adapter.weight.shape)
    after = weights(model)
    with model.disable_adapter():
        assert_equal(weights(model), weights(llama()))
    assert_equal(weights(model), after)


def test_places_that_were_never_trained_are_not_kept():
    adapter = layer_of(get_peft_model(llama(), paper_adapter(**CHOICES))).losia_adapter["default"]
    k_out, k_in = adapter.subnet.shape
    for start in range(3):  # as calibration does, before the first step
        adapter.set_subnet_(torch.arange(start, start + k_out), torch.arange(start, start + k_in))
    assert adapter.block_out_idx.tolist() == [list(range(2, 2 + k_out))]
    with torch.no_grad():
        adapter.subnet += 1
    adapter.set_subnet_(torch.arange(k_out), torch.arange(k_in))
    assert len(adapter.block_values) == 2


def test_16_bit_models_keep_16_bit_values_and_float32_masters():
    model = trained(lambda: llama(torch.bfloat16))
    adapter = layer_of(model).losia_adapter["default"]
    assert (adapter.block_values.dtype, adapter.subnet.dtype) == (torch.bfloat16, torch.float32)
    assert layer_of(model.to(torch.float16)).losia_adapter["default"].subnet.dtype == torch.float32


# what is saved ------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("make", [llama, gpt2], ids=["tied", "conv1d"])
def test_saved_and_loaded_it_is_the_same_bit_for_bit(tmp_path, make, low_cpu_mem_usage):
    model = trained(lambda: make(torch.bfloat16))
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = PeftModel.from_pretrained(
        make(torch.bfloat16), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert_equal(weights(loaded), weights(model))
    assert torch.equal(logits(loaded), logits(model))
    one, two = model.state_dict(), loaded.state_dict()
    assert_equal(
        {k: v for k, v in one.items() if "losia_" in k},
        {k: v for k, v in two.items() if "losia_" in k},
    )
    with loaded.disable_adapter():
        assert_equal(weights(loaded), weights(make(torch.bfloat16)))
    assert_equal(weights(loaded.merge_and_unload()), weights(model))


def test_it_is_saved_alike_whether_it_is_in_the_weights_or_not(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path / "in")
    with model.disable_adapter():
        model.save_pretrained(tmp_path / "out")
    files = [load_file(tmp_path / each / "adapter_model.safetensors") for each in ("in", "out")]
    assert_equal(*files)
    assert not any("base_layer" in name for name in files[0])


def test_the_config_comes_back(tmp_path):
    config = paper_adapter(
        **CHOICES,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"q_proj": 0.5},
        modules_to_save=["norm"],
        exclude_modules=["gate_proj"],
        update_type="sync",
        importance="marginal",
        rewarm=False,
        warmup_steps=5,
    )
    get_peft_model(llama(), config).save_pretrained(tmp_path)
    loaded = LoSiAPeftConfig.from_pretrained(tmp_path)
    assert loaded.losia_config() == config.losia_config()
    assert loaded.losia_config().target_modules == ["q_proj", "up_proj"]


@pytest.mark.parametrize("assign", [False, True])
def test_a_whole_state_dict_restores_the_adapter_and_leaves_the_base(assign):
    model = trained(untied)
    fresh = get_peft_model(untied(), paper_adapter(**CHOICES, init_weights=False))
    fresh.load_state_dict(model.state_dict(), assign=assign)
    assert_equal(weights(fresh), weights(model))
    with fresh.disable_adapter():
        assert_equal(weights(fresh), weights(untied()))


def test_the_base_is_given_and_taken_while_the_adapter_is_disabled():
    model, base = trained(), llama().state_dict()
    with model.disable_adapter():
        assert_equal(get_base_model_state_dict(model), base)
    other = {name: value + 1 for name, value in base.items()}
    set_base_model_state_dict(model, other)
    weight = weights(model)["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(
        layer_of(model).losia_adapter["default"].trained_values(), _values(layer_of(trained()))
    )
    assert not torch.equal(weight, other["model.layers.0.mlp.up_proj.weight"])
    with model.disable_adapter():
        assert_equal(get_base_model_state_dict(model), other)


def _values(layer: nn.Module) -> torch.Tensor:
    return layer.losia_adapter["default"].trained_values()


def test_the_config_has_losias_fields_and_defaults():
    """PEFT saves what its own dataclass lists, so the fields stand twice; these two are PEFT's to
    decide."""
    usual = dataclasses.replace(LoSiAConfig(), fused_loss=False)
    assert LoSiAPeftConfig().losia_config() == usual
    listed = {field.name for field in dataclasses.fields(LoSiAPeftConfig)}
    assert {field.name for field in dataclasses.fields(LoSiAConfig)} - listed == {
        "master",
        "fused_loss",
    }


def test_apply_losia_to_a_model_with_adapters_is_refused():
    model = get_peft_model(llama(), LoraConfig(target_modules=["v_proj"]))
    with pytest.raises(ValueError, match="v_proj' holds a PEFT adapter: give the plain model"):
        apply_losia(model)
