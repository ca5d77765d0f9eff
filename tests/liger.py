"""Liger-Kernel's kernels under Triton's interpreter, which lacks three things that they use."""

import contextlib
import importlib
import sys
from collections.abc import Iterator

import numpy
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor, nn
from triton.runtime import interpreter


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Scalar floats reach a kernel as tensors, as on a GPU, libdevice's functions are there, and of
    bfloat16, on whose bits the interpreter computes, it sees float32."""
    convert, run = interpreter._implicit_cvt, interpreter.InterpretedFunction.run

    def convert_floats(argument):
        if type(argument) is not float:
            return convert(argument)
        handle = interpreter.TensorHandle(numpy.array([argument], numpy.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    def run_in_float32(self, *args, **kwargs):
        narrow: list[tuple[Tensor, Tensor]] = []

        def widen(argument):
            if not isinstance(argument, Tensor) or argument.dtype != torch.bfloat16:
                return argument
            narrow.append((argument, argument.detach().float()))
            return narrow[-1][1]

        run(self, *map(widen, args), **{name: widen(value) for name, value in kwargs.items()})
        for tensor, wide in narrow:
            tensor.data.copy_(wide)  # counted by nobody, as a kernel's writes

    def tanh(x):
        return 2 * tl.sigmoid(2 * x) - 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_implicit_cvt", convert_floats)
        patch.setattr(interpreter.InterpretedFunction, "run", run_in_float32)
        for name, function in (
            ("rms_norm.rsqrt", lambda x: tl.rsqrt(x)),
            ("geglu.tanh", tanh),
            ("cross_entropy.tanh", tanh),
        ):
            module, attribute = name.split(".")
            patch.setattr(
                importlib.import_module(f"liger_kernel.ops.{module}"), attribute, function
            )
        yield


@contextlib.contextmanager
def in_this_process_no_more(model: nn.Module) -> Iterator[None]:
    """Undoes what Liger changes for all models of ``model``'s kind, not what it changes in one."""
    modeling = vars(sys.modules[type(model).__module__])
    before, forward, loss = dict(modeling), type(model).forward, F.cross_entropy
    try:
        yield
    finally:
        modeling.update(before)
        type(model).forward, F.cross_entropy = forward, loss
