"""Rank factors by importance: within the budget, and never capturing less than one factor for
all."""

import itertools

import pytest
import torch

from bench.methods.importance import (
    LEVELS,
    captured_by_level,
    observe,
    rank_pattern,
    rank_pattern_of,
)
from losia_kernels import apply_losia
from losia_kernels.layers.module import losia_layers
from losia_kernels.layers.subnet import subnet_size
from tests.bench.quality_tiny import tiny_base, tiny_tasks
from tests.tiny import paper

P = 1 / 8


def values(shapes, pattern) -> int:
    sizes = [
        [subnet_size(pattern[name], size, name) for size in shape] for name, shape in shapes.items()
    ]
    return sum(k_out * k_in for k_out, k_in in sizes)


def made_up(seed: int):
    """Three layers of different shapes; the second matters most, the third not at all."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (128, 64), "b": (64, 192), "c": (128, 128)}
    scale = {"a": 1.0, "b": 5.0, "c": 0.0}
    scores = {
        name: scale[name] * torch.rand(shape, generator=generator) ** 4
        for name, shape in shapes.items()
    }
    return (
        shapes,
        {
            name: captured_by_level(score) if scale[name] else [0.0] * len(LEVELS)
            for name, score in scores.items()
        },
        scores,
    )


@pytest.mark.parametrize("seed", range(4))
def test_within_the_budget_and_as_good_as_any_choice_of_levels_nearly(seed):
    shapes, captured, _ = made_up(seed)
    pattern = rank_pattern(captured, shapes, P)
    budget = values(shapes, dict.fromkeys(shapes, P))
    assert values(shapes, pattern) <= budget

    def total(choice) -> float:
        return sum(captured[name][LEVELS.index(level)] for name, level in choice.items())

    choices = [
        dict(zip(shapes, levels, strict=True))
        for levels in itertools.product(LEVELS, repeat=len(shapes))
    ]
    best = max(total(choice) for choice in choices if values(shapes, choice) <= budget)
    assert total(pattern) >= 0.9 * best and total(pattern) > total(dict.fromkeys(shapes, P))
    assert pattern["c"] < P < pattern["b"]


def test_what_a_level_captures_is_the_sum_of_its_block():
    _, captured, scores = made_up(0)
    whole = scores["a"].sum().item()
    assert captured["a"] == sorted(captured["a"]) and captured["a"][-1] < whole
    best_row_first = scores["a"].sum(1).topk(2).indices
    inputs = scores["a"][best_row_first].sum(0).topk(1).indices
    assert captured["a"][0] >= scores["a"][best_row_first][:, inputs].sum().item() - 1e-4


def test_importance_is_that_of_equation_3_and_the_pattern_is_applied():
    base, task = tiny_base(), tiny_tasks()["pronunciation"]
    from bench.quality.items import batches

    def made():
        return batches(task.splits.train, base.tokenizer, 2, 3, 0, 32, "cpu")

    model, name = base.fresh(), "model.layers.1.mlp.up_proj"
    _, importance = observe(base.fresh(), [name], itertools.islice(made(), 2))
    weight = model.get_submodule(name).weight
    expected = torch.zeros_like(weight)
    for batch in itertools.islice(made(), 2):
        weight.grad = None
        model(**batch).loss.backward()
        expected += 0.5 * (weight.grad * weight - (weight.grad * weight) ** 2 / 2).abs().detach()
    torch.testing.assert_close(importance[name], expected)

    model = base.fresh()
    pattern = rank_pattern_of(model, itertools.islice(made(), 2), P)
    apply_losia(model, paper(rank_factor=P, rank_pattern=pattern))
    sizes = {name: layer.subnet.shape[0] for name, layer in losia_layers(model)}
    expected_sizes = {name.replace("\\.", "."): factor for name, factor in pattern.items()}
    assert sizes == {
        name: int(factor * model.get_submodule(name).out_features)
        for name, factor in expected_sizes.items()
    }
    assert len(set(pattern.values())) > 1
