"""Which tile a kernel is launched with: one frozen ``LaunchConfig``, chosen by one function.

Imports no triton: the tiles stand here and not beside their kernels, because they are counted,
compared and tested where there is none.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import torch

SUBNET_GRAD_VARIANTS = ("fused", "fused_wide", "gathered", "gathered_library")
# A100, H100 and H200, B200, MI300X
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
# below this a split costs more in partial sums than it gains in parallelism
MIN_TOKENS_PER_SPLIT = 256
MAX_SPLITS = 16
MAX_VECTOR = 16  # bytes in one load, and more entries than any vector has


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes (tokens, outputs, inputs), ranges the tokens are split into, and the compiler's
    two knobs.

    ``variant`` names the form of a kernel that has several; ``prefetch``: gathered entries are
    loaded one tile ahead.
    """

    block_t: int = 1
    block_out: int = 1
    block_in: int = 1
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 1
    variant: str = ""
    prefetch: bool = False

    @property
    def compiler(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


_overrides: dict[str, dict[str, int | str]] = {}
_arch_override: list[str] = []


def choose_config(
    kernel: str,
    arch: str,
    dtype: torch.dtype,
    tokens: int,
    n_out: int,
    n_in: int,
    alignment: int = 1,
    variant: str | None = None,
) -> LaunchConfig:
    """The tile for ``kernel`` (the launcher's name without ``launch_``) on ``arch`` ("sm_90",
    "gfx942", "cpu").

    ``tokens``, ``n_out``, ``n_in`` are the sizes the kernel works on (those of the subnet where it
    works on the subnet), 1 for a dimension it does not have. ``variant`` asks for a form, else this
    chooses. Pure, and the same on every rank: no timing, no device state.
    """
    if kernel == "gather_features":
        return LaunchConfig(block_t=16, block_in=_tile(n_in, 16, 256), num_warps=4)
    if kernel == "subnet_grad":
        variant = variant or choose_subnet_grad(arch, dtype, n_in, alignment)
        return _subnet_grad_tiles(variant, arch, dtype, tokens, n_out, n_in, alignment)
    if kernel in ("subnets_adamw_", "importance_update_"):
        # Four entries a thread (64 threads a warp on AMD): 16-byte accesses in float32; more of
        # them spill on sm_80.
        return LaunchConfig(
            block_out=4 if arch.startswith("gfx") else 2, block_in=_tile(n_in, 16, 256), num_warps=4
        )
    if kernel in ("importance_marginals", "score_marginals"):
        return LaunchConfig(
            block_out=_tile(n_out, 16, 64), block_in=_tile(n_in, 16, 128), num_warps=8
        )
    if kernel == "cross_entropy_grad_":
        return LaunchConfig(block_out=_tile(n_out, 16, 4096), num_warps=16)
    raise ValueError(f"no launch configuration for kernel {kernel!r}")


def choose_subnet_grad(arch: str, dtype: torch.dtype, k_in: int, alignment: int) -> str:
    """The form of the subnet's gradient ``dy[:, out_idx].T @ x``.

    - "fused": dy is gathered inside the product, once for every 128 inputs.
    - "fused_wide": the same with up to 512 inputs in a tile, so that dy is gathered once where
    ``k_in`` is no more.
    - "gathered": dy is gathered by a launch of its own, then a dense product whose loads are wide
    and asynchronous.
    - "gathered_library": the same, the product by the vendor's library.

    By counts, not by time (``python -m bench variants`` has them, and times them on a GPU): runs of
    neighbours are loaded 16 bytes at a time inside the product, and gathering first only adds
    bytes. Single entries of 2 bytes are bound by their number: "fused_wide" loads each once up to
    512 inputs, past that "gathered" does.
    """
    if alignment * dtype.itemsize >= MAX_VECTOR or dtype.itemsize > 2 or arch == "cpu":
        return "fused"
    return "fused_wide" if k_in <= 512 else "gathered"


def _subnet_grad_tiles(
    variant: str, arch: str, dtype: torch.dtype, tokens: int, k_out: int, k_in: int, alignment: int
) -> LaunchConfig:
    """One tile for each form; as many splits of the tokens as fill the device with the programs it
    holds ``at_once``."""
    wide_loads = variant.startswith("gathered") or alignment * dtype.itemsize >= MAX_VECTOR
    if variant not in SUBNET_GRAD_VARIANTS:
        raise ValueError(
            f"subnet_grad has the variants {', '.join(SUBNET_GRAD_VARIANTS)}, not {variant!r}"
        )
    if dtype.itemsize > 2 and variant == "fused_wide":
        at_once, block_t, block_out, block_in, stages = 1, 16, 32, _tile(k_in, 16, 128), 1
    elif dtype.itemsize > 2:
        at_once, block_t, block_out, block_in, stages = 2, 16, 64, 64, 1
    elif variant == "fused_wide":
        at_once, block_t, block_out, block_in, stages = 1, 32, 64, _tile(k_in, 128, 512), 2
    elif wide_loads:
        at_once, block_t, block_out, block_in, stages = 2, 64, 128, 128, 3
        if arch.startswith("gfx"):  # three fill two programs' shared memory on NVIDIA alone
            stages = 2
    else:
        # block_out differs from block_in: tiles of one shape share one layout, which spreads the
        # gather over lines
        at_once, block_t, block_out, block_in, stages = 3, 32, 64, 128, 2
    splits, tiles = 1, -(-k_out // block_out) * -(-k_in // block_in)
    if tiles and variant != "gathered_library":
        programs = at_once * MULTIPROCESSORS.get(arch, 128)
        splits = max(1, min(programs // tiles, tokens // MIN_TOKENS_PER_SPLIT, MAX_SPLITS))
    return LaunchConfig(
        block_t,
        block_out,
        block_in,
        splits,
        num_warps=8,
        num_stages=stages,
        variant=variant,
        prefetch=not wide_loads and dtype.itemsize == 2,
    )


# it is asked for at every launch
_remembered_config = functools.lru_cache(maxsize=1024)(choose_config)


def launch_config(
    kernel: str,
    like: torch.Tensor,
    tokens: int = 1,
    n_out: int = 1,
    n_in: int = 1,
    alignment: int = 1,
) -> LaunchConfig:
    """``choose_config`` for the device and dtype of ``like``, with the fields a test overrides
    replaced."""
    arch = _arch_override[-1] if _arch_override else device_arch(like.device)
    override = _overrides.get(kernel, {})
    config = _remembered_config(
        kernel, arch, like.dtype, tokens, n_out, n_in, alignment, override.get("variant")
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


def _tile(size: int, smallest: int, largest: int) -> int:
    """The power of two that covers ``size``, between ``smallest`` and ``largest``."""
    return min(largest, max(smallest, 1 << (size - 1).bit_length()))
