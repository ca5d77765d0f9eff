"""The output layer starts at the tokens that occur, if it is told to."""

import pytest
import torch

from losia_kernels import LoSiAAdamW, apply_losia, attach, start_from_frequency
from losia_kernels.layers.module import losia_layers
from tests.tiny import make_batches, paper, take_step, tiny_lm


def make_model(**options):
    # 5 of 13
    return apply_losia(tiny_lm(), paper(**{"rank_factor": 0.5, "output_dim_factor": 0.4} | options))


def labels(*tokens: int) -> dict:
    return {"labels": torch.tensor([tokens])}


def test_the_most_frequent_tokens_over_all_batches():
    model = make_model()
    others = {
        name: layer.out_idx.clone() for name, layer in losia_layers(model) if name != "lm_head"
    }
    start_from_frequency(
        model, [labels(12, 12, 3, 0, -100, -100, -100), labels(7, 7, 3, 9, 9, 5, -100), labels(0)]
    )
    assert model.lm_head.out_idx.tolist() == [0, 3, 7, 9, 12]
    assert torch.equal(model.lm_head.subnet, model.lm_head.weight[model.lm_head.out_idx])
    for name, layer in losia_layers(model):
        if name != "lm_head":
            assert torch.equal(layer.out_idx, others[name])


def test_room_that_is_left_keeps_what_was_drawn():
    model = make_model()
    model.lm_head.set_subnet_(torch.tensor([4, 6, 8, 10, 12]), torch.arange(8))
    start_from_frequency(model, [labels(2, -100)])
    assert model.lm_head.out_idx.tolist() == [2, 4, 6, 8, 10]


@pytest.mark.parametrize("options", [{"output_dim_factor": 0.0}, {"output_dim_factor": 1.0}])
def test_nothing_to_place(options):
    with pytest.raises(ValueError, match="no output layer has a subnet"):
        start_from_frequency(make_model(**options), [labels(1)])


@pytest.mark.parametrize("batches", [[], [labels(-100, -100)]])
def test_nothing_to_count(batches):
    model = make_model()
    before = model.lm_head.out_idx.clone()
    with pytest.raises(ValueError, match="no labels to count"):
        start_from_frequency(model, batches)
    assert torch.equal(model.lm_head.out_idx, before)


@pytest.mark.parametrize("kind", ["LoSiAAdamW", "attach"])
@pytest.mark.parametrize(
    ("options", "scaled"),
    [
        ({"moves": "random", "init_subnet": "random"}, True),
        ({"moves": "none", "init_subnet": "random"}, True),
        ({"lr_of": "full"}, True),
        ({}, False),  # by importance, calibrated
        ({"moves": "random", "init_subnet": "random", "lr_of": "subnet"}, False),
    ],
)
def test_its_rate_is_scaled_as_the_others_are(kind, options, scaled):
    """The first step of Adam changes each value by the rate."""
    model = make_model(output_init="frequency", **options)
    start_from_frequency(model, [labels(12, 12, 3, 0)])
    if kind == "attach":
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        attach(optimizer, model)
    else:
        optimizer = LoSiAAdamW(model, lr=1e-3)
    before = model.lm_head.subnet.detach().clone()
    take_step(model, optimizer, make_batches(1)[0])
    moved = (model.lm_head.subnet.detach() - before).abs().max().item()
    assert moved == pytest.approx(1e-3 * (13 / 5 if scaled else 1), rel=1e-2)
    assert optimizer.param_groups[0]["lr"] == 1e-3
