"""What is kept of an input that several linears read: their parts of it, or the input itself, once;
never more."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from losia_kernels import apply_losia
from losia_kernels.layers.module import losia_layers
from tests.tiny import paper

WIDTH, INNER, TOKENS = 32, 48, 10


class Block(nn.Module):
    """The linears of a decoder block, without norms and with a product in place of attention."""

    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down_proj = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o_proj(self.q_proj(x) * self.k_proj(x) * self.v_proj(x))
        return x + self.down_proj(self.gate_proj(x).sigmoid() * self.up_proj(x))


def make(p: float, dtype: torch.dtype = torch.float64, **config) -> nn.Module:
    torch.manual_seed(0)
    return apply_losia(nn.ModuleList([Block()]).to(dtype), paper(rank_factor=p, **config))[0]


def kept_values(block: nn.Module, x: Tensor, names: set[str]) -> int:
    """Values that the linears ``names`` keep for the backward, a storage that several keep counted
    once."""
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        own = block.state_dict(keep_vars=True).values()
        frozen = {tensor.untyped_storage().data_ptr() for tensor in own}
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in frozen:
            alive.append(tensor)
            storages[pointer] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = [getattr(block, name)(x) for name in sorted(names)]
    assert outputs
    return sum(storages.values())


@pytest.mark.parametrize("p", [1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0])
def test_never_more_than_the_input_itself(p):
    block, x = make(p), torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    k_in = int(p * WIDTH)
    assert kept_values(block, x, {"q_proj", "k_proj", "v_proj"}) == TOKENS * min(3 * k_in, WIDTH)
    assert kept_values(block, x, {"gate_proj", "up_proj"}) == TOKENS * min(2 * k_in, WIDTH)
    assert kept_values(block, x, {"o_proj"}) == TOKENS * k_in


def test_only_those_that_are_trained_share():
    block = make(1 / 2, exclude_modules=["k_proj", "v_proj", "up_proj"])
    assert not any(layer.keeps_input for _, layer in losia_layers(block))


def backward(block: nn.Module, run=None, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    x = (
        torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
        .to(dtype)
        .requires_grad_()
    )
    for _ in range(2):  # accumulated
        (block if run is None else run)(x).square().sum().backward()
    return {"x": x.grad} | {name: layer.subnet.grad for name, layer in losia_layers(block)}


RUNS = {
    "eager": lambda block: block,
    "compiled": lambda block: torch.compile(block, fullgraph=True, backend="aot_eager"),
    "reentrant": lambda block: lambda x: checkpoint(block, x, use_reentrant=True),
    "checkpointed": lambda block: lambda x: checkpoint(block, x, use_reentrant=False),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("alignment", [1, 4])
def test_the_gradients_are_those_of_gathered_parts(name, alignment):
    block = make(1 / 2, alignment=alignment)
    assert block.q_proj.keeps_input and block.up_proj.keeps_input and not block.o_proj.keeps_input
    parts = copy.deepcopy(block)
    for _, layer in losia_layers(parts):
        layer.keeps_input = False
    expected, found = backward(parts), backward(block, RUNS[name](block))
    assert found.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=0, atol=1e-12, msg=key)


def test_under_autocast_each_keeps_its_part_of_its_own_cast():
    block = make(1 / 2, torch.float32)
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert kept_values(block, x, {"q_proj", "k_proj", "v_proj"}) == TOKENS * 3 * WIDTH // 2
        assert kept_values(block, x.bfloat16(), {"q_proj", "k_proj", "v_proj"}) == TOKENS * WIDTH
        assert F.linear(x, block.q_proj.weight).dtype == torch.bfloat16


def test_moving_the_subnets_compiles_nothing_anew():
    torch._dynamo.reset()
    block = make(1 / 2)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    backward(block, compiled)
    block.q_proj.set_subnet_(torch.arange(16), torch.arange(16, 32))
    with torch._dynamo.config.patch(error_on_recompile=True):
        backward(block, compiled)
