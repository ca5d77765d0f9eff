"""A GPU on paper: torch's answers about it are invented, and every tensor that asks for one is made
on the CPU.

``python -m tests.bench.pretended -m MODULE ARGUMENTS`` runs a module of ``bench`` so, and pytest as
it is."""

import contextlib
import runpy
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bench.harness import provenance, timing
from bench.harness.jobs import MissingPeer
from bench.harness.timing import Roof
from bench.methods.base import import_peer
from bench.speed import layer, model, ops
from bench.speed.models import CONFIGS
from tests.bench.conftest import TINY, ligers_kernels_run

SMI = "1980, 1980, 2619, 700.00, 45\n"


class MadeOnTheCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


class Event:
    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.seconds - self.seconds)


class Allocator:
    """What ``torch.cuda`` says of memory: 3 GB, and a peak of ``peak`` bytes since the last
    reset."""

    def __init__(self):
        self.peak, self.resets = 5 * 10**9, 0

    def reset(self) -> None:
        self.resets += 1


@contextlib.contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The models tiny; gives the allocator and the cycles that it was asked to spin."""
    # before they are told of a GPU, which their own dependencies would look into
    for peer in ("peft", "galore_torch", "liger_kernel.transformers"):
        with contextlib.suppress(MissingPeer):
            import_peer(peer)
    allocator, spins = Allocator(), []
    sizes = {"L2_cache_size": 2**14, "total_memory": 140 * 10**9, "multi_processor_count": 132}
    properties = SimpleNamespace(**sizes, uuid="1-2", major=9, minor=0)
    said = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda: 3 * 10**9,
        "max_memory_allocated": lambda: allocator.peak,
        "reset_peak_memory_stats": allocator.reset,
        "get_device_properties": lambda device: properties,
        "get_device_name": lambda device: "NVIDIA Pretended",
        "Event": Event,
        "_sleep": spins.append,
    }
    for name, answer in said.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    # a CUDA build of torch would look for the device, to see whether it captures a graph
    monkeypatch.setattr(
        torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None
    )
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    for name, config in CONFIGS.items():
        kind = {"model_type": config["model_type"], "head_dim": 16}
        monkeypatch.setitem(CONFIGS, name, {**config, **TINY, **kind})
    for module in (layer, model):
        monkeypatch.setattr(module, "GPU_BATCH", 2)
        monkeypatch.setattr(module, "GPU_CONTEXT", 8)
    monkeypatch.setattr(model, "GATE_TOKENS", 8)
    with ligers_kernels_run(), MadeOnTheCpu():
        yield SimpleNamespace(allocator=allocator, spins=spins)


def make_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two repetitions, two sets of inputs, and no roof to measure."""
    real = timing.samples

    def samples(phases, device, seconds=1.0, repeats=None, warmup=1, hide_launch=False):
        return real(phases, device, repeats=2, warmup=1, hide_launch=hide_launch)

    monkeypatch.setattr(timing, "samples", samples)
    monkeypatch.setattr(layer, "samples", samples)
    monkeypatch.setattr(layer, "rotation", lambda size, device: 2)
    monkeypatch.setattr(ops, "measure_roof", lambda device, dtype: Roof(10.0, 0.1))


def main(words: list[str]) -> None:
    _, module, *sys.argv[1:] = words
    if module == "pytest":
        runpy.run_module("pytest", run_name="__main__")
    with pytest.MonkeyPatch.context() as monkeypatch, pretended(monkeypatch):
        make_fast(monkeypatch)
        monkeypatch.setattr(provenance, "_clocks_at_work", lambda device: "some")
        monkeypatch.setattr(provenance, "_nvidia_smi", lambda query, device: SMI.strip())
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
