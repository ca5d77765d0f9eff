"""A run whose blocks are compiled: how often they are, over moves and over turns to observe."""

import pytest
import torch._dynamo
from torch._dynamo.utils import counters

from losia_kernels import LoSiAAdamW, LoSiAConfig, apply_losia
from tests.tiny import make_batches, paper, take_step, tiny_lm

MODES = [
    pytest.param({"backend": "aot_eager"}, id="aot_eager"),
    pytest.param({"mode": "reduce-overhead"}, id="reduce-overhead", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize(
    "config, variants",
    [
        (LoSiAConfig(rank_factor=1 / 2, period=2), 1),
        (LoSiAConfig(rank_factor=1 / 2, period=2, moves="none"), 1),
        (paper(rank_factor=1 / 2, period=2), 2),
    ],
    ids=["random", "none", "importance"],
)
def test_blocks_are_compiled_once_for_each_kind_of_step(config, variants, options):
    """Without a break; only the first turn of a block to observe compiles it again."""
    torch._dynamo.reset()
    counters.clear()
    model = apply_losia(tiny_lm(), config)
    blocks = model.model.layers
    for block in blocks:
        block.compile(fullgraph=True, **options)
    optimizer = LoSiAAdamW(model, lr=0.01)
    for number, batch in enumerate(make_batches(9)):
        take_step(model, optimizer, batch)
        if number == 3:  # each block has observed and not observed by now
            assert counters["stats"]["unique_graphs"] == variants * len(blocks)
    assert counters["stats"]["unique_graphs"] == variants * len(blocks)
    assert not counters["graph_break"]
    assert optimizer.timeline.step == 9
    torch._dynamo.reset()
