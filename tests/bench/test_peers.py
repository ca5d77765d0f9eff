"""Peers of the study: what they train and nothing else, and the plain model of it."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

from bench.methods import STUDY, Options
from bench.methods.base import decoder_linears
from bench.methods.blocks import random_blocks, random_columns
from tests.bench.quality_tiny import tiny_base

SIDES = {(128, 128): 8, (256, 128): 4, (128, 256): 2}  # [out, in]: how many in the tiny model
PEERS = ("shira", "miss", "blocks-64", "columns-16")


@pytest.fixture(scope="module")
def base():
    return tiny_base()


def trained(base, name: str, seed: int = 0) -> tuple[nn.Module, int]:
    """The plain model after two steps, and how many values were trained."""
    prepared = STUDY[name].prepare(base.fresh(), Options(lr=1e-2, seed=seed))
    ids = torch.arange(24).view(2, 12)
    for _ in range(2):
        prepared.module(input_ids=ids, labels=ids).loss.backward()
        prepared.update()
    return prepared.finish(), prepared.trained


def changes(base, model: nn.Module) -> dict[str, torch.Tensor]:
    before = decoder_linears(base.model)
    after = decoder_linears(model)
    assert after.keys() == before.keys() and {type(each) for each in after.values()} == {nn.Linear}
    return {name: after[name].weight - before[name].weight for name in after}


@pytest.mark.parametrize("name", PEERS)
def test_only_the_linears_of_the_decoder_blocks_change_and_the_model_is_plain(name, base):
    model, count = trained(base, name)
    before, after = base.model.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"{each}.weight" for each in decoder_linears(base.model)}
    values = {
        "shira": sum(8 * (out + in_) * n for (out, in_), n in SIDES.items()),
        "miss": sum(16 * out * n for (out, _), n in SIDES.items()),
        "blocks-64": sum(out * in_ * n for (out, in_), n in SIDES.items()) // 64,
        "columns-16": sum(16 * out * n for (out, _), n in SIDES.items()),
    }
    assert count == values[name]
    moved = sum(int(delta.count_nonzero()) for delta in changes(base, model).values())
    if name == "miss":  # each value stands in every shard of its row
        count = sum(out * in_ * n for (out, in_), n in SIDES.items())
    assert 0.99 * count < moved <= count


def test_blocks_cover_every_output_and_every_input_once(base):
    for delta in changes(base, trained(base, "blocks-64")[0]).values():
        out, in_ = (side // 64 for side in delta.shape)
        assert (delta != 0).sum(1).tolist() == [in_] * delta.shape[0]
        assert (delta != 0).sum(0).tolist() == [out] * delta.shape[1]
        patterns = (delta != 0).unique(dim=0)
        assert len(patterns) == 64, "rows of one block share their inputs"


def test_columns_are_whole_and_the_others_untouched(base):
    for delta in changes(base, trained(base, "columns-16")[0]).values():
        touched = (delta != 0).sum(0)
        assert sorted(touched.unique().tolist()) == [0, delta.shape[0]]
        assert int((touched > 0).sum()) == 16


def test_miss_shares_one_shard_in_each_row(base):
    for delta in changes(base, trained(base, "miss")[0]).values():
        shards = delta.view(delta.shape[0], -1, 16)
        torch.testing.assert_close(shards, shards[:, :1].expand_as(shards), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in PEERS if name != "miss"])
def test_places_are_drawn_from_the_seed(name, base):
    places = []
    for seed in (0, 1, 0):
        found = changes(base, trained(base, name, seed)[0])
        places.append(next(iter(found.values())) != 0)
    assert torch.equal(places[0], places[2]) and not torch.equal(places[0], places[1])


@pytest.mark.parametrize("make", [random_blocks, random_columns])
def test_the_gradients_of_blocks_are_those_of_the_weight(make):
    torch.manual_seed(0)
    linear = nn.Linear(12, 8, dtype=torch.float64)
    layer = make(linear, 4, torch.Generator().manual_seed(0))
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    dy = torch.randn(3, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        layer.values.normal_()
    y = layer(x)
    (grad,) = torch.autograd.grad(y, layer.values, dy)
    places = layer.out_idx[:, :, None], layer.in_idx[:, None, :]
    dense = torch.einsum("bto,bti->oi", dy, x)
    torch.testing.assert_close(grad, dense[places])
    plain = layer.to_plain()
    assert plain is linear
    torch.testing.assert_close(plain(x), y)


def test_blocks_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match=r"64 equal blocks do not cover a linear of \(8, 12\)"):
        random_blocks(nn.Linear(12, 8), 64, torch.Generator())


def test_the_values_that_the_settings_say():
    """Of SmolLM2-135M, without its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(**sizes, **heads, vocab_size=49152, tie_word_embeddings=True)

    def count(name: str) -> int:
        with torch.device("meta"):
            return STUDY[name].prepare(LlamaForCausalLM(config), Options()).trained

    lora, subnets = count("lora-r8"), 30 * 55296
    assert (lora, count("columns-16"), count("miss")) == (2_442_240, 2_488_320, 2_488_320)
    assert count("blocks-64") == subnets == 1_658_880
