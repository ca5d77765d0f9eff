"""A model small enough to train in a test, under the name "tiny"."""

import importlib.util

import pytest

from bench.speed.models import CONFIGS
from tests.conftest import INTERPRETED
from tests.liger import interpreted

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


@pytest.fixture
def ligers_kernels():
    """Liger's run, under Triton's interpreter."""
    if not INTERPRETED or importlib.util.find_spec("liger_kernel") is None:
        yield
        return
    with interpreted():
        yield
