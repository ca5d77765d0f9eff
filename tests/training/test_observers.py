"""A gradient that an observer sees in blocks of outputs is the gradient that it sees whole."""

import pytest
import torch

from losia_kernels.config import IMPORTANCES
from losia_kernels.parallel.ranks import Ranks, RowShard
from losia_kernels.training.importance import make_observer
from tests.tiny import paper

ROWS = RowShard(Ranks(), 11)


@pytest.mark.parametrize("kind", IMPORTANCES)
@pytest.mark.parametrize(
    "blocks", [[slice(0, 4), slice(4, 8), slice(8, 11)], [slice(0, 11)]], ids=["three", "one"]
)
def test_blocks_of_outputs(kind, blocks):
    torch.manual_seed(0)
    config = paper(importance=kind, importance_beta1=0.7)
    whole, parts = make_observer(config), make_observer(config)
    weight = torch.randn(11, 5, dtype=torch.float64)
    for _ in range(3):
        grad = torch.randn(11, 5, dtype=torch.float64)
        whole.observe(weight, grad, 0.5, ROWS)
        for outputs in blocks:
            parts.observe(weight, grad[outputs], 0.5, ROWS, outputs)
    assert whole.tensors.keys() == parts.tensors.keys()
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(parts.tensors[name], tensor)
    assert whole.select(3, 2, ROWS, alignment=1).shape == (3, 2)
