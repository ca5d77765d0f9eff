"""What a kernel compiles to for a GPU that is not there: registers, spills, matrix units, width of memory accesses.

Only in a process where triton is not interpreted and that launches nothing on a GPU: it replaces triton's driver. The
launches go through triton's own specialization (alignment, strides of 1), so the code is what a GPU would run."""

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from losia_kernels.kernels.launch import override_arch

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
AMD_BYTES = {"ubyte": 1, "byte": 1, "u8": 1, "b8": 1, "ushort": 2, "short": 2, "u16": 2, "b16": 2}
AMD_BYTES |= {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
AMD_BYTES |= {"b32": 4, "b64": 8, "b96": 12, "b128": 16}
PRODUCT = r"\b(?:HMMA|HGMMA|UTCHMMA)\b"
SIGNALS = r"griddepcontrol\.\w+|atom[\w.]*\.acq_rel[\w.]*"
AMD_SPILLS = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")


class OfflineDriver:
    def __init__(self, arch: str):
        if arch.startswith("sm_"):
            self.target = GPUTarget("cuda", int(arch[3:]), 32)
        else:
            self.target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
        self.get_current_device = lambda: arch
        self.get_current_stream = lambda device: 0
        self.get_current_target = lambda: self.target


def launches(arch: str, case: Callable[[], Any]) -> list:
    """The compiled kernels of the launches that ``case`` makes (on meta tensors), none of them run."""
    compiled = []
    run = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    driver.set_active(OfflineDriver(arch))
    triton.JITFunction.run = compile_only
    try:
        with override_arch(arch):
            case()
    finally:
        triton.JITFunction.run = run
    return compiled


def facts(kernel) -> dict[str, Any]:
    """Registers, bytes of shared memory, spills (zero when there are none), what is multiplied (or None) and whether
    matrix units do it; on NVIDIA's "signals", by which programs and launches wait for each other."""
    product = re.search(r"tt\.dot .*: tensor<\d+x\d+x(\w+)>", kernel.asm["ttir"])
    common = {"product_of": product and product[1], "shared": kernel.metadata.shared}
    if "cubin" not in kernel.asm:
        code = kernel.asm["amdgcn"]
        said = {k: int(v) for k, v in re.findall(r"\.(\w+):\s+(\d+)$", code, re.MULTILINE)}
        spills = sum(said[key] for key in AMD_SPILLS)
        found = {"registers": said["vgpr_count"], "spills": spills}
        return common | found | {"matrix_units": bool(re.search("v_(mfma|wmma)_", code))}
    usage = _cuobjdump("--dump-resource-usage", kernel)
    said = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    code = _cuobjdump("--dump-sass", kernel) if product else ""
    spills = said["STACK"] + said["LOCAL"]  # bytes of a stack frame: nothing else needs one
    found = {"registers": said["REG"], "spills": spills}
    found |= {"matrix_units": bool(re.search(PRODUCT, code))}
    found |= {"signals": sorted(set(re.findall(SIGNALS, kernel.asm["ptx"])))}
    return common | found | (loop_facts(code) if product else {})


def loop_facts(code: str) -> dict[str, Any]:
    """Of the innermost loop around the products, in NVIDIA's code: "serialized", whether a product waits for the one
    before (ptxas C7515); "copies_ahead", how many groups of asynchronous copies may be on their way while it computes
    (None: it has none); "loads" and "copies", bytes a thread in each."""
    body = _product_loop(code)
    order = "".join(
        "p" if re.search(PRODUCT, each) else "w"
        for each in body
        if re.search(rf"{PRODUCT}|\bWARPGROUP\.DEPBAR\b", each)
    )
    waits = [
        int(found[1], 16)
        for each in body
        if (found := re.search(r"\bDEPBAR\.LE SB0, (0x\w+)", each))
    ]
    moved = accesses_of_nvidia("\n".join(body))
    return {
        "serialized": "pwp" in order,
        "copies_ahead": min(waits) if waits and moved["copy"] else None,
        "loads": sorted(moved["load"]),
        "copies": sorted(moved["copy"]),
    }


def _product_loop(code: str) -> list[str]:
    """The instructions of the shortest loop that has products; of none, no instructions."""
    listing = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", code, re.MULTILINE)
    found: list[list[str]] = []
    for address, instruction in listing:
        target = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", instruction)
        if target and int(target[1], 16) < int(address, 16):
            span = range(int(target[1], 16), int(address, 16) + 1)
            body = [each for where, each in listing if int(where, 16) in span]
            if any(re.search(PRODUCT, each) for each in body):
                found.append(body)
    return min(found, key=len, default=[])


def accesses(kernel) -> dict[str, dict[int, int]]:
    """Instructions that touch global memory, by bytes a thread: "load" (to registers), "copy" (asynchronous, to shared
    memory) and "store"."""
    if "cubin" in kernel.asm:
        return accesses_of_nvidia(_cuobjdump("--dump-sass", kernel))
    found: dict[str, Counter] = {"load": Counter(), "copy": Counter(), "store": Counter()}
    widths = "u?byte|u?short|dword(?:x\\d)?|[ub]\\d+"
    pattern = rf"\b(?:global|buffer|flat)_(load|store)_s?(?:d16_(?:hi_)?)?({widths})\b"
    for kind, width in re.findall(pattern, kernel.asm["amdgcn"]):
        found[kind][AMD_BYTES[width]] += 1
    return {kind: dict(sorted(widths.items())) for kind, widths in found.items()}


def accesses_of_nvidia(code: str) -> dict[str, dict[int, int]]:
    found: dict[str, Counter] = {"load": Counter(), "copy": Counter(), "store": Counter()}
    kinds = {"LDG": "load", "LDGSTS": "copy", "STG": "store"}
    for kind, modifiers in re.findall(r"\b(LDG|LDGSTS|STG)\b([.\w]*)", code):
        found[kinds[kind]][_nvidia_bytes(modifiers.split("."))] += 1
    return {kind: dict(sorted(widths.items())) for kind, widths in found.items()}


def _nvidia_bytes(modifiers: list[str]) -> int:
    """LDG.E.U16 -> 2, STG.E.128 -> 16; without a width it is one register of 4 bytes."""
    for modifier in modifiers:
        if found := re.fullmatch(r"[US]?(8|16|64|128|256)", modifier):
            return int(found[1]) // 8
    return 4


def _cuobjdump(option: str, kernel) -> str:
    return _dump(option, kernel.asm["cubin"])


@functools.lru_cache(maxsize=8)  # half a second each
def _dump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        words = [CUOBJDUMP, option, file.name]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout
