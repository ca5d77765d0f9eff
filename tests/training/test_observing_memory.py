"""An observing layer adds the two states and, for as long as one backward of one layer lasts, one
dense gradient."""

import pytest
import torch

from bench.harness.live_bytes import LiveBytes
from losia_kernels import LoSiALinear
from losia_kernels import ops as losia_ops
from losia_kernels.parallel.ranks import Ranks, RowShard
from losia_kernels.training.importance import make_observer
from tests.tiny import paper

OUT, IN, TOKENS = 64, 96, 4
DENSE = 4 * OUT * IN


@pytest.fixture
def update_in_place(monkeypatch):
    """The kernel writes its two states and allocates nothing; eager torch on a CPU needs
    temporaries."""
    monkeypatch.setattr(
        losia_ops, "importance_update_", lambda importance, uncertainty, **_: importance.add_(1)
    )


def peaks(layers: int, observing: bool) -> list[int]:
    """Bytes at the peak of two forwards and backwards, above what was there before the first."""
    model = torch.nn.Sequential(
        *(
            LoSiALinear(
                IN if i % 2 == 0 else OUT, OUT if i % 2 == 0 else IN, False, rank_factor=1 / 8
            )
            for i in range(layers)
        )
    )
    observers = [make_observer(paper()) for _ in model]
    if observing:
        for layer, observer in zip(model, observers, strict=True):
            layer.observe_(
                lambda grad, layer=layer, observer=observer: observer.observe(
                    layer.weight, grad, 1.0, RowShard(Ranks(), layer.out_features)
                )
            )
    x = torch.randn(TOKENS, IN, requires_grad=True)
    found = []
    with LiveBytes() as live:
        for _ in range(2):
            live.restart_peak()
            model(x).sum().backward()
            found.append(live.peak)
    return found


def test_two_states_and_one_gradient_at_a_time(update_in_place):
    for layers in (2, 4):
        plain, observed = peaks(layers, False), peaks(layers, True)
        small = layers * TOKENS * (IN + OUT) * 4  # inputs kept whole
        # After the first backward both states of every layer are there; beside them one gradient,
        # whatever L is.
        extra = observed[1] - plain[1]
        assert layers * 2 * DENSE < extra < layers * 2 * DENSE + DENSE + small
