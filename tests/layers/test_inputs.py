"""What layers gather of their inputs: once for those that read the same, and nothing where it would
be thrown away."""

import copy
import functools
import io

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from losia_kernels import apply_losia
from losia_kernels.layers import inputs, linear
from losia_kernels.layers.module import losia_layers
from tests.layers.test_shared_inputs import TOKENS, WIDTH, Block
from tests.tiny import paper

SUMMED = 1e-12
ALONE, TOGETHER = 7, 4  # gathers a block: of each linear; of q k v, o, gate up, down


randn = functools.partial(torch.randn, dtype=torch.float64)


def make(blocks: int = 1, p: float = 1 / 4, **config) -> nn.ModuleList:
    torch.manual_seed(0)
    return apply_losia(
        nn.ModuleList([Block() for _ in range(blocks)]).double(),
        paper(rank_factor=p, **config),
    )


def in_turn(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def gradients(blocks: nn.ModuleList, run) -> dict[str, Tensor]:
    x = randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for _, layer in losia_layers(blocks):
        layer.subnet.grad = None
    run(blocks, x).square().sum().backward()
    return {"x": x.grad} | {name: layer.subnet.grad for name, layer in losia_layers(blocks)}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 0.0) -> None:
    """``atol`` where shares of a gradient are added in the products that form them."""
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=atol, msg=name)


def checkpointed(use_reentrant: bool, **options):
    def run(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=use_reentrant, **options)
        return x

    return run


def nested(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    inner = checkpointed(False)
    return checkpoint(lambda x: inner(blocks, x), x, use_reentrant=False)


# nothing where it is thrown away ------------------------------------------------------------------


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_checkpointing_every_layer_gathers_once(gathers, use_reentrant, early_stop):
    blocks = make(3)
    expected = gradients(blocks, in_turn)
    gathers.clear()
    options = {} if use_reentrant else {"early_stop": early_stop}
    assert_same(gradients(blocks, checkpointed(use_reentrant, **options)), expected)
    assert len(gathers) == 3 * ALONE


def test_a_checkpoint_inside_a_checkpoint(gathers):
    """Its first forward is run again too, and gathers as little."""
    blocks = make(2)
    expected = gradients(blocks, in_turn)
    gathers.clear()
    assert_same(gradients(blocks, nested), expected)
    assert len(gathers) == 2 * ALONE


def test_the_first_forward_keeps_nothing_and_a_use_of_it_would_show():
    x = randn(3, 5, WIDTH)
    part = inputs.stand_in(x, 8)
    assert part.shape == (3, 5, 8) and part.dtype == x.dtype and part.isnan().all()
    assert part.untyped_storage().nbytes() == x.element_size()


def test_what_others_do_with_what_is_saved_gets_the_real_thing(gathers):
    """Hooks inside of a checkpoint, hooks alone, and a checkpoint that keeps some results."""
    blocks = make(1)
    expected = gradients(blocks, in_turn)

    def offloaded(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return in_turn(blocks, x)

    def inside(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        return checkpoint(lambda x: offloaded(blocks, x), x, use_reentrant=False)

    def selective(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        policy = functools.partial(
            create_selective_checkpoint_contexts, lambda *a, **k: CheckpointPolicy.MUST_SAVE
        )
        return checkpoint(blocks[0], x, use_reentrant=False, context_fn=policy)

    for run in (offloaded, inside, selective):
        assert_same(gradients(blocks, run), expected)


def test_a_second_backward_through_a_checkpoint(gathers):
    blocks = make(1)
    x = randn(TOKENS, WIDTH, requires_grad=True)
    y = checkpointed(False)(blocks, x).square().sum()
    first = torch.autograd.grad(y, [x, blocks[0].q_proj.subnet], retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y, [x, blocks[0].q_proj.subnet])))


# once for those that read the same ----------------------------------------------------------------


@pytest.mark.parametrize("p", [1 / 16, 1 / 4])  # 2 neurons, and 8: rows are filled up to 16
@pytest.mark.parametrize("run", [in_turn, checkpointed(True), checkpointed(False), nested])
def test_siblings_gather_together(gathers, together, monkeypatch, run, p):
    blocks = make(2, p)
    found = gradients(blocks, run)
    assert len(gathers) == 2 * TOGETHER
    monkeypatch.setattr(linear, "pays", lambda x: False)
    gathers.clear()
    assert_same(found, gradients(blocks, in_turn), SUMMED)
    assert len(gathers) == 2 * ALONE


def test_after_a_move_the_new_neurons(gathers, together):
    blocks = make()
    gradients(blocks, in_turn)
    blocks[0].k_proj.set_subnet_(torch.arange(8), torch.arange(20, 28))
    blocks[0].v_proj.in_idx.copy_(torch.arange(3, 11))
    found = gradients(blocks, in_turn)
    assert len(gathers) == 2 * TOGETHER
    for _, layer in losia_layers(blocks):
        layer.shared_input = None
    assert_same(found, gradients(blocks, in_turn), SUMMED)


@pytest.mark.parametrize("change", [False, True])
def test_another_input_or_a_changed_one_is_gathered_by_itself(together, change):
    block = make()[0]
    x, other = (randn(TOKENS, WIDTH) for _ in range(2))
    names = ("q_proj", "k_proj", "v_proj")

    def run() -> list[Tensor]:
        block.zero_grad()
        given = x.clone()
        outputs = [block.q_proj(given)]
        if change:
            given.mul_(2.0)
        outputs += [block.k_proj(given if change else other), block.v_proj(given)]
        sum(each.square().sum() for each in outputs).backward()
        return [getattr(block, name).subnet.grad.clone() for name in names]

    found = run()
    for name in names:
        getattr(block, name).shared_input = None
    assert all(map(torch.equal, found, run()))


def test_a_layer_that_does_not_come_is_soon_no_longer_gathered_for(gathers, together):
    block = make()[0]
    widths = []
    for _ in range(5):
        gathers.clear()
        x = randn(TOKENS, WIDTH)
        (block.gate_proj(x).sum() + block.o_proj(x).sum()).backward()
        widths.append([len(idx) for idx in gathers])
    assert widths == [[32, 8]] * 2 + [[8, 8]] * 3
    assert block.gate_proj.shared_input._parts is None


@pytest.mark.parametrize("how", ["observes", "frozen"])
def test_only_those_that_gather_take_part(gathers, together, how):
    blocks = make()
    block = blocks[0]
    if how == "observes":
        block.k_proj.observe_(lambda grad: None)
    else:
        block.k_proj.subnet.requires_grad_(False)
    gradients(blocks, in_turn)
    assert [len(idx) for idx in gathers] == [32, 8, 32, 12]  # q and v, o, gate and up, down


def test_copies_gather_for_themselves(gathers, together):
    blocks = make()
    expected = gradients(blocks, in_turn)
    file = io.BytesIO()
    torch.save(blocks, file)
    file.seek(0)
    for each in (copy.deepcopy(blocks), torch.load(file, weights_only=False)):
        gathers.clear()
        assert_same(gradients(each, in_turn), expected, SUMMED)
        assert len(gathers) == ALONE
    alone = copy.deepcopy(blocks[0].q_proj)
    assert alone.shared_input is None and blocks[0].q_proj.shared_input is not None


def test_a_captured_graph_reads_the_indices_anew(together, monkeypatch):
    """What is joined while a stream is captured belongs to the graph, and is remembered by nobody;
    nor may a graph read what was joined before, which a move would leave behind."""
    block = make()[0]
    shared, layers = block.q_proj.shared_input, [block.q_proj, block.k_proj]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(inputs, "pays", lambda idx: True)
    first, second = (shared._indices(layers) for _ in range(2))
    assert first is not second and shared._index is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert shared._indices(layers) is shared._indices(layers)


def test_nothing_is_held_once_all_have_their_part(together):
    block = make()[0]
    block(randn(TOKENS, WIDTH)).sum().backward()
    assert all(
        layer.shared_input is None or layer.shared_input._parts is None
        for _, layer in losia_layers(block)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("p", [1 / 8, 0.3])
def test_on_a_gpu_together_as_alone(p):
    """In bfloat16, within what one rounding more or less makes; the same bits in a hundred runs."""
    torch.manual_seed(0)
    block = Block().cuda().bfloat16()
    blocks = apply_losia(nn.ModuleList([block]), paper(rank_factor=p))
    x = torch.randn(512, WIDTH, device="cuda").bfloat16()

    def run(forward) -> list[Tensor]:
        blocks.zero_grad()
        given = x.clone().requires_grad_()
        forward(blocks, given * 1).float().square().mean().backward()
        return [given.grad, *(layer.subnet.grad.clone() for _, layer in losia_layers(blocks))]

    found = run(in_turn)
    for _ in range(100):
        assert all(map(torch.equal, found, run(in_turn)))
    assert all(map(torch.equal, found, run(checkpointed(False))))
    for _, layer in losia_layers(blocks):
        layer.shared_input = None
    for mine, theirs in zip(found, run(in_turn), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=1e-2 * theirs.abs().max().item())
