"""Models that torch.compile has changed already, block by block."""

import pytest
import torch
import torch._dynamo
from torch import nn

from losia_kernels import LoSiAAdamW, apply_losia, export_state_dict, remove_losia
from losia_kernels.checkpoint.resumable import full_state_dict
from losia_kernels.layers.module import losia_layers
from tests.integrations.tiny_models import FAMILIES
from tests.tiny import paper

LLAMA = FAMILIES["llama"]


def train(model: nn.Module, steps: int) -> LoSiAAdamW:
    optimizer = LoSiAAdamW(model, lr=0.01)
    for step in range(steps):
        model(**LLAMA.batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def places(model: nn.Module) -> list[tuple[list[int], list[int]]]:
    return [(layer.out_idx.tolist(), layer.in_idx.tolist()) for _, layer in losia_layers(model)]


# torch.compile ------------------------------------------------------------------------------------


@pytest.fixture
def compiled_graphs():
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    yield backend, graphs
    torch._dynamo.reset()


def compile_in_place(layers: nn.ModuleList, backend) -> None:
    for layer in layers:
        layer.compile(backend=backend)


def compile_around(layers: nn.ModuleList, backend) -> None:
    for number, layer in enumerate(layers):
        layers[number] = torch.compile(layer, backend=backend)


@pytest.mark.parametrize("compiled_first", [False, True], ids=["apply, compile", "compile, apply"])
@pytest.mark.parametrize("compile_blocks", [compile_in_place, compile_around])
def test_compiled_block_by_block(compiled_graphs, compile_blocks, compiled_first):
    """A cycle and more: two variants of a block (the first one's input needs no gradient, so the
    others share two of their own), the same subnets as without, and plain names throughout."""
    backend, graphs = compiled_graphs
    config = paper(
        rank_factor=0.25, period=1, target_modules=r".*layers\.\d\.(self_attn|mlp)\..*_proj"
    )
    plain, model = (LLAMA.make(num_hidden_layers=3, use_cache=False) for _ in range(2))
    apply_losia(plain, config)
    keys = list(model.state_dict())
    if compiled_first:
        compile_blocks(model.model.layers, backend)
        apply_losia(model, config)
    else:
        apply_losia(model, config)
        compile_blocks(model.model.layers, backend)
    before = places(plain)
    reference = train(plain, 4)
    optimizer = train(model, 4)
    assert len(graphs) == 4
    assert places(model) == places(plain) != before
    assert (
        optimizer.timeline.group_names
        == reference.timeline.group_names
        == ["model.layers.0", "model.layers.1", "model.layers.2"]
    )
    assert [layer.name for _, layer in losia_layers(model)] == [
        name for name, _ in losia_layers(plain)
    ]
    expected = export_state_dict(plain)
    for exported in (export_state_dict(model), full_state_dict(model)):
        assert list(exported) == keys
        torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-5)
    assert next(losia_layers(remove_losia(model)), None) is None


def test_modules_to_save_and_rank_pattern_find_their_modules_inside_compiled_blocks(
    compiled_graphs,
):
    backend, _ = compiled_graphs
    model = LLAMA.make()
    compile_around(model.model.layers, backend)
    config = paper(
        rank_factor=0.25,
        modules_to_save=["layers.0.input_layernorm"],
        exclude_modules=["layers.1.mlp.up_proj"],
        rank_pattern={r"layers\.0\.mlp\.up_proj": 0.5},
    )
    apply_losia(model, config)
    names = {layer.name: tuple(layer.subnet.shape) for _, layer in losia_layers(model)}
    assert (
        names["model.layers.0.mlp.up_proj"] == (12, 8) and "model.layers.1.mlp.up_proj" not in names
    )
    assert model.model.layers[0].input_layernorm.weight.requires_grad
