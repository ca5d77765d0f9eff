import numpy
import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_outputs(poison):
    """An element that a kernel forgets to write is NaN in every test of this folder."""


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def sparse_zeros(device):
    """``sparse_zeros(numel)``: float16 zeros; on the CPU they take memory only where they are
    touched."""

    def make(numel: int) -> torch.Tensor:
        if device == "cpu":
            return torch.from_numpy(numpy.zeros(numel, dtype=numpy.float16))
        return torch.zeros(numel, dtype=torch.float16, device=device)

    return make
