"""Importance as the analyses observe it."""

import itertools

import torch

from bench.methods.importance import observe
from tests.bench.quality_tiny import tiny_base, tiny_tasks


def test_importance_is_that_of_equation_3():
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
