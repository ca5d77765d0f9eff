"""A model small enough to train in a test, under the name "tiny"."""

import pytest

from bench.speed.models import CONFIGS

TINY = {
    **{"model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "vocab_size": 96},
    **{"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4},
    "max_position_embeddings": 256,
}


@pytest.fixture
def tiny(monkeypatch) -> str:
    pytest.importorskip("transformers")
    monkeypatch.setitem(CONFIGS, "tiny", TINY)
    return "tiny"
