"""Without a GPU the kernels run under Triton's interpreter, which must be chosen before anything
imports triton."""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()  # CUDA or ROCm
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items):
    no_gpu = pytest.mark.skip(reason="needs a CUDA or ROCm device, and TRITON_INTERPRET unset")
    for item in items:
        if "gpu" in item.keywords and (INTERPRETED or not HAS_GPU):
            item.add_marker(no_gpu)


@pytest.fixture(
    params=[
        pytest.param("cpu", id="interpreter"),
        pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
    ]
)
def device(request) -> str:
    """Where a kernel test runs: on CPU tensors under the interpreter, or compiled on the GPU."""
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip(
            "kernels are compiled in this process; set TRITON_INTERPRET=1 to interpret them"
        )
    return request.param


@pytest.fixture
def poison():
    """Uninitialised tensors (torch.empty, new_empty, empty_like) come back full of NaN, or of the
    largest integer."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all() and torch.ones(3).new_empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
