"""A captured micro-batch trains to the bits of a plain one, and is captured anew when it must be."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from losia_kernels import CapturedBackward, LoSiAAdamW, LoSiAConfig, apply_losia, attach
from losia_kernels.layers.module import losia_layers
from tests.tiny import TinyLM, make_batches, paper

STEPS = 9
AT_RANDOM = LoSiAConfig(rank_factor=1 / 2, period=2)
BY_IMPORTANCE = paper(rank_factor=1 / 2, period=2)


def make(config=AT_RANDOM, driven="LoSiAAdamW", dropout=0.0, **options):
    torch.manual_seed(0)
    model = apply_losia(TinyLM(dropout=dropout), config)
    if driven == "LoSiAAdamW":
        return model, LoSiAAdamW(model, lr=0.01, **options)
    parameters = [layer.subnet for _, layer in losia_layers(model)]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    attach(optimizer, model)
    return model, optimizer


def plain_backward(loss):
    def run(*args, **kwargs):
        value = loss(*args, **kwargs)
        value.backward()
        return value.detach()

    return run


def train(model, optimizer, backward, batches, micro=1, set_to_none=True) -> list[torch.Tensor]:
    """The losses of all micro-batches."""
    torch.manual_seed(1)
    losses = []
    for start in range(0, len(batches), micro):
        losses += [backward(batch) for batch in batches[start : start + micro]]
        optimizer.step()
        (optimizer if set_to_none else model).zero_grad(set_to_none)
    return losses


def addresses(model: nn.Module) -> list[int]:
    tensors = [*model.parameters()]
    for _, layer in losia_layers(model):
        tensors += layer.indices
    return [tensor.data_ptr() for tensor in tensors]


def check_same(first: nn.Module, second: nn.Module) -> None:
    theirs = second.state_dict()
    for name, value in first.state_dict().items():
        assert torch.equal(value, theirs[name]), name


def twins(
    graphs, config, *, micro=1, set_to_none=True, lengths=(5,), changed=lambda model: model, **made
):
    """Trains a plain and a captured run; checks that they are the same to the bit."""
    (captured, first), (plain, second) = make(config, **made), make(config, **made)
    changed(captured), changed(plain)
    batches = [
        {name: value[:, : lengths[number % len(lengths)]] for name, value in batch.items()}
        for number, batch in enumerate(make_batches(STEPS * micro))
    ]
    backward = CapturedBackward(lambda batch: captured(**batch).loss / micro, first)
    first.timeline.loss_divisor = second.timeline.loss_divisor = float(micro)
    lay = addresses(captured)
    mine = train(captured, first, backward, batches, micro, set_to_none)
    other = plain_backward(lambda batch: plain(**batch).loss / micro)
    theirs = train(plain, second, other, batches, micro, set_to_none)
    assert torch.equal(torch.stack(mine), torch.stack(theirs))
    check_same(captured, plain)
    assert addresses(captured) == lay
    assert backward.captures == len(graphs)
    return captured, backward


@pytest.mark.parametrize("driven", ["LoSiAAdamW", "attach"])
@pytest.mark.parametrize("moves", ["random", "none"])
def test_one_capture_serves_a_run_whose_layers_never_observe(graphs, moves, driven):
    config = LoSiAConfig(rank_factor=1 / 2, period=2, moves=moves)
    before = [layer.in_idx.clone() for _, layer in losia_layers(make(config)[0])]
    model, backward = twins(graphs, config, driven=driven)
    assert backward.captures == 1 and graphs[0].replays == STEPS
    moved = [
        not torch.equal(layer.in_idx, old)
        for (_, layer), old in zip(losia_layers(model), before, strict=True)
    ]
    assert any(moved) == (moves == "random")


@pytest.mark.parametrize("driven", ["LoSiAAdamW", "attach"])
@pytest.mark.parametrize("importance", ["sensitivity", "gradient", "marginal"])
def test_it_is_captured_anew_when_others_observe_and_only_then(graphs, importance, driven):
    config = paper(rank_factor=1 / 2, period=2, importance=importance)
    model, optimizer = make(config)
    turns = [optimizer.timeline.schedule.observing(step) for step in range(STEPS)]
    changes = 1 + sum(now != then for then, now in zip(turns, turns[1:], strict=False))
    _, backward = twins(graphs, config, driven=driven)
    assert backward.captures == changes > 4
    assert sum(graph.replays for graph in graphs) == STEPS


@pytest.mark.parametrize("config", [AT_RANDOM, BY_IMPORTANCE], ids=["random", "importance"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_micro_batches_accumulate(graphs, config, set_to_none):
    twins(graphs, config, micro=3, set_to_none=set_to_none)


def test_a_shape_that_comes_in_the_middle_of_a_slot_is_captured_then(graphs):
    twins(graphs, BY_IMPORTANCE, lengths=(5, 4))


def test_gradients_zeroed_without_a_step_are_void_and_nobody_waits_to_see_it(graphs):
    (captured, first), (plain, second) = make(BY_IMPORTANCE), make(BY_IMPORTANCE)
    spike, batch = make_batches(2)
    batch = {name: value[:, :4] for name, value in batch.items()}
    of_loss = CapturedBackward(lambda batch: captured(**batch).loss, first)
    other = plain_backward(lambda batch: plain(**batch).loss)
    for model, optimizer, backward in ((captured, first, of_loss), (plain, second, other)):
        for _ in range(2):
            backward(spike)
            model.zero_grad(set_to_none=False)
            backward(batch)
            optimizer.step()
            optimizer.zero_grad()
    assert first.timeline.step == 2 and len(graphs) == 2
    check_same(captured, plain)


@pytest.mark.parametrize("config", [AT_RANDOM, BY_IMPORTANCE], ids=["random", "importance"])
def test_updates_inside_the_backward_happen(graphs, config):
    twins(graphs, config, in_backward=True)


def test_random_numbers_are_those_of_a_run_without_a_graph(graphs):
    twins(graphs, BY_IMPORTANCE, dropout=0.5)


def checkpointed(model: nn.Module) -> nn.Module:
    for block in model.model.layers:
        forward = block.forward
        block.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
    return model


def test_checkpointed_micro_batches_are_observed_one_by_one(graphs):
    twins(graphs, BY_IMPORTANCE, micro=2, changed=checkpointed)


def test_densely_trained_parameters_train_too(graphs):
    twins(graphs, LoSiAConfig(rank_factor=1 / 2, period=2, modules_to_save=["norm"]))


def test_a_fused_output_layer_runs_without_a_graph_while_it_observes(graphs):
    """What it is shown is computed from what the graph would overwrite."""
    config = paper(rank_factor=1 / 2, output_dim_factor=1 / 2, period=2)
    _, backward = twins(graphs, config)
    # of three groups the output layer is first: steps 0, 1 and 6, 7 have no graph
    assert backward.captures == 3 and sum(graph.replays for graph in graphs) == STEPS - 4


def test_a_scaled_loss(graphs):
    (captured, first), (plain, second) = make(BY_IMPORTANCE), make(BY_IMPORTANCE)
    for model, optimizer, kind in ((captured, first, CapturedBackward), (plain, second, None)):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)

        def loss(batch, model=model, scaler=scaler):
            return scaler.scale(model(**batch).loss)

        backward = plain_backward(loss) if kind is None else kind(loss, optimizer)
        for batch in make_batches(STEPS):
            optimizer.timeline.loss_divisor = 1 / scaler.get_scale()
            backward(batch)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() > 4
    check_same(captured, plain)


def test_several_shapes_share_what_is_captured_up_to_a_number(graphs):
    model, optimizer = make()
    backward = CapturedBackward(
        lambda ids, scale: model(ids, ids).loss * scale, optimizer, shapes=2
    )
    for length in (3, 4, 3, 4):
        backward(torch.zeros(2, length, dtype=torch.int64), 1.0)
    assert backward.captures == 2 and [graph.replays for graph in graphs] == [2, 2]
    with pytest.warns(UserWarning, match="another shape than the 2 captured ones"):
        backward(torch.zeros(2, 3, dtype=torch.int64), 0.5)
    assert backward.captures == 2


def change_weight(model, optimizer):
    with torch.no_grad():
        model.model.layers[0].up_proj.weight.mul_(2)


def change_subnet(model, optimizer):
    """As swapping averages in does: the weight follows at the next use."""
    model.model.layers[0].up_proj.subnet.data.mul_(2)


def change_object(model, optimizer):
    layer = model.model.layers[0].up_proj
    layer.weight = nn.Parameter(layer.weight.detach() * 2, requires_grad=False)


def change_place(model, optimizer):
    weight = model.model.layers[0].up_proj.weight
    weight.data = weight.data.clone()


def change_flag(model, optimizer):
    model.model.layers[1].down_proj.subnet.requires_grad_(False)


def change_mode(model, optimizer):
    model.eval()


def load_by_assignment(model, optimizer):
    state = copy.deepcopy(model.state_dict())
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    model.load_state_dict(state)
    optimizer.load_state_dict(optimizer_state)


@pytest.mark.parametrize(
    "change, captures",
    [
        (change_weight, 1),
        (change_subnet, 1),
        (change_object, 2),
        (load_by_assignment, 1),
        (change_place, 2),
        (change_flag, 2),
        (change_mode, 2),
    ],
)
def test_what_changes_between_two_batches_is_seen(graphs, change, captures):
    runs = make(dropout=0.25), make(dropout=0.25)
    backward = CapturedBackward(lambda batch: runs[0][0](**batch).loss, runs[0][1])
    backwards = backward, plain_backward(lambda batch: runs[1][0](**batch).loss)
    for (model, optimizer), run in zip(runs, backwards, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(model, optimizer, run, make_batches(2))
            change(model, optimizer)
            train(model, optimizer, run, make_batches(2))
    check_same(runs[0][0], runs[1][0])
    assert backward.captures == captures


def test_without_a_gpu_it_is_a_plain_backward():
    (first, mine), (second, theirs) = make(BY_IMPORTANCE), make(BY_IMPORTANCE)
    backward = CapturedBackward(lambda batch: first(**batch).loss, mine)
    train(first, mine, backward, make_batches(STEPS))
    other = plain_backward(lambda batch: second(**batch).loss)
    train(second, theirs, other, make_batches(STEPS))
    check_same(first, second)
    assert backward.captures == 0


def test_what_cannot_be_captured_is_refused_by_name(graphs):
    model, optimizer = make()
    batch = make_batches(1)[0]
    with pytest.raises(TypeError, match="drives no model: give LoSiAAdamW"):
        CapturedBackward(lambda: None, torch.optim.SGD(model.parameters(), lr=0.1))
    of_loss = CapturedBackward(lambda batch: model(**batch).loss, optimizer)
    with pytest.raises(TypeError, match="holds tensors, numbers and strings, got a object"):
        of_loss({**batch, "more": object()})
    with pytest.raises(TypeError, match="requires a gradient, which no graph would give it"):
        of_loss({**batch, "x": torch.zeros(2, requires_grad=True)})
    with pytest.raises(ValueError, match=r"a scalar tensor .* got \(2, 3, 13\)"):
        CapturedBackward(lambda ids: model(ids).logits, optimizer)(torch.zeros(2, 3).long())
    waits = CapturedBackward(lambda b: model(**b).loss * model(**b).loss.item(), optimizer)
    with pytest.raises(RuntimeError, match="no graph can hold what the loss does: .* It must not"):
        waits(batch)
    assert all(layer.subnet.grad is None for _, layer in losia_layers(model))
    of_loss(batch)  # nothing is broken


def test_engines_that_reduce_inside_the_backward_are_refused(monkeypatch):
    model, optimizer = make()
    backward = CapturedBackward(lambda batch: model(**batch).loss, optimizer)
    monkeypatch.setattr(optimizer.timeline.placement.__class__, "cut", True)
    with pytest.raises(ValueError, match="fully_shard gathers weights inside"):
        backward(make_batches(1)[0])
    monkeypatch.undo()
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    monkeypatch.setattr(optimizer.timeline, "model", wrapped)
    with pytest.raises(ValueError, match="DistributedDataParallel reduces gradients inside"):
        backward(make_batches(1)[0])


def test_layers_on_several_devices_are_refused(graphs):
    model, optimizer = make()
    layer = model.model.layers[1].up_proj
    layer._buffers["out_idx"] = layer.out_idx.to("meta")
    with pytest.raises(
        ValueError, match="layers are on cpu, meta: a graph is captured on one device"
    ):
        CapturedBackward(lambda ids: model(ids, ids).loss, optimizer)(torch.zeros(2, 3).long())


def test_a_capture_by_hand_of_layers_that_observe_is_refused(graphs):
    """Its replays would show them nothing."""
    model, optimizer = make(BY_IMPORTANCE)
    model(**make_batches(1)[0]).loss.backward()
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="observes, and a captured backward .*CapturedBackward"),
        torch.cuda.graph(graph, 0, torch.cuda.Stream(torch.device("cpu")), "thread_local"),
    ):
        model(**make_batches(1)[0]).loss.backward()


def test_captured_by_hand_a_default_run_needs_one_graph(graphs):
    """As docs/models.md has it: the gradients that the capture made stay, and every replay fills
    them."""
    (captured, first), (plain, second) = make(), make()
    batches = make_batches(STEPS)
    static = {name: value.clone() for name, value in batches[0].items()}
    captured(**static).loss.backward()  # the warm-up
    first.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, 0, torch.cuda.Stream(torch.device("cpu")), "thread_local"):
        captured(**static).loss.backward()
    for batch in batches:
        for name, value in batch.items():
            static[name].copy_(value)
        graph.replay()
        first.step()
    train(plain, second, plain_backward(lambda batch: plain(**batch).loss), batches)
    check_same(captured, plain)


def test_a_batch_of_transformers_is_a_dict(graphs):
    from collections import UserDict

    model, optimizer = make()
    backward = CapturedBackward(lambda batch: model(**batch).loss, optimizer)
    losses = [backward(UserDict(batch)) for batch in make_batches(2)]
    assert not torch.equal(*losses) and backward.captures == 1
