"""What this device reaches in this run: the roof that achieved rates are divided by."""

import functools
from dataclasses import dataclass

import torch

from .harness import measure


@dataclass(frozen=True)
class Roof:
    copy_gbs: float  # bytes read and written, in 1e9 a second
    matmul_tflops: float  # in the dtype that is benchmarked
    float32_tflops: float  # without TF32

    def floor_ms(self, moved_bytes: float, flops: float = 0.0) -> float:
        """No implementation that moves these bytes and does these operations is faster."""
        return max(moved_bytes / self.copy_gbs / 1e6, flops / self.matmul_tflops / 1e9)


@functools.cache
def measure_roof(device: torch.device, dtype: torch.dtype) -> Roof:
    """A device-to-device copy and large matrix products, of random data: zeros multiply faster."""
    on_gpu = device.type == "cuda"
    product = _matmul_tflops(device, dtype, 8192 if on_gpu else 1024)
    single = (
        product
        if dtype == torch.float32
        else _matmul_tflops(device, torch.float32, 4096 if on_gpu else 1024)
    )
    return Roof(_copy_gbs(device, 2**30 if on_gpu else 2**26), product, single)


def _copy_gbs(device: torch.device, size: int) -> float:
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    ms = measure({"copy": lambda i: target.copy_(source)}, device, repeats=20, hide_launch=True)[
        "copy"
    ].ms
    return 2 * size / ms / 1e6


def _matmul_tflops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    result = torch.empty_like(a)
    ms = measure(
        {"product": lambda i: torch.mm(a, b, out=result)}, device, repeats=20, hide_launch=True
    )["product"].ms
    return 2 * size**3 / ms / 1e9
