"""Every kernel compiles for every target, without a GPU: no spills, and matrix units wherever there is a product."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from compile_cases import CASES

import losia_kernels.kernels

HERE = Path(__file__).parent
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request) -> list[dict]:
    """What ``compile_kernels.py`` says about all cases on one target; triton's own cache makes the second run short."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), env.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "compile_kernels.py"), request.param]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
def test_every_kernel_compiles_without_spills(compiled):
    assert {fact["case"] for fact in compiled} == set(CASES)
    assert {fact["kernel"] for fact in compiled} == kernels_in_package(), "a kernel has no launch in compile_cases.py"
    assert not [fact for fact in compiled if fact["spills"]]


@pytest.mark.slow
def test_products_use_the_matrix_units(compiled):
    """Float32 keeps all its bits, which only AMD's matrix units can do."""
    products = [fact for fact in compiled if fact["kernel"] == "subnet_grad_kernel"]
    on_matrix_units = [fact for fact in products if not fact["case"].endswith("fp32") or fact["target"] == "gfx942"]
    assert on_matrix_units and all(fact["matrix_units"] for fact in on_matrix_units)


def kernels_in_package() -> set[str]:
    names = set()
    for module in pkgutil.iter_modules(losia_kernels.kernels.__path__, "losia_kernels.kernels."):
        names |= {name for name in vars(importlib.import_module(module.name)) if name.endswith("_kernel")}
    return names
