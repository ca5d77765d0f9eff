"""LoSiALinear inside gradient checkpointing and torch.compile, plain and observing, while its
subnet moves."""

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.utils.checkpoint import checkpoint

from losia_kernels import LoSiALinear, apply_losia
from losia_kernels.layers.module import losia_layers
from tests.tiny import HIDDEN, Block, paper


def make_blocks(count=2, seed=0) -> nn.Sequential:
    torch.manual_seed(seed)
    return apply_losia(nn.Sequential(*[Block() for _ in range(count)]), paper(rank_factor=0.5))


def gradients(model: nn.Module, forward, observing: bool) -> dict[str, torch.Tensor]:
    """The input's, the subnets' and, by name, the observed gradients of one forward and
    backward."""
    torch.manual_seed(1)
    x = torch.randn(4, HIDDEN, requires_grad=True)
    found: dict[str, torch.Tensor] = {}
    for name, layer in losia_layers(model):
        layer.subnet.grad = None
        if observing:
            assert f"{name}.observed" not in found
            layer.observe_(
                lambda grad, name=name: found.setdefault(f"{name}.observed", []).append(grad)
            )
        else:
            layer.observe_(None)
    forward(x).square().sum().backward()
    observed = {name: grad for name, grads in found.items() for grad in grads}
    assert len(observed) == sum(map(len, found.values())), (
        "a layer was observed twice in one backward"
    )
    subnets = {name: layer.subnet.grad for name, layer in losia_layers(model)}
    return {"x": x.grad, **subnets, **observed}


# Gradient checkpointing ---------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("observing", [False, True])
def test_checkpointing_changes_no_gradient(use_reentrant, observing):
    model = make_blocks()

    def checkpointed(x):
        for block in model:
            x = checkpoint(block, x, use_reentrant=use_reentrant)
        return x

    plain = gradients(model, model, observing)
    recomputed = gradients(model, checkpointed, observing)
    assert len(plain) == (1 + 4 + 4 if observing else 1 + 4)
    assert plain.keys() == recomputed.keys()
    for name, grad in plain.items():
        assert torch.equal(recomputed[name], grad), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_with_a_layer_used_twice_in_the_segment(use_reentrant):
    """What is observed is the sum of both uses."""
    model = make_blocks(1)

    def twice(x):
        return model[0](model[0](x))

    plain = gradients(model, twice, observing=True)
    recomputed = gradients(
        model, lambda x: checkpoint(twice, x, use_reentrant=use_reentrant), observing=True
    )
    for name, grad in plain.items():
        assert torch.equal(recomputed[name], grad), name


# torch.compile ------------------------------------------------------------------------------------


@pytest.fixture
def compiled_graphs():
    """A backend that counts the graphs it is given, and a clean dynamo around the test."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    yield backend, graphs
    torch._dynamo.reset()


def move_everything(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, layer in losia_layers(model):
        k_out, k_in = layer.subnet.shape
        layer.set_subnet_(
            torch.randperm(layer.out_features, generator=generator)[:k_out].sort().values,
            torch.randperm(layer.in_features, generator=generator)[:k_in].sort().values,
        )


def test_a_moving_subnet_recompiles_nothing_and_its_gradient_follows(compiled_graphs):
    backend, graphs = compiled_graphs
    model = make_blocks(1)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for seed in range(3):
        move_everything(model, seed)
        eager = gradients(model, model, observing=False)
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            traced = gradients(model, compiled, observing=False)
        for name, grad in eager.items():
            torch.testing.assert_close(traced[name], grad)
    assert len(graphs) == 1


def test_compiled_block_by_block_there_are_two_variants_whoever_observes(compiled_graphs):
    """Blocks share their code: one variant plain, one observing, and no third when the turn goes on
    to the next."""
    backend, graphs = compiled_graphs
    model = make_blocks(3)
    for block in model:
        block.compile(fullgraph=True, backend=backend)
    seen: list[torch.Tensor] = []
    for turn in [None, 0, 1, 2, 0, None, 1]:
        for number, block in enumerate(model):
            for _, layer in losia_layers(block):
                layer.observe_(seen.append if number == turn else None)
        move_everything(model, seed=0)
        seen.clear()
        model(torch.randn(4, HIDDEN, requires_grad=True)).sum().backward()
        assert len(seen) == (0 if turn is None else 2)
    assert len(graphs) == 2


def test_compiled_under_autocast_and_without_gradients(compiled_graphs):
    backend, _ = compiled_graphs
    layer = LoSiALinear(8, 8, rank_factor=0.5)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(x), layer(x))
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_compiled_while_observing_with_checkpointing_inside(compiled_graphs):
    backend, graphs = compiled_graphs
    model = make_blocks(1)

    def checkpointed(x):
        return checkpoint(model, x, use_reentrant=False)

    eager = gradients(model, model, observing=True)
    traced = gradients(
        model, torch.compile(checkpointed, fullgraph=True, backend=backend), observing=True
    )
    assert len(graphs) == 1 and eager.keys() == traced.keys()
    for name, grad in eager.items():
        torch.testing.assert_close(traced[name], grad)
