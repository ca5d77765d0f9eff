"""The tolerance rule, stated once: a kernel errs at most twice what plain torch errs in the same
dtype, plus 1e-6."""

import torch
from torch import Tensor

SLACK = 1e-6


def max_error(value: Tensor, truth: Tensor) -> float:
    """Largest absolute difference to the float64 ``truth``; 0 for empty tensors."""
    difference = (value.to("cpu", torch.float64) - truth.to("cpu")).abs()
    return difference.max().item() if difference.numel() else 0.0


def error_and_allowed(kernel: Tensor, plain: Tensor, truth: Tensor) -> tuple[float, float]:
    """``kernel`` and ``plain`` are the same result in the same dtype, ``truth`` is it from float64
    arithmetic."""
    assert truth.dtype == torch.float64, f"the truth is {truth.dtype}"
    assert (kernel.shape, kernel.dtype) == (plain.shape, plain.dtype)
    assert kernel.shape == truth.shape
    return max_error(kernel, truth), 2 * max_error(plain, truth) + SLACK


def assert_within(kernel: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Hold ``kernel`` to the rule; the arguments are those of ``error_and_allowed``."""
    error, allowed = error_and_allowed(kernel, plain, truth)
    # a NaN fails: it compares false; and from a plain form that is broken nothing follows
    assert error <= allowed < float("inf"), f"error {error:.3e}, allowed {allowed:.3e}"
