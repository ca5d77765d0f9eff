"""What a layer keeps of its input: its neurons, gathered once for all layers that read the input,
and nothing where it would be thrown away."""

import functools
import weakref
from collections.abc import Sequence
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
    """Whether one gather for several layers is faster: a CPU's products want what lies together."""
    return x.is_cuda


class SharedInput:
    """Layers that read one input, of which the first gathers for all: their indices, one after the
    other, are one index, and what each keeps is a view.

    Who shares is known from names. A layer that does not come for its part costs its gather, until
    the others no longer wait for it.
    """

    def __init__(self, layers: Sequence[Any]):
        self._layers = [weakref.ref(layer) for layer in layers]
        self._use: _Use | None = None
        self._index: tuple[list[tuple[Tensor, int]], Tensor] | None = None
        self._wasted = 0

    def gather(self, layer: Any, x: Tensor) -> Tensor:
        """``ops.gather_features(x, layer.in_idx)``, the part of ``layer``."""
        use = self._use
        part = use.take(layer, x) if use is not None else None
        if part is not None and use is not None:
            if not use.parts:
                self._use, self._wasted = None, 0
            return part
        if use is not None and use.parts:
            self._wasted += 1
        layers = [each for ref in self._layers if (each := ref()) is not None and each.gathers]
        if self._wasted >= _WASTED or len(layers) < 2 or layer not in layers:
            self._use = None
            return ops.gather_features(x, layer.in_idx, layer.alignment)
        gathered = ops.gather_features(x, self._indices(layers), layer.alignment)
        sizes = [padded(len(each.in_idx)) for each in layers]
        parts = {
            each: part[..., : len(each.in_idx)]
            for each, part in zip(layers, gathered.split(sizes, dim=-1), strict=True)
        }
        own = parts.pop(layer)
        self._use = _Use(x, parts)
        return own

    def _indices(self, layers: Sequence[Any]) -> Tensor:
        """Those of ``layers``, each filled up to a row's length; made anew when one of them was
        written."""
        indices = [each.in_idx for each in layers]
        if self._index is None or not _unchanged(self._index[0], indices):
            filled = [F.pad(idx, (0, padded(len(idx)) - len(idx))) for idx in indices]
            self._index = [(idx, idx._version) for idx in indices], torch.cat(filled)
        return self._index[1]


def _unchanged(seen: Sequence[tuple[Tensor, int]], indices: Sequence[Tensor]) -> bool:
    return len(seen) == len(indices) and all(
        idx is now and version == now._version
        for (idx, version), now in zip(seen, indices, strict=True)
    )


class _Use:
    """One input, as it was when it was gathered from, and the parts not taken yet."""

    def __init__(self, x: Tensor, parts: dict[Any, Tensor]):
        self._x, self._version, self.parts = weakref.ref(x), x._version, parts

    def take(self, layer: Any, x: Tensor) -> Tensor | None:
        if self._x() is not x or self._version != x._version:
            return None
        return self.parts.pop(layer, None)
