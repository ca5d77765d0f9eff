"""What the plain form keeps of its dtype."""

import torch
import torch.nn.functional as F

from losia_kernels import losia_linear_cross_entropy


def test_float64_is_float64_with_smoothed_labels():
    hidden, weight = torch.randn(5, 8, dtype=torch.float64), torch.randn(7, 8, dtype=torch.float64)
    labels = torch.tensor([0, 6, 3, -100, 1])
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    losia_linear_cross_entropy(ours, weight, labels, label_smoothing=0.1).backward()
    F.cross_entropy(theirs @ weight.T, labels, label_smoothing=0.1).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-13, atol=1e-14)
