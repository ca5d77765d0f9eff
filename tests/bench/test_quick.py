"""The small table: rows beside their floors, a verdict that knows its spread, and nothing written unless asked."""

import json

import pytest
import torch

from bench.speed import quick

CPU = torch.device("cpu")


def row(name: str, median: float, spread: float = 0.0) -> dict:
    timing = {"ms": 10 * median, "low": 9.0, "high": 11.0}
    low, high = median * (1 - spread), median * (1 + spread)
    ratio = {"median": median, "low": low, "high": high}
    found = {"id": {"suite": "layer", "name": name}, "status": "ok", "floor_ms": 10.0}
    return {**found, "total": timing, "over_floor": ratio}


def test_the_tiny_model_is_measured_and_nothing_is_written(tiny, monkeypatch, tmp_path, capsys):
    pytest.importorskip("peft")
    monkeypatch.setattr(quick, "SECONDS", 0.01)
    monkeypatch.setattr(quick, "place", lambda device: (tiny, 1, 16))
    monkeypatch.chdir(tmp_path)
    assert quick.main(CPU) == 0 and not list(tmp_path.iterdir())
    said = capsys.readouterr().out
    for method in quick.METHODS_SHOWN:
        assert f"[layer] {method} model=tiny" in said
    assert "PEFT LoRA" in said and "over its floor" in said and "commit" in said
    assert "than PEFT LoRA r 64" in said and "to say so." in said
    assert quick.main(CPU, tmp_path / "rows.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {each["id"]["name"] for each in rows} == set(quick.METHODS_SHOWN)
    assert all(each["provenance"]["kind"] == "CPU" and each["floor_ms"] > 0 for each in rows)


@pytest.mark.parametrize(
    ("lora", "spread", "words"),
    [
        (1.25, 0.01, ("16.0 % faster", "the spread of 1.4 % allows")),
        (1.25, 0.2, ("16.0 % faster", "the spread of 28.3 % does not allow")),
        (1.0, 0.01, ("5.0 % slower", "allows")),
    ],
)
def test_the_verdict_is_of_the_mean_layer_and_knows_its_spread(lora, spread, words):
    """Of 20 layers one observes: (19 x 1.0 + 2.0) / 20."""
    ours = row("losia-pro-off", 1.0, spread), row("losia-pro", 2.0, spread)
    text = quick.report([*ours, row("lora", lora, spread)], layers=20)
    assert all(word in text for word in words)


def test_without_a_row_there_is_no_verdict():
    missing = {"id": {"suite": "layer", "name": "lora"}, "status": "missing"}
    text = quick.report([row("losia-pro", 1.0), row("losia-pro-off", 1.0), missing], layers=2)
    assert "No verdict" in text and "missing" in text
