import pytest
import torch
import triton
import triton.language as tl

from losia_kernels.kernels.device import hash_u32, stochastic_round, store_as
from losia_kernels.ops import rounding

N = 4096


@triton.jit
def round_kernel(value_ptr, nearest_ptr, stochastic_ptr, hash_ptr, seed, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    value = tl.load(value_ptr + offs)
    store_as(nearest_ptr + offs, value, offs < BLOCK)
    tl.store(
        stochastic_ptr + offs, stochastic_round(value, offs, seed, stochastic_ptr.dtype.element_ty)
    )
    tl.store(hash_ptr + offs, hash_u32(offs, seed).to(tl.int64))


@pytest.fixture
def value(device) -> torch.Tensor:
    """Float32 of every kind: any bit pattern, ordinary ones, subnormal in float16, halfway cases,
    the edges."""
    bits = torch.randint(-(2**31), 2**31, (N,))
    bits[:256] = (bits[:256] >> 16 << 16) + 0x8000  # halfway between two bfloat16
    bits[256:512] = (bits[256:512] >> 13 << 13) + 0x1000  # halfway between two float16
    # NaN that rounding could carry to inf or zero
    bits[512:515] = torch.tensor([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF])
    value = bits.to(torch.int32).view(torch.float32)
    value[520:1024] = torch.randn(504)
    value[1024:1536] = torch.randn(512) * 1e-6
    edges = [
        torch.nan,
        torch.inf,
        -torch.inf,
        0.0,
        -0.0,
        torch.finfo(torch.float32).max,
        65504.0,
        65519.0,
        65520.0,
    ]
    value[-len(edges) :] = torch.tensor(edges)
    return value.to(device)


def assert_same_bits(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Any NaN equals any NaN."""
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(
        result.nan_to_num(0.0, posinf=torch.inf, neginf=-torch.inf).view(torch.int16),
        expected.nan_to_num(0.0, posinf=torch.inf, neginf=-torch.inf).view(torch.int16),
    )


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("seed", [0, 1, 7, 2**31, 2**32 - 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_torch_bit_for_bit(value, dtype, seed):
    nearest, stochastic = (torch.empty_like(value, dtype=dtype) for _ in range(2))
    hashed = torch.empty_like(value, dtype=torch.int64)
    round_kernel[(1,)](value, nearest, stochastic, hashed, seed, BLOCK=N)
    assert torch.equal(hashed, rounding.hash_u32(torch.arange(N, device=value.device), seed))
    assert_same_bits(nearest, value.to(dtype))
    assert_same_bits(stochastic, rounding.stochastic_round(value, dtype, seed))
