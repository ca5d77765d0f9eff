"""Another subnet, or another weight, in the place of a layer's own: computed with or refused, never
passed by."""

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune

from losia_kernels import LoSiAAdamW, apply_losia, losia_layers
from tests.layers.test_linear import dense_twin, make_layer, observed_gradients
from tests.tiny import make_batches, paper, take_step, tiny_lm


def with_values(layer, subnet) -> torch.Tensor:
    """The weight with these values in the subnet's place."""
    return layer.weight.detach().index_put((layer.out_idx[:, None], layer.in_idx), subnet)


def test_a_subnet_that_stands_in_is_computed_with():
    layer, x = make_layer(), torch.randn(3, 10)
    own = layer.weight.clone()
    other = layer.subnet.detach() + 1
    expected = nn.functional.linear(x, with_values(layer, other), layer.bias)
    assert torch.equal(functional_call(layer, {"subnet": other}, (x,)), expected)
    with torch.no_grad():
        assert torch.equal(functional_call(layer, {"subnet": other}, (x,)), expected)
    assert torch.equal(layer.weight, own)
    assert torch.equal(layer(x), nn.functional.linear(x, own, layer.bias))


def test_parameters_that_are_gathered_for_a_use_stand_in_for_nobody():
    """fully_shard gives both, as parameters whose addresses may be those of parameters before."""
    layer, x = make_layer(), torch.randn(3, 10)
    seen = observed_gradients(layer)
    layer._parameters["subnet"] = nn.Parameter(layer.subnet.detach().clone())
    layer(x).sum().backward()
    assert len(seen) == 1


def test_it_is_differentiated_as_often_as_a_plain_layer():
    """A step of an inner loop, and curvature."""
    layer, x = make_layer(dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64)
    twin, start = dense_twin(layer), layer.subnet.detach().clone()

    def mine(subnet):
        return functional_call(layer, {"subnet": subnet}, (x,)).sin().sum()

    def plain(subnet):
        return functional_call(twin, {"weight": with_values(layer, subnet)}, (x,)).sin().sum()

    torch.testing.assert_close(hessian(mine, start), hessian(plain, start))
    gradients = torch.func.grad(mine)(start), torch.func.grad(plain)(start)
    torch.testing.assert_close(*gradients)

    def after_a_step(of):
        inner = start.clone().requires_grad_()
        (grad,) = torch.autograd.grad(of(inner), inner, create_graph=True)
        return torch.autograd.grad(of(inner - 0.1 * grad), inner)[0]

    torch.testing.assert_close(after_a_step(mine), after_a_step(plain))


def test_that_of_an_output_layer_whose_loss_needs_no_logits():
    model = apply_losia(tiny_lm(), paper(rank_factor=0.5, output_dim_factor=0.5))
    (batch,) = make_batches(1)
    head = model.lm_head
    other = (head.subnet.detach() + 1).requires_grad_()
    with pytest.warns(UserWarning, match="another subnet stands in"):
        loss = functional_call(model, {"lm_head.subnet": other}, kwargs=batch).loss
    (grad,) = torch.autograd.grad(loss, other)
    with torch.no_grad():
        head.subnet.copy_(other)
    expected = model(**batch).loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, head.subnet)[0])


class Shifted(nn.Module):
    """As an adapter that is a parametrization."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, tensor):
        return tensor + self.shift


def test_a_weight_that_is_trained_beside_its_subnet_is_refused():
    """It would get no gradient."""
    layer, x = make_layer(), torch.randn(3, 10)
    layer.requires_grad_(True)
    with pytest.raises(RuntimeError, match="LoSiALinear: its weight requires a gradient"):
        layer(x)
    adapted = make_layer()
    parametrize.register_parametrization(adapted, "weight", Shifted())
    with pytest.raises(RuntimeError, match="LoSiALinear: its weight requires a gradient"):
        adapted(x)


def test_a_subnet_that_is_computed_is_refused():
    layer = make_layer()
    parametrize.register_parametrization(layer, "subnet", Shifted())
    with pytest.raises(RuntimeError, match="LoSiALinear: its subnet is computed"):
        layer(torch.randn(3, 10))


def test_a_replica_of_data_parallel_computes_with_what_it_is_sent():
    layer, x = make_layer(), torch.randn(3, 10)
    replica = layer._replicate_for_data_parallel()
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers(recurse=False)]:
        setattr(replica, name, tensor.clone())
    assert torch.equal(replica(x), layer(x))
    replica(x).sum().backward()
    grad, layer.subnet.grad = layer.subnet.grad, None
    layer(x).sum().backward()
    assert torch.equal(grad, layer.subnet.grad)


COMPUTED = pytest.mark.parametrize(
    "compute", [parametrizations.spectral_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)]
)


@COMPUTED
def test_a_step_that_a_computed_weight_would_lose_is_refused(compute):
    layer = make_layer()
    compute(layer)
    with pytest.raises(ValueError, match="LoSiALinear: its weight is computed"):
        layer.write_back_()
    optimizer = torch.optim.SGD([layer.subnet], lr=0.1)
    layer(torch.randn(3, 10)).sum().backward()
    with pytest.raises(ValueError, match="LoSiALinear: its weight is computed"):
        optimizer.step()


@COMPUTED
def test_also_in_the_middle_of_a_run(compute):
    model = apply_losia(tiny_lm(), paper(rank_factor=0.5))
    optimizer = LoSiAAdamW(model, lr=0.01)
    first, second = make_batches(2)
    take_step(model, optimizer, first)
    (name, layer), *_ = losia_layers(model)
    compute(layer)
    with pytest.raises(ValueError, match=f"{name}: its weight is computed"):
        take_step(model, optimizer, second)
