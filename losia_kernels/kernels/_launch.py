"""Which tile a kernel is launched with: one frozen ``LaunchConfig``, chosen by one function. Imports no triton."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import torch

PROGRAMS = 256  # enough to fill two programs on every SM of an A100 or H100; fixed, so that splits follow the shape
MIN_TOKENS_PER_SPLIT = 256  # below this a split costs more in partial sums than it gains in parallelism
MAX_SPLITS = 16


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes (tokens, outputs, inputs), ranges the tokens are split into, and the compiler's two knobs."""

    block_t: int = 1
    block_out: int = 1
    block_in: int = 1
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 1

    @property
    def compiler(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


_overrides: dict[str, dict[str, int]] = {}
_arch_override: list[str] = []


def choose_config(kernel: str, arch: str, dtype: torch.dtype, tokens: int, n_out: int, n_in: int) -> LaunchConfig:
    """The tile for ``kernel`` (the launcher's name without ``launch_``) on ``arch`` ("sm_90", "gfx942", "cpu").

    ``tokens``, ``n_out``, ``n_in`` are the sizes the kernel works on (those of the subnet where it works on the
    subnet), 1 for a dimension it does not have. Pure, and the same on every rank: no timing, no device state.
    """
    narrow = dtype.itemsize == 2
    if kernel == "gather_features":
        return LaunchConfig(block_t=16, block_in=_tile(n_in, 16, 256), num_warps=4)
    if kernel == "subnet_grad":
        splits = _splits(tokens, n_out, n_in)
        if narrow:
            return LaunchConfig(block_t=32, block_out=128, block_in=128, splits=splits, num_warps=8, num_stages=2)
        return LaunchConfig(block_t=16, block_out=64, block_in=64, splits=splits, num_warps=8, num_stages=1)
    if kernel in ("subnet_adamw_", "importance_update_"):
        # Four entries a thread (64 threads a warp on AMD): 16-byte accesses in float32; more of them spill on sm_80.
        return LaunchConfig(block_out=4 if arch.startswith("gfx") else 2, block_in=_tile(n_in, 16, 256), num_warps=4)
    if kernel in ("importance_marginals", "score_marginals"):
        return LaunchConfig(block_out=_tile(n_out, 16, 64), block_in=_tile(n_in, 16, 128), num_warps=8)
    if kernel == "cross_entropy_grad_":
        return LaunchConfig(block_out=_tile(n_out, 16, 4096), num_warps=16)
    raise ValueError(f"no launch configuration for kernel {kernel!r}")


def launch_config(kernel: str, like: torch.Tensor, tokens: int = 1, n_out: int = 1, n_in: int = 1) -> LaunchConfig:
    """``choose_config`` for the device and dtype of ``like``, with the fields a test overrides replaced."""
    arch = _arch_override[-1] if _arch_override else device_arch(like.device)
    config = choose_config(kernel, arch, like.dtype, tokens, n_out, n_in)
    return dataclasses.replace(config, **_overrides.get(kernel, {}))


def token_splits(tokens: int, k_out: int, k_in: int) -> int:
    """Leading size of ``subnet_grad_partials``: a function of the shape alone, so that a fake tensor has it too."""
    return _overrides.get("subnet_grad", {}).get("splits") or _splits(tokens, k_out, k_in)


@functools.lru_cache
def device_arch(device: torch.device) -> str:
    """"sm_90" on an NVIDIA device, "gfx942" on an AMD one, "cpu" elsewhere."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@contextlib.contextmanager
def override_config(kernel: str, **fields: int) -> Iterator[None]:
    """For tests and measurements: launch ``kernel`` with these fields of its ``LaunchConfig`` replaced."""
    LaunchConfig(**fields)  # an unknown field fails here and not in the launch
    previous = _overrides.get(kernel)
    _overrides[kernel] = {**(previous or {}), **fields}
    try:
        yield
    finally:
        if previous is None:
            del _overrides[kernel]
        else:
            _overrides[kernel] = previous


@contextlib.contextmanager
def override_arch(arch: str) -> Iterator[None]:
    """For tests and offline compilation: choose configurations as if on ``arch``."""
    _arch_override.append(arch)
    try:
        yield
    finally:
        _arch_override.pop()


def _splits(tokens: int, n_out: int, n_in: int) -> int:
    tiles = -(-n_out // 128) * -(-n_in // 128)
    return max(1, min(PROGRAMS // tiles, tokens // MIN_TOKENS_PER_SPLIT, MAX_SPLITS)) if tiles else 1


def _tile(size: int, smallest: int, largest: int) -> int:
    """The power of two that covers ``size``, between ``smallest`` and ``largest``."""
    return min(largest, max(smallest, 1 << (size - 1).bit_length()))
