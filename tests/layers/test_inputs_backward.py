"""Layers that read one input give its gradient back as one sum: whole in every backward, or an error."""

import copy

import pytest
import torch
from torch import Tensor, nn

from losia_kernels.layers import inputs
from tests.layers.test_inputs import SUMMED, assert_same, gradients, in_turn, make, randn
from tests.layers.test_shared_inputs import TOKENS, WIDTH

QKV = ("q_proj", "k_proj", "v_proj")


@pytest.fixture
def shares(monkeypatch, together) -> list[bool]:
    """Of every share of a shared input's gradient: whether it came back with the sum."""
    found: list[bool] = []
    add = inputs.Use.add

    def noted(self, dy: Tensor, weight: Tensor) -> Tensor | None:
        total = add(self, dy, weight)
        found.append(total is not None)
        return total

    monkeypatch.setattr(inputs.Use, "add", noted)
    return found


def heads(block: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(getattr(block, name)(x).square() for name in QKV)


def dx_of(block: nn.Module, x: Tensor, run) -> Tensor:
    """What autograd makes of it with the plain weights."""
    x = x.detach().requires_grad_()
    plain = nn.ModuleDict({n: copy.deepcopy(getattr(block, n)).to_plain() for n in QKV})
    run([layer(x).square() for layer in plain.values()], x).backward()
    return x.grad


@pytest.mark.parametrize("used", [(0, 1, 2), (0, 2), (1,), (2, 0)])
def test_only_those_that_run_are_waited_for(shares, used):
    block, x = make()[0], randn(TOKENS, WIDTH, requires_grad=True)

    def run(outputs, x: Tensor) -> Tensor:
        return sum(outputs[i].sum() for i in used) + x.sin().sum()  # and a reader of no kin

    run(heads(block, x), x).backward()
    assert sorted(shares) == [False] * (len(used) - 1) + [True]
    torch.testing.assert_close(x.grad, dx_of(block, x, run), rtol=0, atol=SUMMED)


def test_an_output_that_is_gone_is_not_waited_for(shares):
    block, x = make()[0], randn(TOKENS, WIDTH, requires_grad=True)
    outputs = list(heads(block, x))
    del outputs[1]
    sum(each.sum() for each in outputs).backward()
    expected = dx_of(block, x, lambda outputs, x: outputs[0].sum() + outputs[2].sum())
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=SUMMED)


def test_backwards_of_parts_and_several_of_one_graph(shares):
    """The input of the shared tensor, not a leaf; each backward is whole by itself."""
    block, leaf = make()[0], randn(TOKENS, WIDTH, requires_grad=True)
    x = leaf * 2
    q, k, v = heads(block, x)
    (some,) = torch.autograd.grad(q.sum() + k.sum(), x, retain_graph=True)
    (again,) = torch.autograd.grad(q.sum() + k.sum(), x, retain_graph=True)
    (whole,) = torch.autograd.grad(q.sum() + k.sum() + v.sum(), leaf)
    assert shares == [False, True] * 2 + [False, False, True]
    expected = dx_of(block, x, lambda outputs, x: outputs[0].sum() + outputs[1].sum())
    assert torch.equal(some, again)
    torch.testing.assert_close(some, expected, rtol=0, atol=SUMMED)
    expected = 2 * dx_of(block, x, lambda outputs, x: sum(each.sum() for each in outputs))
    torch.testing.assert_close(whole, expected, rtol=0, atol=SUMMED)


def test_a_backward_inside_of_a_backward(shares):
    """Of the same layers, begun while the outer one has met some of them."""
    block, x = make()[0], randn(TOKENS, WIDTH, requires_grad=True)
    q, k, v = heads(block, x)
    part, whole, inner = q.sum() + v.sum(), q.sum() + k.sum() + v.sum(), []

    def begin(grad: Tensor) -> None:
        inner.append(torch.autograd.grad(part, x, retain_graph=True)[0])

    k.register_hook(begin)
    whole.backward(retain_graph=True)
    expected = dx_of(block, x, lambda outputs, x: sum(each.sum() for each in outputs))
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=SUMMED)
    expected = dx_of(block, x, lambda outputs, x: outputs[0].sum() + outputs[2].sum())
    torch.testing.assert_close(inner[0], expected, rtol=0, atol=SUMMED)


def test_after_a_backward_that_failed_the_next_is_whole(shares):
    block, x = make()[0], randn(TOKENS, WIDTH, requires_grad=True)
    outputs = heads(block, x)
    fails = [True]

    def fail(grad: Tensor) -> None:
        if fails.pop():
            raise FloatingPointError

    outputs[0].register_hook(lambda grad: fail(grad) if fails else None)
    with pytest.raises(FloatingPointError):
        sum(each.sum() for each in outputs).backward(retain_graph=True)
    x.grad = None
    sum(each.sum() for each in outputs).backward()
    expected = dx_of(block, x, lambda outputs, x: sum(each.sum() for each in outputs))
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=SUMMED)


def test_a_share_that_does_not_come_raises(shares, monkeypatch):
    block, x = make()[0], randn(TOKENS, WIDTH, requires_grad=True)
    q, k, v = heads(block, x)
    monkeypatch.setattr(torch._C, "_will_engine_execute_node", lambda node: True)
    with pytest.raises(RuntimeError, match="1 of the layers that read one input did not take part"):
        (q.sum() + k.sum()).backward()
    assert v.requires_grad


def test_batched_gradients_take_their_own_way(shares):
    block, x = make()[0], randn(TOKENS, WIDTH, requires_grad=True)
    y = sum(heads(block, x)).sum(1)
    (rows,) = torch.autograd.grad(y, x, torch.eye(TOKENS).double(), is_grads_batched=True)
    expected = dx_of(block, x, lambda outputs, x: sum(outputs).sum())
    torch.testing.assert_close(rows.sum(0), expected, rtol=0, atol=1e-11)


def test_compiled_code_shares_nothing_and_is_right(together):
    torch._dynamo.reset()
    blocks = make()
    expected = gradients(blocks, in_turn)
    compiled = torch.compile(blocks[0], fullgraph=True, backend="aot_eager")
    assert_same(gradients(blocks, lambda blocks, x: compiled(x)), expected, SUMMED)
