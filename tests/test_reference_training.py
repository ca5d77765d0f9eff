"""The oracle of a whole training, held against what torch and algebra say of it."""

import copy

import pytest
import torch
from torch import nn

from csrc_ref import selection
from csrc_ref.importance import importance_update_ref
from csrc_ref.training import Config, Training

torch.manual_seed(0)


class Toy(nn.Module):
    """Embedding, a linear that is used twice, one with bias, and a head that may be tied to the
    embedding."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.twice = nn.Linear(6, 6, bias=False)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.double()

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.head(x + torch.tanh(self.mix(x)))


def toy(tied=False, seed=0):
    torch.manual_seed(seed)
    return Toy(tied)


def loss_of(model, tokens):
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def batches(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(11, (2, 5), generator=generator) for _ in range(n)]


def whole(linear):
    n_out, n_in = linear.weight.shape
    return torch.arange(n_out), torch.arange(n_in)


def run(model, config, data, names=("twice", "mix"), initial=None, lr=0.01, **kwargs):
    """All ``names`` in one group; ``initial`` defaults to the whole weights."""
    group = {name: getattr(model, name) for name in names}
    initial = initial or {name: whole(linear) for name, linear in group.items()}
    training = Training(model, [group], initial, config, loss_of, **kwargs)
    for batch in data:
        training.step(batch if isinstance(batch, list) else [batch], lr)
    return training


def test_training_the_whole_weights_without_a_move_is_adamw():
    ours, theirs, data = toy(), toy(), batches(6)
    run(
        ours,
        Config(period=100, betas=(0.8, 0.9), weight_decay=0.1),
        data,
        dense={"head": ours.head},
    )
    weights = [theirs.twice.weight, theirs.mix.weight, theirs.head.weight]
    optimizer = torch.optim.AdamW(weights, lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    for batch in data:
        theirs.zero_grad()
        loss_of(theirs, batch).backward()
        optimizer.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("reset_step", [True, False])
@pytest.mark.parametrize(("rewarm", "warmup_steps"), [(True, 0), (True, 5), (False, 0)])
def test_a_move_restarts_adamw_and_rewarms(reset_step, rewarm, warmup_steps):
    """The only subnet of full size moves to itself: all that a move leaves is fresh moments and a
    smaller rate."""
    ours, theirs, data, period = toy(), toy(), batches(7), 3
    run(
        ours,
        Config(period=period, reset_step=reset_step, rewarm=rewarm, warmup_steps=warmup_steps),
        data,
    )
    weights = [theirs.twice.weight, theirs.mix.weight]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    for s, batch in enumerate(data):
        factor = (s % period + 1) / period if rewarm and s >= max(period, warmup_steps) else 1
        optimizer.param_groups[0]["lr"] = 0.01 * factor
        theirs.zero_grad()
        loss_of(theirs, batch).backward()
        optimizer.step()
        if s % period == period - 1:
            for state in optimizer.state.values():
                state["exp_avg"].zero_()
                state["exp_avg_sq"].zero_()
                state["step"].fill_(0 if reset_step else s + 1)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-11, atol=1e-11)


def test_accumulation_is_the_larger_batch_to_adamw_but_not_to_the_importance():
    ours, joined = toy(), toy()
    pair = batches(2)
    config = Config(period=10, importance_beta1=0.7)
    accumulated = run(ours, config, [pair])
    at_once = run(joined, config, [torch.cat(pair)])
    torch.testing.assert_close(ours.state_dict(), joined.state_dict(), rtol=1e-11, atol=1e-11)

    start, expected = toy(), (torch.zeros(6, 6), torch.zeros(6, 6))
    for batch in pair:  # each micro-batch's own mean loss, at the weights before the update
        start.zero_grad()
        loss_of(start, batch).backward()
        weight = start.twice.weight
        expected = importance_update_ref(*expected, weight.detach(), weight.grad, 0.7, 0.85)
    observed = accumulated.moved["twice"]
    torch.testing.assert_close((observed.importance, observed.uncertainty), expected)
    assert not torch.allclose(at_once.moved["twice"].importance, expected[0])


@pytest.mark.parametrize("dense", [False, True])
def test_a_tied_head_gets_only_the_heads_gradient(dense):
    """After one step the tied weight is what the head of an untied twin becomes, and the embedding
    sees it."""
    tied, twin = toy(tied=True), toy(tied=True)
    twin.head.weight = nn.Parameter(twin.embed.weight.detach().clone())
    for model in (tied, twin):
        if dense:
            run(model, Config(period=5), batches(1), dense={"head": model.head})
        else:
            run(
                model,
                Config(period=5),
                batches(1),
                names=("head",),
                initial={"head": (torch.tensor([2, 7]), None)},
            )
    assert torch.equal(tied.head.weight, twin.head.weight)
    assert tied.embed.weight is tied.head.weight
    changed = (
        (tied.head.weight != toy(tied=True).head.weight).any(dim=1).nonzero().flatten().tolist()
    )
    assert changed == (list(range(11)) if dense else [2, 7])


@pytest.mark.parametrize("importance", ["sensitivity", "gradient", "marginal"])
def test_groups_move_in_turn_by_their_own_scores(importance):
    """Two groups, T = 2, two cycles; the scores are recomputed from a second, plain model by
    autograd."""
    model, plain = toy(), toy()
    config = Config(period=2, importance=importance, importance_beta1=0.7)
    initial = {
        "head": (torch.tensor([0, 1, 2]), None),
        "twice": (torch.tensor([0, 1]), torch.tensor([4, 5])),
    }
    training = Training(
        model, [{"head": model.head}, {"twice": model.twice}], initial, config, loss_of
    )
    before = []  # per step: name -> (weight, gradient), at the weights before the update
    for batch in batches(8):
        plain.load_state_dict(model.state_dict())
        plain.zero_grad()
        loss_of(plain, batch).backward()
        weights = {name: getattr(plain, name).weight for name in initial}
        before.append(
            {
                name: (weight.detach().clone(), weight.grad.clone())
                for name, weight in weights.items()
            }
        )
        training.step([batch], 0.05)

    def score(name, slot):
        if importance == "gradient":
            return before[slot[-1]][name][1].abs()
        state = torch.zeros(1), torch.zeros(1)
        for s in slot:
            state = importance_update_ref(*state, *before[s][name], 0.7, 0.85)
        return state[0] if importance == "marginal" else state[0] * state[1]

    def top(sums, k):
        return sums.topk(k).indices.sort().values.tolist()

    def chosen(name, slot):
        matrix = score(name, slot)
        if name == "head":
            return top(matrix.sum(1), 3), list(range(6))
        if importance == "marginal":
            return top(matrix.sum(1), 2), top(matrix.sum(0), 2)
        return selection.select_ref(matrix.numpy(), 2, 2)

    expected = {
        "head": [([0, 1, 2], list(range(6)))]
        + [chosen("head", [0, 1])] * 4
        + [chosen("head", [4, 5])] * 3,
        "twice": [([0, 1], [4, 5])] * 3 + [chosen("twice", [2, 3])] * 4 + [chosen("twice", [6, 7])],
    }
    for name, subnets in expected.items():
        assert len({str(subnet) for subnet in subnets}) > 1
        found = [tuple(idx.tolist() for idx in step.subnets[name]) for step in training.history]
        assert found == subnets
    assert training.history[2].lr == {"head": 0.05 * 0.5, "twice": 0.05}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_master_collects_updates_that_the_weight_cannot_hold(dtype):
    model = toy().to(dtype)
    start = copy.deepcopy(model.state_dict())
    subnet = torch.tensor([1, 3]), torch.tensor([0, 2])
    training = run(
        model, Config(period=100), batches(20), names=("twice",), initial={"twice": subnet}, lr=1e-6
    )
    master = training.moved["twice"].master
    assert master.dtype == torch.float32
    assert torch.equal(model.twice.weight[subnet[0]][:, subnet[1]], master.to(dtype))
    moved = (master - start["twice.weight"][subnet[0]][:, subnet[1]].float()).abs()
    assert 1e-6 < moved.max() < 2.1e-5  # twenty steps of at most lr
    outside = torch.ones(6, 6, dtype=torch.bool)
    outside[subnet[0][:, None], subnet[1]] = False
    assert torch.equal(model.twice.weight[outside], start["twice.weight"][outside])
    for name, value in model.state_dict().items():
        assert name == "twice.weight" or torch.equal(value, start[name])
