"""Timing with medians and spread, inputs rotated past the cache, and the roof that rates are divided by."""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

MAX_REPEATS = 200
MOST_CYCLES = 2.1e9  # a second, of a GPU's fastest clock
CPU_CACHE = 32 * 2**20


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
        rounded = (float(f"{value:.5g}") for value in (statistics.median(ordered), low, high))
        return cls(*rounded, len(ordered))

    def to_dict(self) -> dict:
        return asdict(self)


def samples(
    phases: dict[str, Callable[[int], object]],
    device: torch.device,
    seconds: float = 1.0,
    repeats: int | None = None,
    warmup: int = 3,
    hide_launch: bool = False,
) -> dict[str, list[float]]:
    """Milliseconds of ``phases``, run in order, over and over; each gets the number of the repetition, to rotate its
    inputs.

    CUDA events on a GPU, ``perf_counter`` on a CPU. ``hide_launch`` keeps the GPU busy beforehand for twice as long as
    the host took to launch, so that kernels are timed and not their launch; only for phases that do not wait for the
    GPU."""
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
    # as many at once as are timed: what a launch takes from torch's pinned memory is there then
    for i in range(repeats if spin else 0):
        _marked_run(phases, device, i, spin)
    _synchronize(device)
    marks = [_marked_run(phases, device, i, spin) for i in range(repeats)]
    _synchronize(device)
    found = [[_elapsed_ms(a, b) for a, b in zip(run, run[1:], strict=False)] for run in marks]
    return {name: [run[k] for run in found] for k, name in enumerate(phases)}


def measure(
    phases: dict[str, Callable[[int], object]], device: torch.device, *arguments, **options
) -> dict[str, Timing]:
    """``samples`` in short. Adds "total" where there are several phases."""
    found = samples(phases, device, *arguments, **options)
    if len(found) > 1:
        found["total"] = [sum(run) for run in zip(*found.values(), strict=True)]
    return {name: Timing.of(each) for name, each in found.items()}


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
    on_gpu = device.type == "cuda"
    cache = torch.cuda.get_device_properties(device).L2_cache_size if on_gpu else CPU_CACHE
    return max(2, min(64, 1 + -(-2 * cache // max(bytes_of_one, 1))))


@dataclass(frozen=True)
class Roof:
    """What this device reaches in this run."""

    copy_gbs: float  # bytes read and written, in 1e9 a second
    matmul_tflops: float  # in the dtype that is benchmarked

    def floor_ms(self, moved_bytes: float, flops: float = 0.0) -> float:
        """No implementation that moves these bytes and does these operations is faster."""
        return max(moved_bytes / self.copy_gbs / 1e6, flops / self.matmul_tflops / 1e9)


@functools.cache
def measure_roof(device: torch.device, dtype: torch.dtype) -> Roof:
    """A copy on the device and large matrix products, of random data: zeros multiply faster."""

    def ms(call: Callable[[int], object]) -> float:
        return measure({"kernel": call}, device, repeats=20, hide_launch=True)["kernel"].ms

    values, size = (2**28, 8192) if device.type == "cuda" else (2**24, 1024)
    source = torch.randn(values, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    copy_gbs = 8 * values / ms(lambda i: target.copy_(source)) / 1e6
    return Roof(copy_gbs, 2 * size**3 / ms(lambda i: torch.mm(a, b, out=product)) / 1e9)
