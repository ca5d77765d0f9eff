"""What the compiler makes of the gathers, without a GPU: how wide the accesses are, and what is
asynchronous."""

import json
from importlib.metadata import version

import pytest

from tests.kernels.offline import run_offline

pytestmark = pytest.mark.slow

SCRIPT = """
import json
from bench.harness.machine_code import accesses, launches
from tests.kernels.compile_cases import gather_features, subnet_grad, torch

bf16 = torch.bfloat16
CASES = {{
    "gather": lambda: gather_features(bf16),
    "gather aligned": lambda: gather_features(bf16, alignment=16),
    "fused": lambda: subnet_grad(bf16, variant="fused"),
    "fused_wide": lambda: subnet_grad(bf16, variant="fused_wide"),
    "aligned": lambda: subnet_grad(bf16, alignment=16),
    "gathered": lambda: subnet_grad(bf16, variant="gathered"),
}}
print(json.dumps({{name: [accesses(kernel) for kernel in launches({arch!r}, case)] for name, case in CASES.items()}}))
"""
INDEX = {"8", "16"}  # bytes in which int64 indices come


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100", "gfx942"])
def found(request) -> dict[str, list[dict[str, dict[str, int]]]]:
    return {"arch": request.param, **json.loads(run_offline(SCRIPT.format(arch=request.param)))}


def test_all_is_written_16_bytes_at_a_time(found):
    assert {
        width
        for name in found
        if name != "arch"
        for kernel in found[name]
        for width in kernel["store"]
    } == {"16"}


def test_runs_of_neighbours_are_read_16_bytes_at_a_time(found):
    if found["arch"] == "gfx942" and tuple(map(int, version("triton").split(".")[:2])) < (3, 7):
        pytest.skip("Triton 3.6 reads 2 bytes at a time on gfx942")
    for name in ("gather aligned", "aligned"):
        (kernel,) = found[name]
        assert (
            "16"
            in kernel[
                "copy" if found["arch"] in ("sm_90", "sm_100") and name == "aligned" else "load"
            ]
        )
        assert kernel["load"].keys() <= INDEX and kernel["copy"].keys() <= {"16"}


def test_single_entries_are_read_2_bytes_at_a_time_and_one_tile_ahead(found):
    """A tile's loads are there twice: before the loop, and in it for the next tile. x beside it
    comes in vectors."""
    nvidia = found["arch"] != "gfx942"
    # tokens * outputs of a tile, over the threads of 8 warps
    once = 32 * 64 // (8 * (32 if nvidia else 64))
    for name in ("fused", "fused_wide"):
        (kernel,) = found[name]
        assert kernel["load"]["2"] >= 2 * once
        assert kernel["copy"].keys() == ({"16"} if nvidia else set())


def test_gathering_first_leaves_a_dense_product(found):
    gather, product = found["gathered"]
    assert gather == found["gather"][0]
    assert product["load"].keys() | product["copy"].keys() == {"16"}
