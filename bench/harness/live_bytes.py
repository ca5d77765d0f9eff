"""Bytes of live tensors, counted at every operation: peak memory without a GPU, also of tensors that do not exist."""

import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LiveBytes(TorchDispatchMode):
    """Counts each storage from its first appearance as a result to its release.

    Under ``FakeTensorMode`` it says what a run would hold, by shapes alone. What an operation allocates inside itself
    (a workspace of cuBLAS, a temporary of a custom op) is not seen; ``torch.cuda.max_memory_allocated`` sees it."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def restart_peak(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._see, result)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "meta":  # a shape, not even of a run without contents
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class SavedBytes:
    """Bytes that autograd keeps for the backward, each storage once, without those of ``known`` tensors (weights)."""

    def __init__(self, known: list[torch.Tensor]):
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        # holding them keeps their addresses from being reused
        self._saved: dict[int, torch.UntypedStorage] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> "SavedBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._saved[storage._cdata] = storage
        return tensor

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self._saved.values())


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Peak of ``run()`` above its start: the allocator's on a GPU, of live tensors on a CPU."""
    if device.type != "cuda":
        with LiveBytes() as live:
            run()
        return live.peak
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
