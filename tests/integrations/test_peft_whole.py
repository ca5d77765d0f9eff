"""All of an adapter or nothing: merges that cannot be, files that lack something, and loaders that
pass the weights by."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.integrations.paper_adapter import paper_adapter
from tests.integrations.test_peft import assert_equal, llama, train, weights

pytest.importorskip("peft")

from peft import PeftModel, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

FILE = "adapter_model.safetensors"


def adapted(period: int = 2, steps: int = 5, targets="all-linear"):
    config = paper_adapter(rank_factor=0.25, period=period, target_modules=targets)
    model = get_peft_model(llama(), config)
    train(model, steps)
    return model


@pytest.fixture
def overlapping():
    """Two adapters, of which q_proj has one, v_proj the other, and up_proj both."""
    model = adapted(targets=["q_proj", "up_proj"])
    config = paper_adapter(rank_factor=0.25, target_modules=["up_proj", "v_proj"], seed=3)
    model.add_adapter("second", config)
    model.set_adapter("second")
    train(model, 2)
    return model


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_a_merge_that_is_refused_leaves_the_base_within_reach(overlapping, merge):
    before = weights(overlapping)
    with pytest.raises(ValueError, match=r"up_proj: .*default and second cannot be .* merged"):
        getattr(overlapping, merge)(adapter_names=["default", "second"])
    assert_equal(weights(overlapping), before)
    assert_equal(weights(overlapping.unload()), weights(llama()))


def test_values_that_are_not_finite_are_found_before_any_layer_is_merged():
    model = adapted()
    last = [layer for layer in model.modules() if hasattr(layer, "losia_adapter")][-1]
    with torch.no_grad():
        last.losia_adapter["default"].subnet[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    assert_equal(weights(model.unload()), weights(llama()))


@pytest.mark.parametrize(
    "key", ["subnet", "out_idx", "in_idx", "block_out_idx", "block_in_idx", "block_values"]
)
def test_a_file_without_one_key_is_refused_by_its_name(tmp_path, key):
    adapted().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    (lost,) = [
        name for name in tensors if name.endswith(f"layers.1.mlp.up_proj.losia_adapter.{key}")
    ]
    save_file({name: t for name, t in tensors.items() if name != lost}, tmp_path / FILE)
    base = llama()
    with pytest.raises(
        ValueError, match=rf"layers\.1\.mlp\.up_proj: .*incomplete.*\.{key}; nothing"
    ):
        PeftModel.from_pretrained(base, tmp_path)
    loaded = {k.replace("base_layer.", ""): v for k, v in base.state_dict().items()}
    for name, value in llama().state_dict().items():
        assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize("period", [2, 100], ids=["moved", "never moved"])
@pytest.mark.parametrize("way", ["load_adapter", "from_pretrained"])
def test_what_passes_the_weights_by_is_refused_with_the_way_that_works(tmp_path, period, way):
    """It would be the base model, without a word."""
    llama().save_pretrained(tmp_path / "base")
    model = adapted(period)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"tensor by tensor.*PeftModel\.from_pretrained"):
        if way == "load_adapter":
            llama().load_adapter(str(tmp_path / "adapter"))
        else:
            AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert_equal(weights(loaded), weights(model))
