"""A model small enough to train in a test, under the name "tiny"."""

import contextlib
import importlib.util
from collections.abc import Iterator

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


@contextlib.contextmanager
def ligers_kernels_run() -> Iterator[None]:
    """Under Triton's interpreter, where Liger is installed and kernels are not compiled."""
    there = INTERPRETED and importlib.util.find_spec("liger_kernel") is not None
    with interpreted() if there else contextlib.nullcontext():
        yield


@pytest.fixture
def ligers_kernels():
    with ligers_kernels_run():
        yield
