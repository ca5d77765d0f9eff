"""apply_losia: what is replaced, how it is grouped, what is frozen; what goes wrong changes
nothing; and back."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from losia_kernels import LoSiAConfig, LoSiALinear, apply_losia, export_state_dict, remove_losia
from losia_kernels.layers.module import losia_layers
from tests.tiny import HIDDEN, VOCAB, TinyLM, make_batches, same_tensors, snapshot, tiny_lm

HALF = {"rank_factor": 0.5}
TINY_TARGETS = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("up_proj", "down_proj")]


def apply(model: nn.Module, output_layer: str | None = None, **options) -> nn.Module:
    return apply_losia(model, LoSiAConfig(**HALF | options), output_layer)


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


# Groups -------------------------------------------------------------------------------------------


def test_llama_like_groups_by_decoder_block():
    assert groups(apply(tiny_lm())) == {
        name: (i, f"model.layers.{i}") for i in (0, 1) for name in TINY_TARGETS if f".{i}." in name
    }


@pytest.mark.parametrize("factor", [0.25, 1.0])
@pytest.mark.parametrize("tied", [False, True])
def test_the_output_layer_is_group_0_unless_it_is_trained_densely(factor, tied):
    model = apply(tiny_lm(tied=tied), output_dim_factor=factor)
    shift = 0 if factor == 1 else 1
    assert groups(model)["lm_head"] == (None if factor == 1 else 0, "lm_head")
    assert groups(model)["model.layers.1.up_proj"] == (1 + shift, "model.layers.1")
    assert model.lm_head.subnet.shape == (int(factor * VOCAB), HIDDEN)
    assert torch.equal(model.lm_head.in_idx, torch.arange(HIDDEN))
    assert trained(model) == {f"{name}.subnet" for name in [*TINY_TARGETS, "lm_head"]}
    if tied:
        assert model.lm_head.weight is model.model.embed_tokens.weight
        with torch.no_grad():
            model.lm_head.subnet.add_(1)
        model.lm_head.write_back_()
        row = model.lm_head.out_idx[0]
        assert torch.equal(model.model.embed_tokens.weight[row], model.lm_head.subnet[0])


def test_the_output_layer_is_left_frozen_by_default():
    model = apply(tiny_lm())
    assert type(model.lm_head) is nn.Linear and not model.lm_head.weight.requires_grad


def test_an_output_layer_can_be_named():
    model = linears("head")
    model.layers = nn.ModuleList([linears("up")])
    assert groups(apply(model, "head", output_dim_factor=0.5)) == {
        "head": (0, "head"),
        "layers.0.up": (1, "layers.0"),
    }


def test_a_list_of_targets_that_names_the_output_layer_is_told_what_trains_it():
    with pytest.raises(ValueError, match="'lm_head', the output layer, but .* output_dim_factor"):
        apply_losia(tiny_lm(), LoSiAConfig(rank_factor=0.5, target_modules=["up_proj", "lm_head"]))


def test_an_output_layer_among_the_targets_is_an_output_layer_only():
    model = apply(tiny_lm(), target_modules=["up_proj", "lm_head"], output_dim_factor=0.5)
    assert groups(model) == {
        "model.layers.0.up_proj": (1, "model.layers.0"),
        "lm_head": (0, "lm_head"),
        "model.layers.1.up_proj": (2, "model.layers.1"),
    }
    flat = apply(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 9)), "1", output_dim_factor=1.0)
    assert groups(flat) == {"0": (0, "0"), "1": (None, "1")}


def test_gpt_neox_like():
    model = nest(
        "gpt_neox.layers",
        nn.ModuleList(
            [
                nest("attention.query_key_value", nn.Linear(4, 12)),
                nest("mlp.dense_h_to_4h", nn.Linear(4, 16)),
            ]
        ),
    )
    model.embed_out = nn.Linear(4, VOCAB)
    assert groups(apply(model)) == {
        "gpt_neox.layers.0.attention.query_key_value": (0, "gpt_neox.layers.0"),
        "gpt_neox.layers.1.mlp.dense_h_to_4h": (1, "gpt_neox.layers.1"),
    }


def test_encoder_and_decoder_are_two_lists_of_blocks():
    model = nn.Module()
    for part in ("encoder", "decoder"):
        model.add_module(
            part, nest("block", nn.ModuleList([linears("wi", "wo"), linears("wi", "wo")]))
        )
    names = ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]
    assert groups(apply(model)) == {
        f"{name}.{w}": (i, name) for i, name in enumerate(names) for w in ("wi", "wo")
    }


def test_experts_belong_to_the_block_that_holds_their_list():
    model = nn.Module()
    model.layers = nn.ModuleList(
        [nest("moe.experts", nn.ModuleList([linears("w1"), linears("w1")])) for _ in "ab"]
    )
    assert groups(apply(model)) == {
        f"layers.{i}.moe.experts.{e}.w1": (i, f"layers.{i}") for i in (0, 1) for e in (0, 1)
    }


def test_a_sequential_groups_by_child_and_inside_a_list_it_does_not():
    flat = nn.Sequential(
        nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    )
    assert groups(apply(flat)) == {"0": (0, "0"), "2.0": (1, "2"), "2.1": (1, "2")}
    model = nn.Module()
    model.stem = nn.Sequential(nn.Linear(4, 4))
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))])
    assert groups(apply(model)) == {"layers.0.0": (0, "layers.0"), "layers.0.1": (0, "layers.0")}
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    # a list without targets says nothing of the blocks
    model.norms = nn.ModuleList([nn.LayerNorm(4)])
    assert groups(apply(model)) == {"0": (0, "0"), "1": (1, "1")}
    assert groups(apply(nn.ModuleList([linears("a"), linears("a")]))) == {
        "0.a": (0, "0"),
        "1.a": (1, "1"),
    }


def test_a_plain_mlp_is_one_group():
    assert groups(apply(linears("up", "down"))) == {"up": (0, "model"), "down": (0, "model")}


def test_the_order_is_the_models_past_nine_blocks():
    model = apply(tiny_lm(blocks=11))
    assert [layer.membership.group for _, layer in losia_layers(model)] == [
        i for i in range(11) for _ in "ab"
    ]


# What is chosen -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"target_modules": ["up_proj"]}, TINY_TARGETS[::2]),
        (
            {"target_modules": ["layers.1.up_proj", "model.layers.0.down_proj"]},
            [TINY_TARGETS[1], TINY_TARGETS[2]],
        ),
        ({"target_modules": ["proj", "p_proj"]}, None),
        ({"target_modules": r".*layers\.\d\.(up|gate)_proj"}, TINY_TARGETS[::2]),
        ({"target_modules": "up_proj"}, None),  # a regex is for the whole name
        ({"exclude_modules": ["down_proj"]}, TINY_TARGETS[::2]),
        ({"exclude_modules": r".*layers\.0\..*"}, TINY_TARGETS[2:]),
        ({"exclude_modules": ".*"}, None),
        ({"modules_to_save": ["layers.0.up_proj"]}, TINY_TARGETS[1:]),
    ],
)
def test_target_and_exclude_modules_follow_pefts_rules(options, names):
    if names is not None:
        assert [name for name, _ in losia_layers(apply(tiny_lm(), **options))] == names
        return
    with pytest.raises(ValueError, match="matches no nn.Linear"):
        apply(tiny_lm(), **options)


def test_a_named_linear_outside_the_blocks_is_its_own_group():
    model = nn.Module()
    model.layers = nn.ModuleList([linears("up")])
    model.score = nn.Linear(4, 2)
    assert groups(apply(copy.deepcopy(model))) == {"layers.0.up": (0, "layers.0")}
    named = groups(apply(model, target_modules=["up", "score"]))
    assert named == {"layers.0.up": (0, "layers.0"), "score": (1, "score")}


@pytest.mark.parametrize("pattern", ["up_proj", "layers.0.up_proj", r"model\.layers\.0\.u.*"])
def test_rank_pattern_matches_a_name_or_its_last_components(pattern):
    model = apply(tiny_lm(), rank_pattern={pattern: 1.0, ".*": 0.25})
    assert model.model.layers[0].up_proj.subnet.shape == (12, HIDDEN)
    assert model.model.layers[0].down_proj.subnet.shape == (2, 3)
    assert model.model.layers[1].up_proj.subnet.shape == (
        (12, HIDDEN) if pattern == "up_proj" else (3, 2)
    )


def test_everything_else_is_frozen_but_modules_to_save():
    model = apply(tiny_lm(), modules_to_save=["embed_tokens", "model.norm"])
    saved = {"model.embed_tokens.weight", "model.norm.weight", "model.norm.bias"}
    assert trained(model) == saved | {f"{name}.subnet" for name in TINY_TARGETS}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_linear_under_two_names_stays_one():
    model = linears("a", "b")
    model.c = model.a
    model.add_module("d", nest("e", model.a))
    apply(model)
    assert isinstance(model.a, LoSiALinear) and model.a is model.c is model.d.e
    remove_losia(model)
    assert type(model.a) is nn.Linear and model.a is model.c is model.d.e


def test_blocks_shared_by_layers_have_one_subnet():
    block = linears("up")
    model = apply(nn.ModuleList([block, block, linears("up")]))
    assert groups(model) == {"0.up": (0, "0"), "2.up": (1, "2")} and model[0].up is model[1].up
    assert export_state_dict(model).keys() == remove_losia(model).state_dict().keys()


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
