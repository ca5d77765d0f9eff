"""A model that other code changes after its conversion: refused by name when the optimizer is made
or at the first step, or told at the end of the slot; never trained as if nothing were."""

import ast
import copy
import re
import warnings
from dataclasses import replace as replace_field

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from losia_kernels import LoSiAAdamW, apply_losia, attach, remove_losia
from losia_kernels.layers.module import losia_layers
from tests.integrations.tiny_llama import make_model
from tests.tiny import make_batches, paper, take_step, tiny_lm

CONFIG = paper(rank_factor=0.5, period=1, output_dim_factor=0.5)
IDS = torch.arange(12).view(2, 6)


def adamw(model):
    return LoSiAAdamW(model, lr=0.01)


def attached(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    attach(optimizer, model)
    return optimizer


OPTIMIZERS = pytest.mark.parametrize("make_optimizer", [adamw, attached])


def up_proj(model) -> nn.Module:
    return model.model.layers[0].up_proj


def replace(model):
    model.model.layers[0].up_proj = nn.Linear(8, 12, bias=False)


def replace_head(model):
    model.lm_head = nn.Linear(8, 13, bias=False)


def widen(model):
    weight = up_proj(model).weight
    up_proj(model).weight = nn.Parameter(torch.cat([weight, weight]), requires_grad=False)


def share(model):
    first, second = model.model.layers
    second.up_proj.weight = first.up_proj.weight


def offload(model):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, execution_device="cpu")


COMPUTED = {
    "spectral_norm": lambda model: parametrizations.spectral_norm(up_proj(model)),
    "weight_norm": lambda model: parametrizations.weight_norm(up_proj(model)),
    "old spectral_norm": lambda model: old_spectral_norm(up_proj(model)),
    "pruning": lambda model: prune.random_unstructured(up_proj(model), "weight", 0.5),
}
CHANGES = {
    "replaced": (replace, "layers.0.up_proj: apply_losia gave it a subnet, but a plain Linear has"),
    "head replaced": (replace_head, "lm_head: apply_losia gave it a subnet, but a plain Linear"),
    "another shape": (widen, r"layers.0.up_proj: its weight is \(24, 8\), .* made for \(12, 8\)"),
    "shared": (share, "layers.0.up_proj' and 'model.layers.1.up_proj' share one weight"),
    "offloaded": (offload, "layers.0.up_proj: its weight is offloaded"),
    **{
        name: (change, "layers.0.up_proj: its weight is computed")
        for name, change in COMPUTED.items()
    },
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES.keys())
@OPTIMIZERS
def test_a_change_before_the_optimizer_is_refused_when_that_is_made(
    make_optimizer, change, message
):
    model = apply_losia(tiny_lm(), CONFIG)
    change(model)
    with pytest.raises(ValueError, match=message):
        make_optimizer(model)


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "offloaded"])
@OPTIMIZERS
def test_a_change_after_it_is_refused_at_the_first_step(make_optimizer, name):
    change, message = CHANGES[name]
    model = apply_losia(tiny_lm(), CONFIG)
    optimizer = make_optimizer(model)
    change(model)
    if name == "another shape":
        x = torch.ones(1, 8)
        up_proj(model)(x).sum().backward()
    else:
        model(**make_batches(1)[0]).loss.backward()
    with pytest.raises(ValueError, match=message):
        optimizer.step()


@OPTIMIZERS
@pytest.mark.parametrize("moves", ["importance", "random"])
def test_a_layer_that_goes_later_is_told_at_the_end_of_its_slot(make_optimizer, moves):
    model = apply_losia(tiny_lm(), replace_field(CONFIG, moves=moves))
    optimizer = make_optimizer(model)
    first, *batches = make_batches(3)
    take_step(model, optimizer, first)
    replace(model)
    with pytest.warns(UserWarning, match="layers.0.up_proj: .* a plain Linear has taken its place"):
        for batch in batches:
            take_step(model, optimizer, batch)


@OPTIMIZERS
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("moves", ["importance", "random"])
def test_layers_that_are_frozen_later_are_told(make_optimizer, steps, moves):
    model = apply_losia(tiny_lm(), replace_field(CONFIG, moves=moves))
    optimizer = make_optimizer(model)
    batches = make_batches(4)
    for batch in batches[:steps]:
        take_step(model, optimizer, batch)
    model.model.layers[0].requires_grad_(False)
    message = "layers.0.up_proj, model.layers.0.down_proj: frozen since the optimizer was made"
    with pytest.warns(UserWarning, match=message):
        for batch in batches[steps:]:
            take_step(model, optimizer, batch)


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_is_refused_with_the_order_that_works(tied):
    model = apply_losia(make_model(tie_word_embeddings=tied), CONFIG)
    model.resize_token_embeddings(300)
    with pytest.raises(ValueError, match="lm_head: .*resize_token_embeddings.*remove_losia, the"):
        adamw(model)
    remove_losia(model)
    apply_losia(model, CONFIG)
    optimizer = adamw(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()


def test_what_is_carried_over_is_not_refused():
    """A block less, a wrapper around a layer, a module more."""
    model = apply_losia(tiny_lm(blocks=3), CONFIG)
    model.model.layers = model.model.layers[:2]
    up = model.model.layers[0].up_proj
    model.model.layers[0].up_proj = nn.Sequential(up)
    model.head = nn.Linear(8, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = adamw(model)
        before = up.weight.clone(), model.head.weight.clone()
        loss = model(**make_batches(1)[0]).loss + model.head(torch.ones(1, 8)).sum()
        loss.backward()
        optimizer.step()
    assert not torch.equal(up.weight, before[0]) and not torch.equal(model.head.weight, before[1])


# before the conversion ----------------------------------------------------------------------------


@pytest.mark.parametrize("change", [old_spectral_norm, old_weight_norm])
def test_a_weight_that_is_computed_by_a_hook_is_refused_by_name(change):
    model = tiny_lm()
    change(up_proj(model))
    with pytest.raises(ValueError, match=r"up_proj' has a weight that is computed"):
        apply_losia(model, CONFIG)
    apply_losia(model, paper(rank_factor=0.5, exclude_modules=["layers.0.up_proj"]))


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload"])
def test_an_offloaded_weight_is_refused_by_name(tmp_path, how):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_lm()
    options = {"offload_dir": tmp_path} if how == "disk_offload" else {}
    getattr(accelerate, how)(model, execution_device="cpu", **options)
    with pytest.raises(ValueError, match=r"'lm_head' is offloaded .*without offloading"):
        apply_losia(model, CONFIG)


def test_weights_made_in_inference_mode_are_refused_by_name():
    with torch.inference_mode():
        model = tiny_lm()
    with pytest.raises(ValueError, match=r"up_proj' was made in torch.inference_mode\(\)"):
        apply_losia(model, paper(rank_factor=0.5))


def test_a_block_that_is_copied_after_the_conversion_is_refused():
    """As expanding a model by copies of its blocks does; before it, each trains by itself."""
    model = apply_losia(tiny_lm(), CONFIG)
    model.model.layers.append(copy.deepcopy(model.model.layers[1]))
    with pytest.raises(
        ValueError, match=r"layers\.1\.up_proj: 2 layers of the model go by that name"
    ):
        adamw(model)
    remove_losia(model)
    optimizer = adamw(apply_losia(model, CONFIG))
    assert optimizer.timeline.group_names[1:] == [f"model.layers.{n}" for n in range(3)]


def test_a_container_in_exclude_modules_is_told_with_the_pattern_that_excludes_it():
    with pytest.warns(
        UserWarning, match=r"exclude_modules names 'mlp', .*r'(.*)' is those"
    ) as said:
        apply_losia(nested(), paper(rank_factor=0.5, exclude_modules=["mlp"]))
    pattern = re.search(r"itself; r'(.*)' is", str(said[0].message)).group(1)
    model = apply_losia(nested(), paper(rank_factor=0.5, exclude_modules=pattern))
    assert [name for name, _ in losia_layers(model)] == ["layers.0.attention.q"]


def nested() -> nn.Module:
    block = nn.ModuleDict(
        {
            "attention": nn.ModuleDict({"q": nn.Linear(8, 8)}),
            "mlp": nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)}),
        }
    )
    return nn.ModuleDict({"layers": nn.ModuleList([block]), "projector": nn.Linear(8, 8)})


def test_a_linear_outside_of_the_blocks_is_told_with_the_entry_that_trains_it():
    with pytest.warns(UserWarning, match=r"projector: outside of the blocks, so frozen") as said:
        apply_losia(nested(), paper(rank_factor=0.5))
    entry = re.search(r"target_modules=(\[.*?\])", str(said[0].message)).group(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = apply_losia(
            nested(), paper(rank_factor=0.5, target_modules=ast.literal_eval(entry))
        )
        for said_so in ({"exclude_modules": ["projector"]}, {"modules_to_save": ["projector"]}):
            apply_losia(nested(), paper(rank_factor=0.5, **said_so))
    assert "projector" in dict(losia_layers(model))


# what needs no word -------------------------------------------------------------------------------


def test_a_tied_embedding_saved_with_its_head_trains_once(tmp_path):
    config = paper(rank_factor=0.25, modules_to_save=["embed_tokens", "lm_head"])
    model = apply_losia(make_model(), config)
    before, optimizer = model.lm_head.weight.clone(), adamw(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, before)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(loaded(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_a_16_bit_model_is_saved_as_it_infers(tmp_path):
    model = apply_losia(make_model().bfloat16(), paper(rank_factor=0.25, period=1))
    optimizer = adamw(model)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    remove_losia(model)
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_reentrant_checkpointing_without_gradients_at_the_inputs_trains_every_block():
    model = apply_losia(make_model(), paper(rank_factor=0.25)).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(layer.subnet.grad is not None for _, layer in losia_layers(model))
