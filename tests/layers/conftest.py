"""Layers that share an input, on a CPU as on a GPU."""

import pytest
from torch import Tensor

from losia_kernels.layers import linear
from losia_kernels.ops import gather


@pytest.fixture
def gathers(monkeypatch) -> list[Tensor]:
    """The indices of every gather that is run."""
    found: list[Tensor] = []
    plain = gather.gather_features_plain

    def counted(x: Tensor, idx: Tensor) -> Tensor:
        found.append(idx)
        return plain(x, idx)

    monkeypatch.setattr(gather, "gather_features_plain", counted)
    return found


@pytest.fixture
def together(monkeypatch) -> None:
    monkeypatch.setattr(linear, "pays", lambda x: True)
