"""Every kernel compiles for every target, without a GPU: no spills, and matrix units wherever there
is a product."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import losia_kernels.kernels
from tests.kernels.compile_cases import CASES

HERE = Path(__file__).parent
TRITON = tuple(map(int, version("triton").split(".")[:2]))
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB that one program may have


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request) -> list[dict]:
    """What ``compile_kernels.py`` says about all cases on one target; triton's own cache makes the
    second run short."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), env.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "compile_kernels.py"), request.param]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
def test_every_kernel_has_a_case(compiled):
    assert {fact["case"] for fact in compiled} == set(CASES)
    assert {fact["kernel"] for fact in compiled} == kernels_in_package(), (
        "a kernel has no launch in compile_cases.py"
    )


@pytest.mark.slow
def test_no_spills(compiled):
    """Triton 3.6 spills 8 bytes of the update on sm_100, and nothing else."""
    known = {("subnets_adamw_kernel", "sm_100", 8)} if TRITON < (3, 7) else set()
    spills = {
        (fact["kernel"], fact["target"], fact["spills"]) for fact in compiled if fact["spills"]
    }
    assert spills <= known


@pytest.mark.slow
def test_shared_memory_is_there(compiled):
    assert not [fact for fact in compiled if fact["shared"] > 1024 * SHARED[fact["target"]]]
    assert any(fact["shared"] for fact in compiled)


@pytest.mark.slow
def test_products_use_the_matrix_units(compiled):
    """Except NVIDIA's on float32, where only TF32 would, at the price of 13 bits."""
    products = [fact for fact in compiled if fact["product_of"]]
    assert {fact["product_of"] for fact in products} == {"bf16", "f16", "f32"}
    expected = [
        fact for fact in products if fact["product_of"] != "f32" or fact["target"].startswith("gfx")
    ]
    assert not [fact for fact in expected if not fact["matrix_units"]]


def kernels_in_package() -> set[str]:
    names = set()
    for module in pkgutil.iter_modules(losia_kernels.kernels.__path__, "losia_kernels.kernels."):
        names |= {
            name for name in vars(importlib.import_module(module.name)) if name.endswith("_kernel")
        }
    return names
