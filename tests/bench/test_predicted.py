"""What a layer should take: that the sum is of what a step runs, and what the promise rests on."""

import dataclasses
import json

import pytest

from bench.speed import predicted
from bench.speed.models import DEFAULT, PAPER, Layer
from bench.speed.predicted import GPUS, LAYERS, Piece, added, gather, layer_us, over_floor
from bench.speed.results import RESULTS
from losia_kernels import LoSiAConfig, LoSiALinear, apply_losia
from tests.kernels.offline import OLDEST, run_offline

TOKENS = PAPER.tokens
OVERLAPS = dict.fromkeys(PAPER.linears, True)


def ratio(gpu: str, layer: Layer, overlaps: dict[str, bool] = OVERLAPS) -> float:
    return over_floor(layer, added(layer, overlaps), GPUS[gpu])


@pytest.mark.parametrize("layer", [PAPER, DEFAULT], ids=str)
@pytest.mark.parametrize("alignment, target", [(1, 1.05), (16, 1.02)])
def test_the_layer_is_predicted_within_its_target(layer, alignment, target):
    """On an H200, where copies and products overlap; an H100 has less bandwidth for as many
    operations."""
    layer = dataclasses.replace(layer, alignment=alignment)
    assert 1.0 < ratio("H200", layer) <= target
    assert ratio("H100", layer) <= target + 0.01


def test_the_default_layer_is_the_config_s():
    """Its subnets, and which of its layers keep their input whole."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    config = LoSiAConfig()
    assert (config.rank_factor, config.shape) == (DEFAULT.rank_factor, DEFAULT.shape)
    apply_losia(model, config)
    found = {n.split(".")[-1]: m for n, m in model.named_modules() if isinstance(m, LoSiALinear)}
    for name, (out, inner) in DEFAULT.linears.items():
        k_out, k_in = DEFAULT.subnets[name]
        layer = found[name]
        shares = [k / size for k, size in zip(layer.subnet.shape, layer.weight.shape, strict=True)]
        assert shares == pytest.approx([k_out / out, k_in / inner], rel=0.1)
        assert layer.keeps_input == DEFAULT.keeps_input(name)


def test_products_that_wait_for_copies_cost_what_they_take():
    assert ratio("H200", PAPER, dict.fromkeys(OVERLAPS, False)) > ratio("H200", PAPER) + 0.003


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


def launches(layer: Layer) -> dict[str, int]:
    pieces = added(layer, OVERLAPS)
    found = {name: 0 for name in layer_us(pieces, GPUS["H200"])}
    for piece in pieces:
        found[piece.name] += piece.launches
    return found


def test_every_launch_of_a_step_is_in_it():
    found = launches(PAPER)
    assert found["gathers of x"] == 4  # q k v, o, gate up, down
    assert found["subnet gradients"] == found["sums of splits"] == 7
    assert found["gathers of dy"] == 1  # down_proj's, past 512 inputs
    assert found["AdamW and scatter"] == 1 and found["dx read in products"] == 0


def test_of_an_input_that_is_kept_whole_the_longer_side_is_read_in_the_product():
    found = launches(DEFAULT)
    assert found["gathers of x"] == 2  # o, down
    assert found["gathers of dy"] == 5 and found["subnet gradients"] == 7


@pytest.mark.slow
@pytest.mark.parametrize("oldest", [False, True])
def test_the_machine_code_does_not_wait(oldest):
    """What the prediction takes from the compiler, with both tritons."""
    if oldest and not OLDEST.exists():
        pytest.skip(f"no {OLDEST}; make test fetches it")
    script = (
        "import json; from bench.speed.predicted import LAYERS, overlaps_of; "
        "print(json.dumps([overlaps_of(layer) for layer in LAYERS[:4]]))"
    )
    found = json.loads(run_offline("-c", script, oldest=oldest))
    assert found == [OVERLAPS] * 4


def test_the_report_says_what_it_is(monkeypatch):
    monkeypatch.setattr(predicted, "code_overlaps", lambda *which: True)
    text = predicted.report()
    assert text.startswith("PREDICTED") and "not measured" in text
    assert text.count("over the frozen floor") == len(LAYERS)
    committed = (RESULTS / "predicted.txt").read_text()
    assert committed == f"{text}\n", "run python -m bench predicted > bench/results/predicted.txt"
