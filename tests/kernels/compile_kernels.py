"""Compile, without a GPU, every kernel that the launches in ``compile_cases`` make, and print what came out as JSON.

Run by ``test_compile.py`` in a process of its own, where triton is not interpreted:
``python compile_kernels.py sm_80 [sm_90 ...]`` prints a list of ``{case, target, kernel, registers, spills, ...}``.
The launches go through triton's own specialization (alignment, strides of 1), so the code is what a GPU would run.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import compile_cases
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from losia_kernels.kernels._launch import override_arch

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class OfflineDriver:
    """What JITFunction asks of the active driver before it compiles."""

    def __init__(self, arch: str):
        nvidia = arch.startswith("sm_")
        self.target = GPUTarget("cuda", int(arch[3:]), 32) if nvidia else GPUTarget("hip", arch, 64)
        self.get_current_device = lambda: arch
        self.get_current_stream = lambda device: 0
        self.get_current_target = lambda: self.target


def launches(arch: str, case) -> list:
    """The compiled kernels of one case, none of them run."""
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


def facts(kernel) -> dict:
    """Registers, spills (zero when there are none), what is multiplied (or None) and whether matrix units do it."""
    product = re.search(r"tt\.dot .*: tensor<\d+x\d+x(\w+)>", kernel.asm["ttir"])
    nvidia = "cubin" in kernel.asm
    code = nvidia_facts(kernel.asm["cubin"], bool(product)) if nvidia else amd_facts(kernel.asm["amdgcn"])
    return {"product_of": product and product[1], **code}


def nvidia_facts(cubin: bytes, has_product: bool) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", cuobjdump("--dump-resource-usage", file.name)))
        sass = cuobjdump("--dump-sass", file.name) if has_product else ""  # half a second: only where it is asked for
    return {
        "registers": int(resources["REG"]),
        "spills": int(resources["STACK"]) + int(resources["LOCAL"]),  # bytes of a stack frame: nothing else needs one
        "matrix_units": bool(re.search(r"\b(HMMA|HGMMA|UTCHMMA)\b", sass)),
    }


def cuobjdump(*arguments: str) -> str:
    return subprocess.run([CUOBJDUMP, *arguments], check=True, capture_output=True, text=True).stdout


def amd_facts(asm: str) -> dict:
    metadata = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)$", asm, re.MULTILINE)}
    spill_keys = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    return {
        "registers": metadata["vgpr_count"],
        "spills": sum(metadata[key] for key in spill_keys),
        "matrix_units": "v_mfma_" in asm,
    }


def main(archs: list[str]) -> None:
    results = [
        {"case": name, "target": arch, "kernel": kernel.name, "shared": kernel.metadata.shared, **facts(kernel)}
        for arch in archs
        for name, case in compile_cases.CASES.items()
        for kernel in launches(arch, case)
    ]
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
