"""What is chosen, and how it is grouped."""

import copy

import pytest
import torch
from torch import nn

from losia_kernels import LoSiALinear, apply_losia, export_state_dict, remove_losia
from losia_kernels.layers.module import losia_layers
from tests.layers.test_convert import TINY_TARGETS, apply, groups, linears, nest, trained
from tests.tiny import HIDDEN, VOCAB, paper, tiny_lm

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
        apply_losia(tiny_lm(), paper(rank_factor=0.5, target_modules=["up_proj", "lm_head"]))


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
