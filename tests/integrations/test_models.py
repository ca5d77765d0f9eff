"""transformers' architectures, each as a tiny random model: what is trained, what training touches,
the way back."""

import warnings

import pytest
import torch
import transformers
from torch import nn

from losia_kernels import LoSiAAdamW, apply_losia, export_state_dict, remove_losia
from losia_kernels.layers.linear import LoSiAConv1D
from losia_kernels.layers.module import losia_layers
from losia_kernels.parallel.placement import Sharded, Whole, find_placement
from losia_kernels.parallel.ranks import Ranks
from tests.integrations.tiny_models import FAMILIES, Family
from tests.tiny import paper


def convert(family: Family, model: nn.Module, **options) -> nn.Module:
    values = {
        "rank_factor": 0.25,
        "period": 1,
        "output_dim_factor": family.output_dim_factor,
    } | options
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* weights stay frozen")
        return apply_losia(model, paper(**values))


def logits(model: nn.Module, batch: dict) -> torch.Tensor:
    """Of the training forward, without the loss: with it they would not be computed."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = batch["labels"]
    return model(**inputs).logits


def train(model: nn.Module, optimizer, family: Family, steps: int, after_step=lambda: None) -> None:
    for step in range(steps):
        model(**family.batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step()


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_trained_and_how_it_is_grouped(name):
    family = FAMILIES[name]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = apply_losia(family.make(), paper(rank_factor=0.25))
    groups: dict[str, set[str]] = {}
    for path, layer in losia_layers(model):
        block = layer.membership.group_name
        groups.setdefault(block, set()).add(path.removeprefix(f"{block}."))
    assert groups == {
        block: (family.decoder_linears if block.startswith("decoder.") else family.linears)
        for block in family.blocks
    }
    frozen = [str(warning.message) for warning in told if "stay frozen" in str(warning.message)]
    assert len(frozen) == bool(family.frozen)
    assert all(named in frozen[0] for named in family.frozen)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in FAMILIES]
    + [(name, torch.bfloat16) for name in ("gemma2", "gpt2", "phi3", "qwen3_moe")],
)
def test_the_model_computes_what_it_did_bit_for_bit(name, dtype):
    family = FAMILIES[name]
    model = family.make().to(dtype)
    for module in model.modules():
        # to an attention bias that is trained (T5) torch gives another kernel
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)
    batch = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in family.batch().items()
    }
    before = logits(model, batch)
    with torch.no_grad():
        before_alone = logits(model, batch)
    convert(family, model)
    after = logits(model, batch)
    assert after.requires_grad and torch.equal(after, before)
    with torch.no_grad():
        assert torch.equal(logits(model, batch), before_alone)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_moves_only_subnets_and_the_result_loads_in_plain_transformers(name, tmp_path):
    """A cycle and a step, so that every group relocalizes: what no subnet has held stays as it was,
    bit for bit."""
    family = FAMILIES[name]
    model = family.make()
    before, keys = (
        {key: value.clone() for key, value in model.state_dict().items()},
        list(model.state_dict()),
    )
    convert(family, model)
    layers = dict(losia_layers(model))
    held = {
        path: torch.zeros_like(layer.matrix, dtype=torch.bool) for path, layer in layers.items()
    }
    first = {
        path: (layer.out_idx.tolist(), layer.in_idx.tolist()) for path, layer in layers.items()
    }

    def note():
        for path, layer in layers.items():
            held[path][layer.out_idx[:, None], layer.in_idx] = True

    note()
    optimizer = LoSiAAdamW(model, lr=0.01)
    train(model, optimizer, family, optimizer.timeline.schedule.cycle + 1, note)
    moved = {
        layer.membership.group
        for path, layer in layers.items()
        if first[path] != (layer.out_idx.tolist(), layer.in_idx.tolist())
    }
    assert moved == set(range(len(optimizer.timeline.groups)))

    exported = export_state_dict(model)
    assert list(exported) == keys
    parameters = dict(model.named_parameters(remove_duplicate=False))
    may_change = {
        id(layer.weight): held[path].T if isinstance(layer, LoSiAConv1D) else held[path]
        for path, layer in layers.items()
    }
    for key, value in exported.items():
        inside = may_change.get(id(parameters.get(key)))
        if inside is None:
            assert torch.equal(value, before[key]), key
        else:
            assert torch.equal(value[~inside], before[key][~inside]), key
            assert (value[inside] != before[key][inside]).float().mean() > 0.5, key

    batch = family.batch(99)
    with torch.no_grad():
        expected = logits(model.eval(), batch)
    remove_losia(model).save_pretrained(tmp_path)
    assert {key: type(module) for key, module in model.named_modules()} == {
        key: type(module) for key, module in family.make().named_modules()
    }
    loaded = getattr(transformers, family.model).from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(logits(loaded.eval(), batch), expected)


def placement_of(model):
    """As if several processes trained it."""
    several = Ranks(group="any")
    return find_placement(model, [layer for _, layer in losia_layers(model)], several)


def test_conv1d_cut_by_fully_shard_is_refused(monkeypatch):
    """Its rows are inputs. (Here every module passes for one that fully_shard has seen.)"""
    model = convert(FAMILIES["gpt2"], FAMILIES["gpt2"].make())
    assert isinstance(placement_of(model), Whole)
    monkeypatch.setattr("torch.distributed.fsdp.FSDPModule", nn.Module)
    with pytest.raises(
        ValueError, match=r"transformer.h.0.attn.c_attn: fully_shard would cut .* Conv1D.*use DDP"
    ):
        placement_of(model)
    llama = convert(FAMILIES["llama"], FAMILIES["llama"].make())
    assert isinstance(placement_of(llama), Sharded)
