"""Compile, without a GPU, every kernel that the launches in ``compile_cases`` make, and print what
came out as JSON.

Run by ``test_machine_code.py`` in a process of its own, where triton is not interpreted: ``python
compile_kernels.py sm_80 [sm_90 ...]`` prints ``{triton, kernels: [{case, target, kernel, registers,
...}]}``.
"""

import json
import sys

import triton

from bench.harness.machine_code import accesses, facts, launches
from tests.kernels import compile_cases


def main(archs: list[str]) -> None:
    results = [
        {
            "case": name,
            "target": arch,
            "kernel": kernel.name,
            "shared": kernel.metadata.shared,
            **facts(kernel),
            **accesses(kernel),
        }
        for arch in archs
        for name, case in compile_cases.CASES.items()
        for kernel in launches(arch, case)
    ]
    json.dump({"triton": triton.__version__, "kernels": results}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
