"""LoSiALinear is nn.Linear forward, and its subnet's gradient is the cut of nn.Linear's dense
one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from losia_kernels import LoSiALinear

LEADING = [(), (1,), (6,), (0,), (2, 3), (2, 0, 3), (2, 3, 4, 1)]


def make_layer(in_features=10, out_features=7, rank_factor=0.5, seed=0, **options) -> LoSiALinear:
    torch.manual_seed(seed)
    return LoSiALinear(in_features, out_features, rank_factor=rank_factor, **options)


def dense_twin(layer: LoSiALinear) -> nn.Linear:
    """The same linear with an ordinary trainable weight."""
    linear = copy.deepcopy(layer).to_plain()
    return linear.requires_grad_(True)


def cut(layer: LoSiALinear, dense: torch.Tensor) -> torch.Tensor:
    return dense[layer.out_idx][:, layer.in_idx]


def observed_gradients(layer: LoSiALinear) -> list[torch.Tensor]:
    """Makes the layer observe; the list grows with every backward."""
    seen: list[torch.Tensor] = []
    layer.observe_(seen.append)
    return seen


# Forward ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("observing", [False, True])
def test_forward_and_backward_for_any_leading_dimensions(leading, bias, observing):
    layer = make_layer(bias=bias)
    twin = dense_twin(layer)
    seen = observed_gradients(layer) if observing else None
    x, x_twin = (
        torch.randn(*leading, 10, generator=torch.Generator().manual_seed(1)).requires_grad_()
        for _ in "ab"
    )
    y, y_twin = layer(x), twin(x_twin)
    assert torch.equal(y, y_twin)
    dy = torch.randn_like(y)
    y.backward(dy)
    y_twin.backward(dy)
    torch.testing.assert_close(x.grad, x_twin.grad)
    torch.testing.assert_close(layer.subnet.grad, cut(layer, twin.weight.grad))
    assert layer.weight.grad is None and layer.subnet.grad.dtype == torch.float32
    if observing:
        (dense,) = seen
        torch.testing.assert_close(dense, twin.weight.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_forward_is_nn_linears_bit_for_bit_and_the_subnet_is_the_block(dtype):
    layer = make_layer(dtype=dtype)
    x = torch.randn(3, 10).to(dtype)
    assert torch.equal(layer(x), dense_twin(layer)(x))
    assert layer.subnet.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(layer.subnet, cut(layer, layer.weight).to(layer.subnet.dtype))
    assert make_layer(dtype=dtype, master=False).subnet.dtype == dtype


def test_strided_and_transposed_inputs():
    layer = make_layer()
    twin = dense_twin(layer)
    base = torch.randn(10, 4, 6)
    for x in (
        base.permute(1, 2, 0),
        base[:, ::2, ::3].permute(2, 1, 0),
        torch.randn(3, 1, 10).expand(3, 5, 10),
    ):
        layer.subnet.grad = twin.weight.grad = None
        layer(x).sum().backward()  # dy has no strides either
        twin(x).sum().backward()
        torch.testing.assert_close(layer.subnet.grad, cut(layer, twin.weight.grad))


@pytest.mark.parametrize("rank_factor", [(0.5, 1.0), (1.0, 0.5), (1.0, 1.0), (1 / 7, 0.1)])
@pytest.mark.parametrize("observing", [False, True])
def test_one_neuron_or_all_of_them_on_either_side(rank_factor, observing):
    layer = make_layer(rank_factor=rank_factor)
    assert layer.subnet.shape == (int(rank_factor[0] * 7 + 0.1), int(rank_factor[1] * 10 + 0.1))
    twin, x = dense_twin(layer), torch.randn(4, 10)
    if observing:
        observed_gradients(layer)
    layer(x).square().sum().backward()
    twin(x).square().sum().backward()
    torch.testing.assert_close(layer.subnet.grad, cut(layer, twin.weight.grad))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_forward_is_the_same_and_gathers_nothing(mode, monkeypatch):
    layer = make_layer()
    x = torch.randn(3, 10)
    with mode(), monkeypatch.context() as patch:
        patch.setattr("losia_kernels.ops.gather_features", None)
        y = layer(x)
    assert y.grad_fn is None and torch.equal(y, layer(x))


def test_a_frozen_layer_passes_gradients_through():
    layer, x = make_layer().requires_grad_(False), torch.randn(3, 10, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 10))
    assert saved_activation_bytes(layer, x) == 0


def test_inputs_that_need_no_gradient_get_none():
    layer, x = make_layer(), torch.randn(3, 10)
    layer(x).sum().backward()
    assert x.grad is None and layer.subnet.grad is not None


def test_a_trained_bias_gets_its_gradient():
    layer = make_layer()
    layer.bias.requires_grad_(True)
    layer(torch.randn(2, 3, 10)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((7,), 6.0))


@pytest.mark.parametrize("leading", LEADING)
def test_its_output_may_be_written_in_place(leading):
    """As activations and dropout do, and hooks."""
    for bias in (True, False):
        layer = make_layer(bias=bias)
        twin, x = dense_twin(layer), torch.randn(*leading, 10)
        for linear in (layer, twin):
            F.relu(linear(x), inplace=True).sum().backward()
        torch.testing.assert_close(layer.subnet.grad, cut(layer, twin.weight.grad))


def test_functional_call_trains_what_it_is_given():
    layer, x = make_layer(), torch.randn(3, 10)
    other = {
        "weight": torch.randn(7, 10),
        "subnet": torch.zeros_like(layer.subnet).requires_grad_(),
    }
    y = torch.func.functional_call(layer, other, (x,))
    assert torch.equal(y, F.linear(x, other["weight"], layer.bias))
    y.sum().backward()
    assert layer.subnet.grad is None and torch.count_nonzero(other["subnet"].grad)


def test_the_meta_device_gives_shapes():
    assert make_layer(device="meta")(torch.empty(2, 3, 10, device="meta")).shape == (2, 3, 7)


# Gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("observing", [False, True])
def test_gradcheck_of_the_input_the_bias_and_the_subnet(observing):
    """The subnet only carries its gradient: each evaluation gets a weight with the subnet's values
    in it."""
    layer = make_layer(in_features=5, out_features=4, dtype=torch.float64)
    if observing:
        observed_gradients(layer)

    def forward(x, bias, subnet):
        weight = layer.weight.detach().clone()
        weight[layer.out_idx[:, None], layer.in_idx] = subnet.detach()
        return torch.func.functional_call(
            layer, {"weight": weight, "bias": bias, "subnet": subnet}, (x,)
        )

    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    inputs = (
        x,
        layer.bias.detach().clone().requires_grad_(),
        layer.subnet.detach().clone().requires_grad_(),
    )
    assert torch.autograd.gradcheck(forward, inputs)


def test_a_second_derivative_is_an_error():
    layer, x = make_layer(), torch.randn(3, 10, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.square().sum().backward()


@pytest.mark.parametrize("observing", [False, True])
def test_a_layer_used_twice_in_one_forward(observing):
    """Its gradient is the sum over both uses, and what it observes is that sum, handed over
    once."""
    layer = make_layer(in_features=8, out_features=8)
    twin, x = dense_twin(layer), torch.randn(5, 8)
    seen = observed_gradients(layer) if observing else []
    for linear in (layer, twin):
        linear(torch.tanh(linear(x))).square().sum().backward()
    torch.testing.assert_close(layer.subnet.grad, cut(layer, twin.weight.grad))
    assert len(seen) == observing
    for dense in seen:
        torch.testing.assert_close(dense, twin.weight.grad)


def test_accumulation_adds_up_but_each_backward_is_observed_alone():
    layer, first, second = make_layer(), torch.randn(4, 10), torch.randn(2, 10)
    seen = observed_gradients(layer)
    twin, parts = dense_twin(layer), []
    for x in (first, second):
        layer(x).square().sum().backward()
        twin.weight.grad = None
        twin(x).square().sum().backward()
        parts.append(twin.weight.grad)
    torch.testing.assert_close(layer.subnet.grad, cut(layer, parts[0] + parts[1]))
    torch.testing.assert_close(seen, parts)


# Autocast and memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("observing", [False, True])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_is_nn_linears(observing, backward_inside):
    layer = make_layer()
    twin = dense_twin(layer)
    seen = observed_gradients(layer) if observing else []
    x, x_twin = (
        torch.randn(6, 10, generator=torch.Generator().manual_seed(1)).requires_grad_()
        for _ in "ab"
    )
    for linear, data in ((layer, x), (twin, x_twin)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = linear(data)
            assert y.dtype == torch.bfloat16
            loss = y.float().square().sum()
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
    assert torch.equal(x.grad, x_twin.grad) and x.grad.dtype == torch.float32
    torch.testing.assert_close(
        layer.subnet.grad, cut(layer, twin.weight.grad), rtol=2**-8, atol=0.01
    )
    for dense in seen:
        assert dense.dtype == torch.float32
        torch.testing.assert_close(dense, twin.weight.grad, rtol=2**-8, atol=0.01)


def test_autocast_leaves_float64_alone():
    layer = make_layer(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 10, dtype=torch.float64)).dtype == torch.float64


def saved_activation_bytes(layer: nn.Linear, x: torch.Tensor) -> int:
    """Bytes that the graph keeps beyond the layer's own tensors."""
    own = {tensor.data_ptr() for tensor in layer.state_dict(keep_vars=True).values()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(kept.values())


def test_the_graph_keeps_p_of_the_input():
    layer, x = make_layer(in_features=64, out_features=32, rank_factor=1 / 8), torch.randn(100, 64)
    dense = 100 * 64 * 4
    assert saved_activation_bytes(dense_twin(layer), x) == dense
    assert saved_activation_bytes(layer, x) == dense / 8
    observed_gradients(layer)
    assert saved_activation_bytes(layer, x) == dense
    layer.observe_(None)
    assert saved_activation_bytes(layer, x) == dense / 8


def test_under_autocast_the_graph_keeps_p_of_the_input_in_16_bits():
    layer, x = make_layer(in_features=64, out_features=32, rank_factor=1 / 8), torch.randn(100, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = saved_activation_bytes(layer, x)
    assert kept == 100 * 8 * 2


def test_the_output_layer_keeps_the_input_itself():
    """All inputs are used: no copy of x is made."""
    layer, x = make_layer(rank_factor=(0.5, 1.0)), torch.randn(6, 10)
    pointers = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: pointers.append(t.data_ptr()) or t, lambda t: t
    ):
        layer(x)
    assert x.data_ptr() in pointers


def test_the_probe_takes_no_memory_and_no_gradient_stays():
    layer = make_layer()
    observed_gradients(layer)
    assert layer._probe.untyped_storage().nbytes() == layer.weight.element_size()
    layer(torch.randn(3, 10)).sum().backward()
    assert layer._probe.grad is None and layer.weight.grad is None
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["subnet"]
