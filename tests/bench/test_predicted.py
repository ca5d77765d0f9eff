"""What a layer should take: that the sum is of what a step runs, and what the promise rests on."""

import json

import pytest

from bench.speed import predicted
from bench.speed.models import shape_of
from bench.speed.predicted import GPUS, Piece, added, gather, layer_us, over_floor
from tests.kernels.offline import OLDEST, run_offline

MODEL, TOKENS = "llama-2-7b", 8192
OVERLAPS = dict.fromkeys(shape_of(MODEL).linears, True)


def ratio(gpu: str, alignment: int, overlaps: dict[str, bool] = OVERLAPS) -> float:
    pieces = added(MODEL, TOKENS, 1 / 8, alignment, overlaps, {})
    return over_floor(MODEL, TOKENS, pieces, GPUS[gpu])


@pytest.mark.parametrize("alignment, target", [(1, 1.05), (16, 1.02)])
def test_the_layer_is_predicted_within_its_target(alignment, target):
    """On an H200, where copies and products overlap; an H100 has less bandwidth for as many
    operations."""
    assert 1.0 < ratio("H200", alignment) <= target
    assert ratio("H100", alignment) <= target + 0.01


def test_products_that_wait_for_copies_cost_what_they_take():
    assert ratio("H200", 1, dict.fromkeys(OVERLAPS, False)) > ratio("H200", 1) + 0.003


def test_what_a_kernel_takes():
    rates = GPUS["H200"]
    assert Piece("copy", 4.3e9, 0).us(rates) == pytest.approx(2 + 1000 / 0.92)
    assert Piece("cache", 0, 6e9).us(rates) == pytest.approx(2 + 1000 / 0.92)
    apart = Piece("product", 4.3e9, 0, 790e9, overlaps=False).us(rates)
    beside = Piece("product", 4.3e9, 0, 790e9, overlaps=True).us(rates)
    assert apart == pytest.approx(2 + 2000 / 0.92) and beside == pytest.approx(2 + 1000 / 0.92)


def test_one_gather_for_three_reads_memory_once():
    one, three = (gather(TOKENS, 4096, [512] * count, 1, "") for count in (1, 3))
    row = 2 * 4096 * TOKENS
    assert three.memory < row + 3 * row / 8 < 3 * one.memory
    assert three.to_cores == 3 * one.to_cores and three.launches == 1


def test_every_launch_of_a_step_is_in_it():
    pieces = added(MODEL, TOKENS, 1 / 8, 1, OVERLAPS, {})
    launches = {name: 0 for name in layer_us(pieces, GPUS["H200"])}
    for piece in pieces:
        launches[piece.name] += piece.launches
    assert launches["gathers of x"] == 4  # q k v, o, gate up, down
    assert launches["subnet gradients"] == launches["sums of splits"] == 7
    assert launches["gathers of dy"] == 1  # down_proj's, past 512 inputs
    assert launches["AdamW and scatter"] == 1 and launches["dx read in products"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("oldest", [False, True])
def test_the_machine_code_does_not_wait(oldest):
    """What the prediction takes from the compiler, with both tritons."""
    if oldest and not OLDEST.exists():
        pytest.skip(f"no {OLDEST}; make test fetches it")
    script = (
        "import json; from bench.speed.predicted import overlaps_of; "
        f"print(json.dumps([overlaps_of({MODEL!r}, 1 / 8, {TOKENS}, a) for a in (1, 16)]))"
    )
    found = json.loads(run_offline("-c", script, oldest=oldest))
    assert found == [OVERLAPS, OVERLAPS]


def test_the_report_says_what_it_is(monkeypatch):
    monkeypatch.setattr(predicted, "machine_code", lambda *size: True)
    text = predicted.report()
    assert text.startswith("PREDICTED") and "not measured" in text
    assert text.count("over the frozen floor") == 5
