"""Liger-Kernel's kernels under Triton's interpreter, which lacks two things that they use."""

import contextlib
import importlib
import sys
from collections.abc import Iterator

import numpy
import pytest
import torch.nn.functional as F
import triton.language as tl
from torch import nn
from triton.runtime import interpreter


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Scalar floats reach a kernel as tensors, as on a GPU, and libdevice's functions are there."""
    convert = interpreter._implicit_cvt

    def convert_floats(argument):
        if type(argument) is not float:
            return convert(argument)
        handle = interpreter.TensorHandle(numpy.array([argument], numpy.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    def tanh(x):
        return 2 * tl.sigmoid(2 * x) - 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_implicit_cvt", convert_floats)
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
