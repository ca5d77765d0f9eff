"""Pools of 2 and 4 ranks: over gloo on the CPU, over NCCL where there are as many GPUs."""

import pytest
import torch

from tests.parallel.rank_pool import RankPool


def pool_of(size: int, backend: str):
    if backend == "nccl" and torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    pool = RankPool(size, backend)
    yield pool
    pool.close()


BACKENDS = ["gloo", pytest.param("nccl", marks=pytest.mark.gpu)]


@pytest.fixture(scope="session", params=BACKENDS)
def two(request):
    yield from pool_of(2, request.param)


@pytest.fixture(scope="session", params=BACKENDS)
def four(request):
    yield from pool_of(4, request.param)
