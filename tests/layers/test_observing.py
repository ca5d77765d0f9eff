"""A gradient that an observer sees in blocks of outputs is the gradient that it sees whole."""

import pytest
import torch

from losia_kernels.training.importance import (
    GradientObserver,
    MarginalObserver,
    SensitivityObserver,
)

OBSERVERS = {
    "sensitivity": lambda: SensitivityObserver(0.7, 0.85),
    "sensitivity_bfloat16": lambda: SensitivityObserver(0.7, 0.85, torch.bfloat16),
    "gradient": GradientObserver,
    "marginal": lambda: MarginalObserver(0.7),
}


@pytest.mark.parametrize("kind", OBSERVERS)
@pytest.mark.parametrize(
    "blocks", [[slice(0, 4), slice(4, 8), slice(8, 11)], [slice(0, 11)]], ids=["three", "one"]
)
def test_blocks_of_outputs(kind, blocks):
    torch.manual_seed(0)
    whole, parts = OBSERVERS[kind](), OBSERVERS[kind]()
    weight = torch.randn(11, 5, dtype=torch.float64)
    for _ in range(3):
        grad = torch.randn(11, 5, dtype=torch.float64)
        whole.update(weight, grad, 0.5)
        for outputs in blocks:
            parts.update(weight, grad[outputs], 0.5, outputs=outputs)
    assert whole.tensors.keys() == parts.tensors.keys()
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(parts.tensors[name], tensor)
    assert whole.select(3, 2).shape == (3, 2)
