"""Forward and backward of a micro-batch as one CUDA graph, captured anew whenever what they compute
changes."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .checks import parameters_of
from .timeline import Timeline

FIXED = (type(None), bool, int, float, str, torch.dtype, torch.device)  # what a graph may hold


class CapturedBackward:
    """``loss(*batch)`` and its backward, replayed as one CUDA graph where the model is on a GPU.

    The first batch of each shape is captured; a replay takes no host time for a layer. Gradients
    reach ``.grad`` through autograd, so hooks, accumulation, clipping and ``zero_grad`` are what
    they are without it; importance is observed, and ``in_backward`` updates. Everything is captured
    anew when other layers observe, which they never do unless subnets move by importance, and when
    parameters are exchanged, frozen or moved, or the model changes between training and evaluation.
    On a CPU it is ``loss(*batch).backward()``.

    Args:
        loss: gives the scalar to differentiate (divided and scaled as it is to be), and waits for
            nothing on the GPU. Autocast belongs inside.
        optimizer: LoSiAAdamW, or one that ``attach`` has been given.
        shapes: so many shapes of batches are captured at most; others run without a graph.

    Attributes:
        captures: how often a graph was captured.

    Raises:
        TypeError: the optimizer drives no model; a call: something in the batch is neither tensor
            nor number, or a tensor requires a gradient.
        ValueError: a call: the model is cut by fully_shard, or inside DistributedDataParallel, which
            reduce gradients inside the backward; its layers are on several devices; the loss is no
            scalar that requires a gradient.
        RuntimeError: a call: ``loss`` does what no graph can hold.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        shapes: int = 8,
    ):
        timeline = getattr(optimizer, "timeline", None)
        if not isinstance(timeline, Timeline):
            raise TypeError(
                f"CapturedBackward: the optimizer, a {type(optimizer).__name__}, drives no model: give "
                f"LoSiAAdamW, or call attach(optimizer, model) first"
            )
        self.captures = 0
        self._loss, self._optimizer, self._timeline = loss, optimizer, timeline
        self._shapes = shapes
        self._graphs: dict[tuple, _Graph] = {}  # by the shape of the batch
        self._made_for: tuple = ()
        self._parameters: list[Tensor] = []
        self._pool: Any = None
        self._stream: Any = None
        self._uncapturable = False  # for the time being

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one micro-batch.

        Args:
            args, kwargs: what ``loss`` takes: tensors, numbers and strings, in any nest of lists
                and dicts. Tensors are copied to the model's device.

        Returns:
            The loss, detached, a copy.
        """
        self._check_engine()
        device = self._timeline.layers[0].out_idx.device
        leaves, structure = tree_flatten(_as_dicts((args, kwargs)))
        shape = structure, *map(_shape_of, leaves)
        if not _has_graphs(device):
            return self._run(leaves, structure, device)
        if self._situation() != self._made_for:
            self._start_anew(device)
        if shape not in self._graphs:
            if self._uncapturable or len(self._graphs) == self._shapes:
                self._warn_of_shapes(shape)
                return self._run(leaves, structure, device)
            self._capture(shape, leaves, structure, device)
            if self._uncapturable:
                return self._run(leaves, structure, device)
        for layer in self._timeline.layers:
            layer.sync_before_use_(training=True)  # as its forward would
        return self._graphs[shape].replay(leaves)

    def _run(self, leaves: list[Any], structure: TreeSpec, device: torch.device) -> Tensor:
        here = [each.to(device) if isinstance(each, Tensor) else each for each in leaves]
        loss = _checked(_call(self._loss, here, structure))
        loss.backward()
        return loss.detach()

    def _check_engine(self) -> None:
        timeline = self._timeline
        if isinstance(timeline.model, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "CapturedBackward: DistributedDataParallel reduces gradients inside the backward: call "
                "the module inside it, and all-reduce the gradients before step(); or "
                "torch.compile(mode='reduce-overhead')"
            )
        if timeline.placement.cut:
            raise ValueError(
                "CapturedBackward: fully_shard gathers weights inside forward and backward, which no "
                "graph of one device holds"
            )

    # when to capture ------------------------------------------------------------------------------

    def _situation(self) -> tuple:
        """What a graph was captured of: it goes on reading these addresses, and observing these
        layers."""
        timeline = self._timeline
        return (
            tuple(timeline.observers),
            tuple(layer.lies_at() for layer in timeline.layers),
            tuple((p.data_ptr(), p.requires_grad) for p in self._parameters),
            timeline.model.training,
            torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        )

    def _start_anew(self, device: torch.device) -> None:
        devices = {layer.out_idx.device for layer in self._timeline.layers}
        if len(devices) > 1:
            raise ValueError(
                f"CapturedBackward: the model's layers are on {', '.join(sorted(map(str, devices)))}: a "
                f"graph is captured on one device; put the model on one, or call loss().backward()"
            )
        self._graphs.clear()  # before a new pool: their memory is free then
        self._uncapturable = False
        found = [*self._timeline.model.parameters(), *parameters_of(self._optimizer)]
        self._parameters = list(dict.fromkeys(found))
        self._made_for = self._situation()
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # torch's own would be the current device's

    def _capture(
        self, shape: tuple, leaves: list[Any], structure: TreeSpec, device: torch.device
    ) -> None:
        """Nothing that happens here counts: no gradient is given to anybody, and random numbers are
        those of the replay that follows."""
        direct: list[Any] = []  # what is shown past autograd, once and for all
        observing = list(self._timeline.observers)
        callbacks = [layer.observe_callback for layer in observing]
        for layer in observing:
            layer.observe_callback = direct.append
        caching = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # a cast kept from before would not be replayed
        try:
            graph = _Graph(self._loss, leaves, structure, device)
            graph.warm_up(self._stream)
            self._uncapturable = bool(direct)
            if not direct:
                graph.capture(self._pool, self._stream)
                self._graphs[shape] = graph
                self.captures += 1
        finally:
            torch.set_autocast_cache_enabled(caching)
            for layer, callback in zip(observing, callbacks, strict=True):
                layer.observe_callback = callback

    def _warn_of_shapes(self, shape: tuple) -> None:
        if not self._uncapturable:
            warnings.warn(
                f"CapturedBackward: a batch of another shape than the {self._shapes} captured ones "
                f"runs without a graph: {shape[1:]}. Pad batches to a few lengths, and give numbers "
                f"that change as tensors; shapes= captures more",
                stacklevel=3,
            )


class _Graph:
    """What was captured for one shape: the memory that a batch is copied to, the graph, the loss, and
    the gradient of each leaf."""

    def __init__(
        self,
        loss: Callable[..., Tensor],
        leaves: list[Any],
        structure: TreeSpec,
        device: torch.device,
    ):
        self._function, self._structure, self._device = loss, structure, device
        self._batch = [
            torch.empty_like(each, device=device).copy_(each) if isinstance(each, Tensor) else each
            for each in leaves
        ]

    def warm_up(self, beside: Any) -> None:
        """Compile kernels, and let libraries make what they make once."""
        now = torch.cuda.current_stream(self._device)
        beside.wait_stream(now)
        with torch.random.fork_rng(devices=[self._device]), torch.cuda.stream(beside):
            self._differentiate()
        now.wait_stream(beside)

    def capture(self, pool: Any, stream: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # a loader's thread that pins memory does not break the capture
        how = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.graph(self._graph, **how):
                self._loss, self._leaves, self._grads = self._differentiate()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"CapturedBackward: no graph can hold what the loss does: {error}. It must not wait for "
                f"the GPU: no .item(), no branch on a tensor's value, no shape that depends on one"
            ) from error

    def _differentiate(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        with torch.enable_grad():
            loss = _checked(_call(self._function, self._batch, self._structure))
            leaves = list(_leaves_of(loss))
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        found = [(leaf, grad) for leaf, grad in zip(leaves, grads, strict=True) if grad is not None]
        return loss.detach(), [leaf for leaf, _ in found], [grad for _, grad in found]

    def replay(self, leaves: list[Any]) -> Tensor:
        for here, given in zip(self._batch, leaves, strict=True):
            if isinstance(here, Tensor):
                here.copy_(given, non_blocking=True)
        self._graph.replay()
        # a backward of its own, for hooks; .grad gets copies, which the next replay leaves alone
        torch.autograd.backward(self._leaves, self._grads)
        return self._loss.clone()


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def _call(function: Callable[..., Tensor], leaves: list[Any], structure: TreeSpec) -> Tensor:
    args, kwargs = tree_unflatten(leaves, structure)
    return function(*args, **kwargs)


def _checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        what = type(loss).__name__
        if isinstance(loss, Tensor):
            what = f"{tuple(loss.shape)}, requires_grad={loss.requires_grad}"
        raise ValueError(
            f"CapturedBackward: loss must return a scalar tensor that requires a gradient, got {what}"
        )
    return loss


def _as_dicts(tree: Any) -> Any:
    """transformers' BatchEncoding and its like as dicts, whose tensors torch finds."""
    if isinstance(tree, (list, tuple)) and not hasattr(tree, "_fields"):
        return type(tree)(map(_as_dicts, tree))
    if isinstance(tree, Mapping):
        return {key: _as_dicts(value) for key, value in tree.items()}
    return tree


def _shape_of(leaf: Any) -> tuple:
    if isinstance(leaf, Tensor):
        if leaf.requires_grad:
            raise TypeError(
                f"CapturedBackward: a tensor {tuple(leaf.shape)} of the batch requires a gradient, "
                f"which no graph would give it"
            )
        return tuple(leaf.shape), leaf.dtype, leaf.stride()
    if not isinstance(leaf, FIXED):
        raise TypeError(
            f"CapturedBackward: a batch holds tensors, numbers and strings, got a {type(leaf).__name__}"
        )
    return type(leaf), leaf


def _leaves_of(loss: Tensor) -> Iterator[Tensor]:
    """All that a backward of ``loss`` would give a gradient, each once."""
    seen: set[Any] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [following for following, _ in node.next_functions]
