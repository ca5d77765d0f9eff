"""Timing with medians and spread, inputs rotated past the cache, and the gates without which there
is no figure."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

SLACK = 1e-6
MAX_REPEATS = 200
MOST_CYCLES = 2.1e9  # a second, of a GPU's fastest clock
CPU_CACHE = 32 * 2**20


class RedGate(Exception):
    """A result is wrong; its time is not reported."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median, and the 20th and 80th percentile around it."""

    ms: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, samples: list[float]) -> "Timing":
        ordered = sorted(samples)
        low, high = ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]
        return cls(
            *(float(f"{value:.5g}") for value in (statistics.median(ordered), low, high)),
            len(ordered),
        )

    def to_dict(self) -> dict:
        return asdict(self)


def measure(
    phases: dict[str, Callable[[int], None]],
    device: torch.device,
    seconds: float = 1.0,
    repeats: int | None = None,
    warmup: int = 3,
    hide_launch: bool = False,
) -> dict[str, Timing]:
    """Time ``phases``, run in order, over and over; each gets the number of the repetition, to
    rotate its inputs.

    CUDA events on a GPU, ``perf_counter`` on a CPU. Adds "total" where there are several phases.
    ``hide_launch`` keeps the GPU busy beforehand for twice as long as the host took to launch, so
    that kernels are timed and not their launch; only for phases that do not wait for the GPU.
    """
    one = launching = 0.0
    for i in range(warmup):
        start = time.perf_counter()
        for phase in phases.values():
            phase(i)
        launching = time.perf_counter() - start
        _synchronize(device)
        one = time.perf_counter() - start
    spin = int(MOST_CYCLES * (2 * launching + 1e-4)) if hide_launch and device.type == "cuda" else 0
    if repeats is None:
        repeats = max(5, min(MAX_REPEATS, int(seconds / max(one, 1e-6))))
    if (
        spin
    ):  # as many at once as are timed: what a launch takes from torch's pinned memory is there then
        for i in range(repeats):
            _marked_run(phases, device, i, spin)
        _synchronize(device)
    marks = [_marked_run(phases, device, i, spin) for i in range(repeats)]
    _synchronize(device)
    samples = [[_elapsed_ms(a, b) for a, b in zip(run, run[1:], strict=False)] for run in marks]
    timings = {name: Timing.of([run[k] for run in samples]) for k, name in enumerate(phases)}
    if len(phases) > 1:
        timings["total"] = Timing.of([sum(run) for run in samples])
    return timings


def _marked_run(phases, device: torch.device, number: int, spin: int) -> list:
    if spin:
        torch.cuda._sleep(spin)
    marks = [_mark(device)]
    for phase in phases.values():
        phase(number)
        marks.append(_mark(device))
    return marks


def _mark(device: torch.device):
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed_ms(start, end) -> float:
    return (end - start) * 1e3 if isinstance(start, float) else start.elapsed_time(end)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rotation(bytes_of_one: int, device: torch.device) -> int:
    """How many sets of inputs it takes that none is found in the cache by the next repetition."""
    cache = (
        torch.cuda.get_device_properties(device).L2_cache_size
        if device.type == "cuda"
        else CPU_CACHE
    )
    return max(2, min(64, 1 + -(-2 * cache // max(bytes_of_one, 1))))


def max_error(value: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; infinite where a value is not finite."""
    error = (value.double() - truth.double()).abs().max().item() if value.numel() else 0.0
    return error if error == error else float("inf")


def gate_rule(what: str, value: Tensor, eager: Tensor, truth: Tensor) -> dict[str, float]:
    """The kernels' rule: at most twice the error of plain torch in the same dtype, plus 1e-6.
    Raises RedGate."""
    error, allowed = max_error(value, truth), 2 * max_error(eager, truth) + SLACK
    if not error <= allowed:
        raise RedGate(f"{what}: error {error:.3e}, allowed {allowed:.3e}")
    return {"error": error, "allowed": allowed}


def gate_relative(what: str, value: Tensor, truth: Tensor, allowed: float) -> dict[str, float]:
    """``|value - truth| / |truth|``, Frobenius norms: for a peer, that may round where it likes.
    Raises RedGate."""
    norm = truth.double().norm().item()
    error = (value.double() - truth.double()).norm().item() / max(norm, 1e-30)
    if not error <= allowed:
        raise RedGate(f"{what}: relative error {error:.3e}, allowed {allowed:.3e}")
    return {"error": error, "allowed": allowed}
