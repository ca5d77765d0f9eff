"""The formats of moments and masters in fewer bits, in plain torch."""

import pytest
import torch

from losia_kernels.kernels.codes import dynamic_map
from losia_kernels.ops import rounding
from losia_kernels.ops.rounding import decode, encode, join_float, split_float

BF16 = torch.bfloat16


def test_codes_are_those_of_bitsandbytes():
    """Seven decades, the top one in 64 cells (unsigned 128): spot values of its published map."""
    signed, unsigned = (dynamic_map(sign, torch.device("cpu")) for sign in (True, False))
    assert len(signed.unique()) == len(unsigned.unique()) == 256 and (signed.diff() > 0).all()
    assert signed[127] == 0 and signed[255] == 1 and unsigned[0] == 0 and unsigned[255] == 1
    torch.testing.assert_close(signed[128:].flip(0)[1:], -signed[:127], rtol=1e-6, atol=0)
    torch.testing.assert_close(signed[[0, 126, 128]], torch.tensor([-0.99296875, -5.5e-7, 5.5e-7]))
    torch.testing.assert_close(unsigned[[1, 2, 254]], torch.tensor([3.25e-7, 7.75e-7, 0.996484375]))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_unbiased_within_their_spacing_and_exact_on_the_map(signed):
    value = torch.rand(3, 300) ** 4 + 1e-3
    value = value * torch.randn(3, 300).sign() if signed else value
    decoded = torch.stack([decode(*encode(value, signed, seed), signed) for seed in range(100)])
    map_ = dynamic_map(signed, value.device)
    scale = encode(value, signed, 0)[1].repeat_interleave(256, 1)[:, :300]
    place = torch.searchsorted(map_, value / scale, right=True).clamp(1, 255)
    spacing = (map_[place] - map_[place - 1]) * scale
    assert ((decoded - value).abs() <= spacing * 1.001).all()
    inside = value / scale > map_[0]  # below the smallest code there is nothing to go down to
    assert ((decoded.mean(0) - value).abs() <= 0.25 * spacing)[
        inside
    ].all()  # 5 sigma of a coin, 100 times
    exact = decode(*encode(value, signed, 1), signed)
    again = decode(*encode(exact, signed, 2), signed)
    torch.testing.assert_close(
        again[scale == exact.abs().max(1, keepdim=True)[0]],
        exact[scale == exact.abs().max(1, keepdim=True)[0]],
        rtol=1e-2,
        atol=1e-9,
    )


def test_second_moments_decay_and_stay_above_zero():
    """To nearest, neither bfloat16 nor codes would move at all: 0.1 % is less than half a
    spacing."""
    start = torch.full((4, 256), 0.5)
    start[:, 0] = 1.0  # the block's scale, kept up
    for dtype in (BF16, torch.uint8):
        value = start.clone()
        for seed in range(100):
            value = value * 0.999
            value[:, 0] = 1.0
            if dtype is BF16:
                value = rounding.stochastic_round(value, BF16, seed).float()
            else:
                value = decode(*encode(value, False, seed), False)
        assert value[:, 1:].mean().item() == pytest.approx(0.5 * 0.999**100, rel=0.02)
    tiny = torch.tensor([[1.0, 1e-12, 0.0]])
    assert (decode(*encode(tiny, False, 0), False) > 0).tolist() == [[True, True, False]]


def test_every_float_is_split_and_joined():
    bits = torch.cat(
        [
            torch.arange(0x7F7F0000, 0x7F820000, 7),
            torch.arange(0x3F7F0000, 0x3F820000, 3),
            torch.arange(-(2**31), -(2**31) + 70000, 11),
            torch.tensor([0x7FFFFFFF, -1]),
        ]
    )
    value = bits.to(torch.int32).view(torch.float32)
    high, low = split_float(value)
    nan = value.isnan()
    assert nan.any() and high[nan].isnan().all()
    assert torch.equal(join_float(high, low)[~nan].view(torch.int32), value[~nan].view(torch.int32))
    ties = value.view(torch.int32) & 0xFFFF == 0x8000
    assert torch.equal(high[~nan & ~ties], value[~nan & ~ties].to(BF16))
