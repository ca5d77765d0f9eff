"""Square and wide subnets, and pairs of factors, in real models."""

import re

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    T5Config,
)

from losia_kernels import LoSiAConfig, apply_losia, losia_layers
from tests.tiny import tiny_lm

HIDDEN, INNER = 64, 160


def llama() -> nn.Module:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads))


def gpt2() -> nn.Module:
    sizes = {"n_embd": HIDDEN, "n_inner": INNER, "n_layer": 1, "n_head": 4, "vocab_size": 50}
    return AutoModelForCausalLM.from_config(
        GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    )


def t5() -> nn.Module:
    sizes = {"d_model": HIDDEN, "d_ff": INNER, "num_layers": 1, "d_kv": 8, "num_heads": 4}
    return AutoModelForSeq2SeqLM.from_config(T5Config(**sizes, vocab_size=50))


def shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """By the layer's last component: the same in every block."""
    return {
        name.rsplit(".", 1)[-1]: tuple(layer.subnet.shape) for name, layer in losia_layers(model)
    }


def test_a_wide_subnet_takes_half_of_the_stream_and_trains_as_many_values():
    model = apply_losia(llama(), LoSiAConfig(rank_factor=1 / 4, shape="wide"))
    assert shapes(model) == {
        "q_proj": (8, 32),  # 64 x 64: reads
        "k_proj": (4, 32),  # 32 x 64
        "v_proj": (4, 32),
        "o_proj": (32, 8),  # 64 x 64: writes
        "gate_proj": (20, 32),  # 160 x 64
        "up_proj": (20, 32),
        "down_proj": (32, 20),  # 64 x 160
    }
    square = apply_losia(llama(), LoSiAConfig(rank_factor=1 / 4, shape="square"))
    assert sum(layer.subnet.numel() for _, layer in losia_layers(model)) == sum(
        layer.subnet.numel() for _, layer in losia_layers(square)
    )


@pytest.mark.parametrize("p", [0.5, 0.75, 1.0])
def test_from_a_half_on_wide_is_square(p):
    wide = apply_losia(llama(), LoSiAConfig(rank_factor=p, shape="wide"))
    assert shapes(wide) == shapes(apply_losia(llama(), LoSiAConfig(rank_factor=p, shape="square")))


def test_of_layers_with_two_sides_of_the_streams_length_the_name_tells():
    model = apply_losia(gpt2(), LoSiAConfig(rank_factor=1 / 4, shape="wide"))
    found = {name: tuple(layer.subnet.shape) for name, layer in losia_layers(model)}
    assert found["transformer.h.0.attn.c_attn"] == (24, 32)  # 192 x 64
    assert found["transformer.h.0.attn.c_proj"] == (32, 8)  # 64 x 64
    assert found["transformer.h.0.mlp.c_fc"] == (20, 32)
    assert found["transformer.h.0.mlp.c_proj"] == (32, 20)


def test_an_encoder_decoder():
    model = apply_losia(t5(), LoSiAConfig(rank_factor=1 / 4, shape="wide"))
    found = shapes(model)
    assert found["q"] == (4, 32) and found["o"] == (32, 4)  # 32 x 64, 64 x 32
    assert found["wi"] == (20, 32) and found["wo"] == (32, 20)


def test_a_pair_of_factors_is_the_shape_too():
    pattern = {"q_proj": (1 / 8, 1.0), "o_proj": [1.0, 1 / 8], "up_proj": 1 / 2}
    config = LoSiAConfig(rank_factor=1 / 4, shape="wide", rank_pattern=pattern)
    found = shapes(apply_losia(llama(), config))
    assert found["q_proj"] == (8, 64) and found["o_proj"] == (64, 8)
    assert found["up_proj"] == (80, 32) and found["gate_proj"] == (20, 32)
    again = LoSiAConfig.from_dict(config.to_dict())
    assert shapes(apply_losia(llama(), again)) == found


def test_without_a_config_the_embeddings_say_how_long_the_stream_is():
    wide = LoSiAConfig(rank_factor=0.3, shape="wide")
    assert shapes(apply_losia(tiny_lm(), wide)) == {"up_proj": (2, 4), "down_proj": (4, 2)}


def test_a_layer_of_which_neither_side_is_the_stream_is_square():
    config = DeepseekV3Config(
        **{"hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": 50},
        **{"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4},
        **{"q_lora_rank": 48, "kv_lora_rank": 24, "first_k_dense_replace": 1},
        **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
    )
    model = AutoModelForCausalLM.from_config(config)
    found = shapes(apply_losia(model, LoSiAConfig(rank_factor=1 / 4, shape="wide")))
    assert found["q_a_proj"] == (6, 32) and found["q_b_proj"] == (12, 12)  # 48 x 64, 48 x 48
    assert found["o_proj"] == (32, 4)  # 64 x 32


def test_a_shape_that_cannot_act_is_named(recwarn):
    blocks = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    with pytest.warns(UserWarning, match=r"every subnet is square: .* no layer's side"):
        apply_losia(blocks, LoSiAConfig(rank_factor=1 / 4, shape="wide"))
    recwarn.clear()
    apply_losia(llama(), LoSiAConfig(rank_factor=1 / 2, shape="wide"))
    apply_losia(llama(), LoSiAConfig(rank_factor=1 / 4, shape="wide"))
    apply_losia(nn.Sequential(nn.Linear(8, 16)), LoSiAConfig(rank_factor=1 / 4, shape="square"))
    assert not [w for w in recwarn if "cannot act" in str(w.message)]


@pytest.mark.parametrize("pair", [(0, 0.5), (0.5, 1.5), (0.5,), (0.5, 0.5, 0.5), (0.5, None), "ab"])
def test_a_bad_pair_is_refused_by_name(pair):
    with pytest.raises(ValueError, match=re.escape("LoSiAConfig.rank_pattern['q_proj']")):
        LoSiAConfig(rank_pattern={"q_proj": pair})


def test_the_same_shapes_through_peft():
    peft = pytest.importorskip("peft")
    from losia_kernels.integrations.peft import LoSiAPeftConfig

    options = {"rank_factor": 1 / 4, "shape": "wide", "rank_pattern": {"v_proj": (1.0, 1 / 8)}}
    adapted = peft.get_peft_model(llama(), LoSiAPeftConfig(**options))
    found = {n: tuple(p.shape) for n, p in adapted.named_parameters() if n.endswith(".subnet")}
    plain = dict(losia_layers(apply_losia(llama(), LoSiAConfig(**options))))
    assert len(found) == len(plain)
    for name, layer in plain.items():
        (mine,) = (size for full, size in found.items() if f".{name}." in full)
        assert mine == tuple(layer.subnet.shape), name


def test_a_wide_subnet_trains_what_it_says(tmp_path):
    model = apply_losia(llama(), LoSiAConfig(rank_factor=1 / 4, shape="wide"))
    from losia_kernels import LoSiAAdamW

    before = {name: layer.weight.clone() for name, layer in losia_layers(model)}
    optimizer = LoSiAAdamW(model, lr=1e-2)
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    for name, layer in losia_layers(model):
        inside = torch.zeros_like(layer.weight, dtype=torch.bool)
        inside[layer.out_idx[:, None], layer.in_idx] = True
        changed = layer.weight != before[name]
        assert changed[inside].float().mean() > 0.9 and not changed[~inside].any(), name


def test_a_layer_whose_other_side_is_too_short_is_square():
    """Of k_proj's 32 outputs 2 p**2 = 0.0288 are none, 0.12 are 3."""
    model = apply_losia(llama(), LoSiAConfig(rank_factor=0.12, shape="wide"))
    found = shapes(model)
    assert found["k_proj"] == (3, 7) and found["q_proj"] == (1, 32)
