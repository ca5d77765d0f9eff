"""Each op against its schema: what it mutates, what its fake promises, how it traces
(``torch.library.opcheck``)."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.library import opcheck

from losia_kernels import ops

losia = torch.ops.losia
OUT, IN, TOKENS = 13, 11, 6


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def make(request, device):
    """``make(*shape)``: random data of the test's dtype and device; another dtype on request."""
    return lambda *shape, dtype=request.param: torch.randn(shape, device=device).to(dtype)


@pytest.fixture
def out_idx(device):
    return torch.tensor([0, 4, 5, 12], device=device)


@pytest.fixture
def in_idx(device):
    return torch.tensor([1, 2, 10], device=device)


def test_gather_features(make, in_idx):
    opcheck(losia.gather_features.default, (make(TOKENS, IN), in_idx))
    opcheck(losia.gather_features.default, (make(2, 3, IN).transpose(0, 1), in_idx))


def test_subnet_grad(make, out_idx, in_idx):
    opcheck(losia.subnet_grad.default, (make(TOKENS, OUT), make(TOKENS, IN), out_idx, in_idx))
    opcheck(losia.subnet_grad.default, (make(2, 3, OUT), make(2, 3, 3), out_idx))
    opcheck(losia.subnet_grad.default, (make(TOKENS, OUT), make(TOKENS, IN)))
    opcheck(losia.subnet_grad.default, (make(1024, OUT), make(1024, IN)))  # several splits on a GPU


def test_subnet_adamw_(make, out_idx, in_idx):
    weight = make(OUT, IN)
    subnet, grad, exp_avg = (make(4, 3, dtype=torch.float32) for _ in range(3))
    state = (weight, subnet, grad, exp_avg, exp_avg.square(), out_idx, in_idx)
    opcheck(losia.subnet_adamw_.default, (*state, 1e-3, 0.9, 0.999, 1e-8, 0.01, 2))
    if weight.dtype == torch.bfloat16:
        stochastic = (weight, subnet.bfloat16(), *state[2:], 1e-3, 0.9, 0.999, 1e-8, 0.01, 2, 7)
        opcheck(losia.subnet_adamw_.default, stochastic)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_subnets_adamw_(make, out_idx, in_idx, moments):
    weights = [make(OUT, IN) for _ in range(2)]
    grads, subnets = ([make(4, 3, dtype=torch.float32) for _ in range(2)] for _ in "ab")
    state = [[make(4, 3, dtype=torch.float32).square().to(moments) for _ in range(2)] for _ in "ab"]
    scales = [
        [make(4, 1, dtype=torch.float32).abs() for _ in range(2)] if moments == torch.uint8 else []
        for _ in "ab"
    ]
    indices, settings = ([out_idx] * 2, [in_idx] * 2), (0.9, 0.999, 1e-8, 0.01)
    rates = ([1e-3, 2e-3], [2, 3], [5, 6])
    opcheck(
        losia.subnets_adamw_.default,
        (weights, subnets, grads, *state, *indices, *rates, *settings, *scales, []),
    )
    if weights[0].dtype == torch.bfloat16:
        split = [subnet.bfloat16() for subnet in subnets]
        remainders = [
            torch.zeros(4, 3, dtype=torch.int16, device=weights[0].device) for _ in range(2)
        ]
        opcheck(
            losia.subnets_adamw_.default,
            (weights, split, grads, *state, *indices, *rates, *settings, *scales, remainders),
        )


def test_importance_update_(make):
    state = make(OUT, IN, dtype=torch.float32).abs(), make(OUT, IN, dtype=torch.float32).abs()
    opcheck(losia.importance_update_.default, (*state, make(OUT, IN), make(OUT, IN), 0.85, 0.85))


def test_importance_marginals(make):
    opcheck(losia.importance_marginals.default, (make(OUT, IN), make(OUT, IN), "first_order", 0.5))


def test_score_marginals(make, out_idx, in_idx):
    opcheck(losia.score_marginals.default, (make(OUT, IN), make(OUT, IN), out_idx, in_idx))
    opcheck(losia.score_marginals.default, (make(OUT, IN),))


def test_fake_on_a_gpu_promises_the_sum_of_the_splits():
    with FakeTensorMode():
        dy, x = (torch.empty(8192, n, dtype=torch.bfloat16, device="cuda") for n in (OUT, IN))
        grad = ops.subnet_grad(dy, x)
    assert grad.shape == (OUT, IN) and grad.dtype == torch.float32


def test_fake_on_a_gpu_takes_a_symbol_for_the_tokens():
    """``torch.compile`` with dynamic shapes: a size that has no value yet."""
    symbolic = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    mode = FakeTensorMode(shape_env=ShapeEnv())
    tokens = mode.from_tensor(torch.empty(4096, 1), symbolic_context=symbolic).shape[0]
    with mode:
        dy, x = (torch.empty(tokens, n, dtype=torch.bfloat16, device="cuda") for n in (OUT, IN))
        assert isinstance(dy.shape[0], torch.SymInt)
        assert ops.subnet_grad(dy, x).shape == (OUT, IN)
