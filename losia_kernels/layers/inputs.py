"""What a layer keeps of its input: its neurons, gathered once for all layers that read the input,
and nothing where it would be thrown away."""

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..kernels.launch import padded

# pack of torch's non-reentrant checkpoint: it keeps no tensor, and runs the forward again
_PACKS_NOTHING = "_checkpoint_hook.__init__.<locals>.pack_hook"
_WASTED = 2  # uses in a row in which a layer did not take its part


def is_recomputed() -> bool:
    """Whether what a forward saves at this moment is thrown away, and saved when it runs again.

    False wherever that is not certain.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and getattr(hooks[0], "__qualname__", "") == _PACKS_NOTHING


def stand_in(x: Tensor, k: int) -> Tensor:
    """For ``x[..., idx]`` where nobody keeps it: of its shape and without its memory."""
    return _nan(x.dtype, x.device).expand(*x.shape[:-1], k)


@functools.cache
def _nan(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), torch.nan, dtype=dtype, device=device)


def pays(x: Tensor) -> bool:
    """Whether layers do together what they do with ``x``: on a CPU one gather for several is no
    faster, and of an inference tensor nobody counts the writes."""
    return x.is_cuda and not x.is_inference()


class SharedInput:
    """Layers that read one input: the first one gathers for all, and their backwards form one sum.

    Who shares is known from names, and held to the tensor itself in every forward. A layer that
    does not come for its part costs its gather, until the others no longer wait for it.
    """

    def __init__(self, layers: Sequence[Any]):
        self._layers = [weakref.ref(layer) for layer in layers]
        self._use: weakref.ref[Use] | None = None
        self._parts: tuple[Use, dict[Any, Tensor]] | None = None  # gathered, and not taken yet
        self._index: tuple[list[tuple[Tensor, int]], Tensor] | None = None
        self._wasted = 0

    def use(self, x: Tensor) -> "Use":
        """The one that the layers before made of ``x`` as it is, or a new one."""
        use = None if self._use is None else self._use()
        if use is None or not use.is_of(x):
            use = Use(x)
            self._use = weakref.ref(use)
        return use

    def gather(self, layer: Any, x: Tensor, use: "Use") -> Tensor:
        """``ops.gather_features(x, layer.in_idx)``, the part of ``layer``."""
        left = self._parts
        if left is not None and left[0] is use and layer in left[1]:
            part = left[1].pop(layer)
            if not left[1]:
                self._parts, self._wasted = None, 0
            return part
        if left is not None:
            self._parts = None
            self._wasted += 1
        layers = [each for ref in self._layers if (each := ref()) is not None and each.gathers]
        if self._wasted >= _WASTED or len(layers) < 2 or layer not in layers:
            return ops.gather_features(x, layer.in_idx, layer.alignment)
        gathered = ops.gather_features(x, self._indices(layers), layer.alignment)
        sizes = [padded(len(each.in_idx)) for each in layers]
        parts = {
            each: part[..., : len(each.in_idx)]
            for each, part in zip(layers, gathered.split(sizes, dim=-1), strict=True)
        }
        own = parts.pop(layer)
        self._parts = use, parts
        return own

    def _indices(self, layers: Sequence[Any]) -> Tensor:
        """Those of ``layers``, each filled up to a row's length; made anew when one of them was
        written."""
        indices = [each.in_idx for each in layers]
        captured = pays(indices[0]) and torch.cuda.is_current_stream_capturing()
        if not captured and self._index is not None and _unchanged(self._index[0], indices):
            return self._index[1]
        together = torch.cat([F.pad(idx, (0, padded(len(idx)) - len(idx))) for idx in indices])
        if not captured:  # a graph reads the indices anew in each replay
            self._index = [(idx, idx._version) for idx in indices], together
        return together


def _unchanged(seen: Sequence[tuple[Tensor, int]], indices: Sequence[Tensor]) -> bool:
    return len(seen) == len(indices) and all(
        idx is now and version == now._version
        for (idx, version), now in zip(seen, indices, strict=True)
    )


class Use:
    """One tensor as several layers read it: their shares of its gradient are summed in the products
    that form them, where autograd would add tensors.

    In each backward the layers that it will run are known before the first of them returns; the
    last one to run returns the sum, the others nothing. Who does not run is not waited for, and a
    backward that ends before a sum does raises: no share can be lost.
    """

    def __init__(self, x: Tensor):
        self._x, self._version = weakref.ref(x), x._version
        self._nodes: list[weakref.ref[Any]] = []
        self._sums: dict[int, _Sum] = {}  # by the number of the backward

    def is_of(self, x: Tensor) -> bool:
        return self._x() is x and self._version == x._version

    def join(self, node: Any) -> None:
        """``node`` is a layer's step in the backward."""
        self._nodes.append(weakref.ref(node))

    def add(self, dy: Tensor, weight: Tensor) -> Tensor | None:
        """``dy @ weight`` and what the others have added in this backward; None while some are yet
        to come."""
        task = torch._C._current_graph_task_id()
        traced = torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()
        if task == -1 or traced or len(self._nodes) < 2:
            return dy @ weight
        known = self._sums.get(task)
        if known is None:
            nodes = [node for ref in self._nodes if (node := ref()) is not None]
            known = _Sum(sum(map(torch._C._will_engine_execute_node, nodes)), dy @ weight)
            if known.left > 1:
                self._sums[task] = known
                queue = torch.autograd.Variable._execution_engine.queue_callback
                queue(functools.partial(self._check_whole, task))
        else:
            known.total.view(-1, weight.shape[1]).addmm_(dy.reshape(-1, dy.shape[-1]), weight)
        known.left -= 1
        if known.left > 0:
            return None
        self._sums.pop(task, None)
        return known.total

    def _check_whole(self, task: int) -> None:
        known = self._sums.pop(task, None)
        if known is not None:
            raise RuntimeError(
                f"{known.left} of the layers that read one input did not take part in a backward "
                f"that was to run them: its gradient would be wrong. Set shared_input of these "
                f"layers to None, and please report how the backward was run"
            )


@dataclass
class _Sum:
    left: int  # layers that have not added to it
    total: Tensor  # [..., in]
