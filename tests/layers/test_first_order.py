"""First derivatives are whole also with create_graph; a second one is an error, however it is asked
for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian

from losia_kernels import losia_linear_cross_entropy
from tests.layers.test_linear import cut, dense_twin, make_layer, observed_gradients

REFUSED = pytest.raises(RuntimeError, match="differentiate twice")


def test_a_hessian_is_no_zero():
    """``torch.autograd.grad`` runs only what leads to its inputs: no error may lie beside that."""
    layer = make_layer()
    with REFUSED:
        hessian(lambda x: layer(x).square().sum(), torch.randn(10))


def test_one_for_the_subnet_neither():
    layer, x = make_layer(), torch.randn(3, 10)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), layer.subnet, create_graph=True)
    with REFUSED:
        torch.autograd.grad(grad.sum(), layer.subnet, allow_unused=True)


def test_a_penalty_on_a_gradient_that_begins_with_a_constant():
    """dx is a sum over the weight: it depends on the subnet, though no dy depends on anything."""
    layer, x = make_layer(), torch.randn(3, 10, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with REFUSED:
        (layer(x).sum() + dx.square().sum()).backward()


@pytest.mark.parametrize("observing", [False, True])
def test_the_first_derivative_is_what_it_is_and_can_be_clipped(observing):
    layer, x = make_layer(), torch.randn(2, 3, 10, requires_grad=True)
    twin, x_twin = dense_twin(layer), x.detach().clone().requires_grad_()
    seen = observed_gradients(layer) if observing else []
    layer(x).square().sum().backward(create_graph=True)
    twin(x_twin).square().sum().backward()
    torch.testing.assert_close(x.grad, x_twin.grad)
    torch.testing.assert_close(layer.subnet.grad, cut(layer, twin.weight.grad))
    assert not any(dense.requires_grad for dense in seen) and len(seen) == observing
    nn.utils.clip_grad_value_([layer.subnet, x], 1e-3)
    assert layer.subnet.grad.abs().max() <= 1e-3


@pytest.mark.parametrize("trained", [False, True])
def test_a_loss_without_logits(trained):
    """Its gradient of the hidden states depends on these, in softmax's curvature."""
    torch.manual_seed(0)
    weight, labels = torch.randn(7, 4), torch.tensor([1, 6, 3])
    hidden = torch.randn(3, 4, requires_grad=True)
    subnet = weight.clone().requires_grad_() if trained else None
    x = 2 * hidden
    loss = losia_linear_cross_entropy(x, weight, labels, subnet)
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    expected = F.cross_entropy(x @ weight.T, labels)
    torch.testing.assert_close(dx, torch.autograd.grad(expected, x, retain_graph=True)[0])
    with REFUSED:
        torch.autograd.grad(loss + dx.square().sum(), hidden)
