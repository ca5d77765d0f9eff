"""CUDA graphs without CUDA: what runs between capture's begin and end is recorded, operation by
operation, and a replay runs it again into the memory of then.

As with real ones nothing counts that was computed during the capture: its results are destroyed,
so that only a replay fills them; and what waits for the GPU is refused.
"""

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from losia_kernels.training import capture, pending

WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item")


class Graph(TorchDispatchMode):
    """In the place of ``torch.cuda.CUDAGraph``."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []
        self.made: list[Tensor] = []
        self.replays = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(word in str(func) for word in WAITING) and not looks_at_labels():
            raise RuntimeError(f"{func} waits: operation not permitted when stream is capturing")
        before = {storage_of(each) for each in tensors_in((args, kwargs))}
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        self.made += [each for each in tensors_in(result) if storage_of(each) not in before]
        return result

    @torch.no_grad()
    def destroy_results(self) -> None:
        for tensor in self.made:
            if tensor.is_floating_point():
                tensor.detach().fill_(torch.nan)

    def replay(self) -> None:
        assert not torch._C._len_torch_dispatch_stack()
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, then in self.calls:
                now = func(*args, **kwargs)
                for old, new in zip(tensors_in(then), tensors_in(now), strict=True):
                    if storage_of(old) != storage_of(new):  # else a view, or written in place
                        old.detach().copy_(new)


class Stream:
    def __init__(self, device: torch.device):
        self.device = device

    def wait_stream(self, other: "Stream") -> None: ...


def looks_at_labels() -> bool:
    """The fused loss reads labels on the CPU alone, where these are."""
    return any(frame.name == "losia_linear_cross_entropy" for frame in traceback.extract_stack())


def tensors_in(tree: Any) -> list[Tensor]:
    return [each for each in tree_leaves(tree) if isinstance(each, Tensor)]


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@pytest.fixture
def graphs(monkeypatch) -> list[Graph]:
    """The graphs that are captured, in order; the model stays on the CPU."""
    captured: list[Graph] = []
    capturing: list[Graph] = []

    @contextlib.contextmanager
    def graph(graph: Graph, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local" and pool is not None and not capturing
        assert stream.device == torch.device("cpu")  # the model's, not the current one
        capturing.append(graph)
        try:
            with torch.random.fork_rng(devices=[]), graph:
                yield
            graph.destroy_results()
            captured.append(graph)
        finally:
            capturing.clear()

    for name, answer in {
        "CUDAGraph": Graph,
        "graph": graph,
        "graph_pool_handle": object,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: bool(capturing),
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    fork = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices=(), **more: fork([], **more))
    monkeypatch.setattr(capture, "_has_graphs", lambda device: True)
    monkeypatch.setattr(pending, "_is_captured", lambda tensor: bool(capturing))
    return captured
