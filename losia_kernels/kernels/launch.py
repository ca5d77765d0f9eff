"""How a launch finds its tile: each kernel's file says which, tests and measurements may override
it. Imports no triton by itself."""

import contextlib
import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

# A100, H100 and H200, B200, MI300X
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
MAX_VECTOR = 16  # bytes in one load, and more entries than any vector has


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes (tokens, outputs, inputs), ranges the tokens are split into, and the compiler's
    two knobs.

    ``variant`` names the form of a kernel that has several; ``prefetch``: gathered entries are
    loaded one tile ahead; ``sums``: who adds what the splits have summed (``sums.SUMS``).
    """

    block_t: int = 1
    block_out: int = 1
    block_in: int = 1
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 1
    variant: str = ""
    prefetch: bool = False
    sums: str = "launch"

    @property
    def compiler(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a tile is chosen for.

    ``arch`` is "sm_90", "gfx942" or "cpu". ``tokens``, ``n_out``, ``n_in`` are the sizes the kernel
    works on (those of the subnet where it works on the subnet), 1 for a dimension it does not have;
    ``chosen_from``: how many outputs there are, of which ``n_out`` are gathered (0: not said).
    ``variant`` asks for a form; None leaves it to the kernel.
    """

    arch: str
    dtype: torch.dtype
    tokens: int = 1
    n_out: int = 1
    n_in: int = 1
    alignment: int = 1
    variant: str | None = None
    chosen_from: int = 0


Choose = Callable[[Problem], LaunchConfig]

_choices: dict[str, Choose] = {}
_overrides: dict[str, dict[str, int | str]] = {}
_arch_override: list[str] = []


def tile_of(*kernels: str) -> Callable[[Choose], Choose]:
    """The decorated function chooses the tile of these kernels (launchers' names without
    ``launch_``). It is pure, and the same on every rank: no timing, no device state."""

    def register(choose: Choose) -> Choose:
        _choices.update(dict.fromkeys(kernels, choose))
        return choose

    return register


def choose_config(
    kernel: str,
    arch: str,
    dtype: torch.dtype,
    tokens: int,
    n_out: int,
    n_in: int,
    alignment: int = 1,
    variant: str | None = None,
    chosen_from: int = 0,
) -> LaunchConfig:
    """The tile of ``kernel`` for a ``Problem`` of these fields."""
    if kernel not in _choices:  # its file is not imported yet
        for file in pkgutil.iter_modules([str(Path(__file__).parent)]):
            importlib.import_module(f"{__package__}.{file.name}")
    if kernel not in _choices:
        raise ValueError(f"no launch configuration for kernel {kernel!r}")
    problem = Problem(arch, dtype, tokens, n_out, n_in, alignment, variant, chosen_from)
    return _choices[kernel](problem)


# it is asked for at every launch
_remembered_config = functools.lru_cache(maxsize=1024)(choose_config)


def launch_config(
    kernel: str,
    like: torch.Tensor,
    tokens: int = 1,
    n_out: int = 1,
    n_in: int = 1,
    alignment: int = 1,
    chosen_from: int = 0,
) -> LaunchConfig:
    """``choose_config`` for the device and dtype of ``like``, with the fields a test overrides
    replaced."""
    arch = target_arch(like.device)
    override = _overrides.get(kernel, {})
    config = _remembered_config(
        kernel,
        arch,
        like.dtype,
        tokens,
        n_out,
        n_in,
        alignment,
        override.get("variant"),
        chosen_from,
    )
    return dataclasses.replace(config, **override) if override else config


@functools.lru_cache
def device_arch(device: torch.device) -> str:
    """ "sm_90" on an NVIDIA device, "gfx942" on an AMD one, "cpu" elsewhere."""
    # a fake tensor may be on a device that is not there
    if device.type != "cuda" or not torch.cuda.is_available():
        return "cpu"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def target_arch(device: torch.device) -> str:
    """``device_arch``, or the one that ``override_arch`` says."""
    return _arch_override[-1] if _arch_override else device_arch(device)


def has_dependent_launches(device: torch.device) -> bool:
    """Whether a launch may begin while the one before it ends, and wait for what that writes."""
    arch = target_arch(device)
    return arch.startswith("sm_") and int(arch[3:]) >= 90


@contextlib.contextmanager
def override_config(kernel: str, **fields: int | str) -> Iterator[None]:
    """For tests and measurements: launch ``kernel`` with these fields of its ``LaunchConfig``
    replaced."""
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


def cdiv(size: int, block: int) -> int:
    """``size / block``, rounded up; triton's own takes 13 microseconds outside of a kernel."""
    return -(-size // block)


def padded(k: int) -> int:
    """The length of a row of ``k`` gathered entries: Triton knows divisibility by 16 and nothing
    finer, and without it a row is read entry by entry."""
    return cdiv(k, 16) * 16


def cover(size: int, smallest: int, largest: int) -> int:
    """The power of two that covers ``size``, between ``smallest`` and ``largest``."""
    return min(largest, max(smallest, 1 << (size - 1).bit_length()))
