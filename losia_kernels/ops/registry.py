"""How an op is registered, and the checks that the ops share."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class Op(Protocol[P, Result_co]):
    """A registered op: called as the function it was made from; ``register_fake`` takes its shapes
    without data."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Result_co: ...

    def register_fake(self, fake: Callable[..., Any]) -> Any: ...


def register(
    name: str, mutates_args: tuple[str, ...]
) -> Callable[[Callable[P, Result]], Op[P, Result]]:
    """``torch.library.custom_op(name)``, called past torch's dispatcher where nobody listens to it.

    Dispatching an op written in Python takes longer than the work of a small layer. Autograd,
    tracing (compile, export, fake tensors) and dispatch modes need it; inside a backward or an
    optimizer's step there is mostly none of them. Either way the same implementation runs, and the
    arguments it mutates get a new version.
    """

    def wrap(implementation: Callable[P, Result]) -> Op[P, Result]:
        op = torch.library.custom_op(name, implementation, mutates_args=mutates_args)
        parameters = list(inspect.signature(implementation).parameters)
        mutated = [(parameters.index(argument), argument) for argument in mutates_args]

        @functools.wraps(implementation)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or torch.is_grad_enabled() or not _is_plain(args):
                return op(*args, **kwargs)
            result = implementation(*args, **kwargs)
            for position, argument in mutated:
                tensors = args[position] if position < len(args) else kwargs[argument]
                torch.autograd.graph.increment_version(tensors)
            return result

        registered: Any = call
        registered.register_fake = op.register_fake
        return registered

    return wrap


def _is_plain(args: tuple) -> bool:
    """Whether no mode and no subclass (fake tensors, DTensor) waits for the call."""
    first = args[0] if args else None
    first = first[0] if isinstance(first, list) and first else first
    return type(first) in (Tensor, nn.Parameter) and not torch._C._len_torch_dispatch_stack()


def invalid(op: str, problem: str) -> ValueError:
    return ValueError(f"losia_kernels.ops.{op}: {problem}")


def check(condition: bool, op: str, problem: str) -> None:
    """For what is cheap to say; on a hot path ``if ...: raise invalid(...)`` words the problem only
    when there is one."""
    if not condition:
        raise invalid(op, problem)


def check_index(op: str, name: str, idx: Tensor | None, like: Tensor) -> None:
    """Shape, dtype and device only: reading the values would wait for the GPU. ``Subnet`` checks
    those."""
    if idx is None:
        return
    if idx.dim() != 1 or idx.dtype != torch.int64:
        raise invalid(op, f"{name} must be a 1-D int64 tensor, got {tuple(idx.shape)} {idx.dtype}")
    if idx.device != like.device:
        raise invalid(op, f"{name} is on {idx.device}, the data on {like.device}")


def check_alignment(op: str, alignment: int, *indices: Tensor | None) -> None:
    """Lengths only, as ``check_index``: a device takes the promise at its word."""
    if alignment == 1:
        return
    for size in (idx.shape[0] for idx in indices if idx is not None):
        if alignment < 1 or size % alignment:
            raise invalid(
                op, f"{size} indices are no runs of {alignment}: alignment is 1 where they are none"
            )


def check_same(op: str, names: str, *tensors: Tensor, dtype: bool = True) -> None:
    first = tensors[0]
    for tensor in tensors[1:]:
        if tensor.shape != first.shape:
            raise invalid(
                op, f"{names} must have one shape, got {[tuple(t.shape) for t in tensors]}"
            )
        if tensor.device != first.device:
            raise invalid(op, f"{names} are on {[str(t.device) for t in tensors]}")
        if dtype and tensor.dtype != first.dtype:
            raise invalid(op, f"{names} have dtypes {[t.dtype for t in tensors]}")
