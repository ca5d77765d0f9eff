"""Compile, without a GPU, every kernel that the launches in ``compile_cases`` make, and print what
came out as JSON.

Run by ``test_machine_code.py`` in a process of its own, where triton is not interpreted: ``python
compile_kernels.py [--essential] sm_80 [sm_90 ...]`` prints ``{triton, kernels: [{case, target,
kernel, registers, ...}]}``.
"""

import json
import sys

import triton

from bench.harness.machine_code import accesses, facts, launches
from tests.kernels import compile_cases

READ = (
    "gather_features",
    "subnet_grad",
    "subnets_adamw-bf16",
    "subnets_adamw-fp32",
)  # whose accesses are looked at


def main(words: list[str]) -> None:
    archs = [word for word in words if not word.startswith("--")]
    names = compile_cases.ESSENTIAL if "--essential" in words else compile_cases.CASES
    results = [
        {
            "case": name,
            "target": arch,
            "kernel": kernel.name,
            "shared": kernel.metadata.shared,
            **facts(kernel),
            **(accesses(kernel) if name.startswith(READ) else {}),
        }
        for arch in archs
        for name in names
        for kernel in launches(arch, compile_cases.CASES[name])
    ]
    json.dump({"triton": triton.__version__, "kernels": results}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
