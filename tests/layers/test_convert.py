"""apply_losia: what is replaced, how it is grouped, what is frozen; what goes wrong changes
nothing; and back."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from losia_kernels import apply_losia, export_state_dict, remove_losia
from losia_kernels.layers.module import losia_layers
from tests.tiny import HIDDEN, VOCAB, TinyLM, make_batches, paper, same_tensors, snapshot, tiny_lm

HALF = {"rank_factor": 0.5}
TINY_TARGETS = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("up_proj", "down_proj")]


def apply(model: nn.Module, output_layer: str | None = None, **options) -> nn.Module:
    return apply_losia(model, paper(**HALF | options), output_layer)


def groups(model: nn.Module) -> dict[str, tuple[int | None, str]]:
    return {
        name: (layer.membership.group, layer.membership.group_name)
        for name, layer in losia_layers(model)
    }


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def linears(*names: str) -> nn.Module:
    module = nn.Module()
    for name in names:
        module.add_module(name, nn.Linear(4, 4))
    return module


def nest(path: str, leaf: nn.Module) -> nn.Module:
    """``leaf`` under the dotted path."""
    for name in reversed(path.split(".")):
        outer = nn.Module()
        outer.add_module(name, leaf)
        leaf = outer
    return leaf


# Subnets ------------------------------------------------------------------------------------------


def test_the_seed_decides_and_layers_differ():
    first, again, other = (apply(tiny_lm(blocks=3), seed=seed) for seed in (0, 0, 1))
    assert same_tensors(first.state_dict(), again.state_dict())
    drawn = Counter(tuple(layer.out_idx.tolist()) for _, layer in losia_layers(first))
    assert len(drawn) == 6 and max(drawn.values()) == 1
    assert not torch.equal(
        first.model.layers[0].up_proj.out_idx, other.model.layers[0].up_proj.out_idx
    )


def test_torchs_random_state_is_not_touched():
    model = tiny_lm()
    before = torch.get_rng_state()
    apply(model, output_dim_factor=0.5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("master", ["float32", "none"])
def test_the_dtype_of_the_subnets(master):
    model = apply(tiny_lm().bfloat16(), master=master)
    dtypes = {layer.subnet.dtype for _, layer in losia_layers(model)}
    assert dtypes == {torch.float32 if master == "float32" else torch.bfloat16}


def test_the_model_computes_what_it_did():
    model, (batch,) = tiny_lm(), make_batches(1)
    before = model(batch["input_ids"]).logits
    apply(model, output_dim_factor=0.5)
    assert torch.equal(model(batch["input_ids"]).logits, before)


# Errors -------------------------------------------------------------------------------------------


class Quantized(nn.Linear):
    """As bitsandbytes' layers: a subclass whose forward is not that of its weight."""


class Conv1D(nn.Module):
    """GPT-2's linear, with the weight transposed."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))


def shared_weights() -> nn.Module:
    model = linears("a", "b")
    model.b.weight = model.a.weight
    return model


def no_plain_head() -> TinyLM:
    model = tiny_lm()
    model.lm_head = Quantized(HIDDEN, VOCAB)
    return model


ERRORS = {
    "no linear": (
        lambda: nn.Embedding(3, 3),
        {},
        "matches no nn.Linear; the modules with a weight are of type Embed",
    ),
    "no weights": (lambda: nn.ReLU(), {}, "of type none"),
    "Conv1D": (lambda: nn.Sequential(Conv1D()), {}, "matches no nn.Linear.*Conv1D"),
    "Conv1D named": (
        lambda: nn.Sequential(Conv1D()),
        {"target_modules": ["0"]},
        "'0', a Conv1D, but only a plain",
    ),
    "quantized": (lambda: nn.Sequential(Quantized(4, 4)), {}, "matches no nn.Linear.*Quantized"),
    "quantized named": (
        lambda: nn.Sequential(Quantized(4, 4)),
        {"target_modules": ".*"},
        "a Quantized.*quantized or",
    ),
    "quantized head": (
        no_plain_head,
        {"output_dim_factor": 0.5},
        "needs a plain nn.Linear output layer, found Quant",
    ),
    "shared": (shared_weights, {}, "'a' and 'b' share one weight; exclude one"),
    "tied and saved": (
        lambda: tiny_lm(tied=True),
        {"output_dim_factor": 0.5, "modules_to_save": ["embed_tokens"]},
        r"'model.embed_tokens' \(modules_to_save\) shares its weight with 'lm_head'",
    ),
    "saved whole block": (
        tiny_lm,
        {"modules_to_save": ["layers.0"]},
        "its weight with 'model.layers.0.up_proj'",
    ),
    "saved unknown": (
        tiny_lm,
        {"modules_to_save": ["embeddings"]},
        "names 'embeddings', but the model has no such",
    ),
    "no head": (
        lambda: linears("a"),
        {"output_dim_factor": 0.5},
        "needs a plain nn.Linear output layer, found NoneT",
    ),
    "empty subnet": (
        tiny_lm,
        {"rank_pattern": {"layers.1.down_proj": 0.1}},
        "model.layers.1.down_proj: a rank factor of 0.1 selects none of 8 neurons",
    ),
    "empty head": (
        tiny_lm,
        {"output_dim_factor": 0.01},
        "lm_head: a rank factor of 0.01 selects none of 13",
    ),
}


@pytest.mark.parametrize(("make", "options", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_an_error_leaves_the_model_as_it_was(make, options, message):
    model = make()
    modules, values = dict(model.named_modules()), snapshot(model)
    # had been chosen by the user
    frozen = next(model.parameters(), torch.zeros(1)).requires_grad_(False)
    before = trained(model)
    with pytest.raises(ValueError, match=message):
        apply(model, **options)
    assert dict(model.named_modules()) == modules and same_tensors(model.state_dict(), values)
    assert trained(model) == before and not frozen.requires_grad


@pytest.mark.parametrize(
    ("name", "message"), [("head", "no module 'head'"), ("model.norm", "found LayerNorm")]
)
def test_a_named_output_layer_must_be_a_linear(name, message):
    with pytest.raises(ValueError, match=message):
        apply(tiny_lm(), name, output_dim_factor=0.5)


def test_a_config_that_is_none_is_an_error():
    with pytest.raises(TypeError, match="config must be a LoSiAConfig, got dict"):
        apply_losia(tiny_lm(), {"period": 5})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"exclude_modules": ["down_proj", "donw_proj"]},
            "exclude_modules names 'donw_proj', which matches no module",
        ),
        (
            {"exclude_modules": ["layers"]},
            "exclude_modules names 'layers', which matches no module with a weight",
        ),
        (
            {"exclude_modules": r".*\.donw_proj"},
            "exclude_modules names '.*donw_proj', which matches no module",
        ),
        (
            {"target_modules": ["down_proj", "upp_proj"]},
            "target_modules names 'upp_proj', which matches no module",
        ),
        (
            {"rank_pattern": {"donw_proj": 0.5}},
            "rank_pattern names 'donw_proj', which matches no trained layer",
        ),
    ],
)
def test_a_pattern_that_matches_nothing_is_told(options, message):
    with pytest.warns(UserWarning, match=message) as warned:
        apply(tiny_lm(), **options)
    assert len(warned) == 1


def test_applying_twice_is_an_error():
    model = apply(tiny_lm())
    with pytest.raises(ValueError, match="LoSiALinears already; call remove_losia first"):
        apply(model)


# What others have done to a target ----------------------------------------------------------------


def test_hooks_run_on_and_are_removed_by_their_handles():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    x = torch.randn(2, 8)
    plain = model(x)
    handle = model[0].register_forward_hook(lambda module, args, output: 0 * output)
    apply(model, rank_factor=0.5)
    assert not model(x).any()
    back = remove_losia(model)
    assert not back(x).any()
    handle.remove()
    assert torch.equal(back(x), plain)


def test_linears_too_small_for_a_subnet_stay_frozen_and_are_named():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1))
    with pytest.warns(UserWarning, match="1: too small for a subnet at a rank factor of 0.125"):
        apply(model, rank_factor=0.125)
    assert trained(model) == {"0.subnet"} and type(model[1]) is nn.Linear
    with pytest.raises(ValueError, match="0: a rank factor of 0.01 selects none of 16"):
        apply(nn.Sequential(nn.Linear(16, 16)), rank_factor=0.01)


# And back -----------------------------------------------------------------------------------------


def disturb(model: nn.Module) -> None:
    """Values in the subnets that the weights do not have yet."""
    with torch.no_grad():
        for _, layer in losia_layers(model):
            layer.subnet.add_(torch.rand_like(layer.subnet))


@pytest.mark.parametrize("tied", [False, True])
def test_remove_losia_gives_the_architecture_back_with_the_trained_weights(tied):
    original, (batch,) = tiny_lm(tied=tied), make_batches(1)
    model = apply(copy.deepcopy(original), output_dim_factor=0.5)
    disturb(model)
    assert remove_losia(model) is model
    assert {n: type(m) for n, m in model.named_modules()} == {
        n: type(m) for n, m in original.named_modules()
    }
    assert list(model.state_dict()) == list(original.state_dict())
    assert not torch.equal(model(**batch).logits, original(**batch).logits)
    assert next(losia_layers(apply(model)), None)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: model.model.layers[0].compile(backend="eager") or model,
        lambda model: (
            model.model.layers.__setitem__(0, torch.compile(model.model.layers[0], backend="eager"))
            or model
        ),
    ],
    ids=["plain", "compiled", "block compiled", "block wrapped"],
)
def test_export_loads_into_a_fresh_plain_model(wrap):
    model, fresh = apply(tiny_lm(tied=True), output_dim_factor=0.5), tiny_lm(seed=9, tied=True)
    disturb(model)
    for _, layer in losia_layers(model):
        layer.write_back_()
    exported = export_state_dict(wrap(model))
    assert list(exported) == list(fresh.state_dict())
    fresh.load_state_dict(exported)
    (batch,) = make_batches(1)
    assert torch.equal(fresh(**batch).logits, model(**batch).logits)


def test_export_drops_the_prefixes_of_ddp_and_compile(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        keys = list(tiny_lm().state_dict())
        model = nn.parallel.DistributedDataParallel(apply(tiny_lm()))
        assert list(export_state_dict(model)) == keys
        assert list(export_state_dict(torch.compile(model, backend="eager"))) == keys
        inside = nn.parallel.DistributedDataParallel(
            torch.compile(apply(tiny_lm()), backend="eager")
        )
        assert list(export_state_dict(inside)) == keys
    finally:
        torch.distributed.destroy_process_group()


def test_only_subnets_are_left_out_of_the_export():
    model = linears("up")
    model.norm = nn.Module()
    model.norm.register_buffer("out_idx", torch.ones(1))
    model.register_parameter("subnet", nn.Parameter(torch.ones(1)))
    keys = list(model.state_dict())
    assert list(export_state_dict(apply(model))) == keys


def test_a_layer_that_was_compiled_by_itself_lives_on():
    model, (batch,) = tiny_lm(), make_batches(1)
    block = model.model.layers[0]
    block.up_proj = torch.compile(block.up_proj, backend="eager")
    model(**batch)
    apply_losia(model, paper(rank_factor=0.5))
    model(**batch).loss.backward()
    assert all(layer.subnet.grad is not None for _, layer in losia_layers(model))
    remove_losia(model)
    plain = block.up_proj._orig_mod
    assert type(plain) is nn.Linear
    plain.weight = nn.Parameter(torch.zeros_like(plain.weight))
    assert not block.up_proj(torch.ones(1, 8)).any()
