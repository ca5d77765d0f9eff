import pytest
import torch

from tests.tolerance import assert_within

TRUTH = torch.zeros(3, dtype=torch.float64)


@pytest.mark.parametrize(
    "kernel, plain, passes",
    [
        (2e-3, 1e-3, True),
        (2e-3 + 9e-7, 1e-3, True),
        (2e-3 + 1e-5, 1e-3, False),
        (2e-6, 0.0, False),
        (torch.nan, 1.0, False),
        (torch.nan, torch.nan, False),
        (1.0, torch.inf, False),
    ],
)
def test_twice_the_error_of_plain_torch_and_no_more(kernel, plain, passes):
    tensors = torch.tensor([0.0, 0.0, kernel]), torch.tensor([0.0, 0.0, plain])
    if passes:
        assert_within(*tensors, TRUTH)
    else:
        with pytest.raises(AssertionError, match="allowed"):
            assert_within(*tensors, TRUTH)


def test_shape_dtype_and_truth_are_held():
    for kernel, truth in (
        (torch.zeros(2), TRUTH),
        (torch.zeros(3).half(), TRUTH),
        (torch.zeros(3), TRUTH.float()),
    ):
        with pytest.raises(AssertionError):
            assert_within(kernel, torch.zeros(3), truth)
