"""DDP: N ranks with batch B are one with N * B, over three cycles; what crosses the wire; replicas
bit-identical."""

import pytest
import torch

from losia_kernels.layers.module import losia_layers
from tests.parallel import runs, unlike
from tests.parallel.runs import Run

CPU = torch.device("cpu")
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
VARIANTS = {
    "paper": Run(),
    "marginal": Run({"importance": "marginal"}),
    "gradient": Run({"importance": "gradient"}),
    "sync": Run({"update_type": "sync"}),
    "random-moves": Run({"moves": "random", "init_subnet": "random", "output_dim_factor": 0.5}),
    "head": Run({"output_dim_factor": 0.25}),
    "accumulated": Run(accumulation=2),
    "no_sync": Run(accumulation=2, no_sync=True),
    "attached": Run(attached=True),
    "calibrated": Run(calibrated=True),
    "static_graph": Run(ddp={"static_graph": True}),
    "find_unused": Run(ddp={"find_unused_parameters": True}),
    "bucket_view": Run(ddp={"gradient_as_bucket_view": True}),
}


def assert_replicas(outcomes: list[runs.Outcome]) -> None:
    for other in outcomes[1:]:
        assert other.subnets == outcomes[0].subnets
        assert_same_bits(other.state, outcomes[0].state)


def assert_same_bits(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(second[key], value), key


def assert_same_run(outcome: runs.Outcome, whole: runs.Outcome) -> None:
    assert outcome.subnets == whole.subnets
    torch.testing.assert_close(outcome.state, whole.state, rtol=0, atol=1e-12)
    for name in whole.subnets[0]:
        partial = whole.state[f"{name}.subnet"].shape != whole.state[f"{name}.weight"].shape
        assert not partial or len({str(subnets[name]) for subnets in whole.subnets}) > 1, (
            f"{name} never moved"
        )


@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_are_one_with_twice_the_batch(two, name):
    outcomes = two.run(runs.train, VARIANTS[name])
    assert_replicas(outcomes)
    assert_same_run(outcomes[0], runs.train(CPU, VARIANTS[name]))


def test_four_ranks_are_one_with_four_times_the_batch(four):
    outcomes = four.run(runs.train, Run())
    assert_replicas(outcomes)
    assert_same_run(outcomes[0], runs.train(CPU, Run()))


def test_bytes_on_the_wire(two):
    """Each step p^2 of the dense gradients; and one group's dense gradients."""
    run = Run(dtype=torch.float32, accumulation=2, no_sync=True)
    model = runs.convert(run, CPU)
    layers = [layer for _, layer in losia_layers(model)]
    subnets = 4 * sum(layer.subnet.numel() for layer in layers)
    weights = 4 * sum(layer.weight.numel() for layer in layers)
    assert subnets == weights / 16
    sent = two.run(runs.train, run)[0].sent
    assert sent["subnets"] == run.steps * subnets
    per_group = weights // runs.BLOCKS
    flags = len(layers) // runs.BLOCKS  # whether the layer was used, a byte each
    assert sent["importance"] == run.steps * run.accumulation * (per_group + flags)


TOLD = {
    "weights": "lm.model.embed_tokens.weight of rank 1 is not that of rank 0",
    "embedding": "lm.model.embed_tokens.weight of rank 1 is not that of rank 0",
    "config": "LoSiAConfig.period is 2 (rank 0), 3 (rank 1)",
    "length": "LoSiAConfig.period is 1 (rank 0), 2 (rank 1)",
    "seed": "LoSiAConfig.seed is 0 (rank 0), 1 (rank 1)",
    "layers": "models of different layers: lm.model.layers.0.down_proj.subnet is not on rank 1",
    "subnet": "lm.model.layers.0.up_proj.subnet of rank 1 is not that of rank 0",
    "lr": "LoSiAAdamW.lr is 0.01 (rank 0), 0.02 (rank 1)",
    "resumed step": "the step is 0 (rank 0), 1 (rank 1)",
}


@pytest.mark.parametrize("what", TOLD)
def test_ranks_that_differ_are_told_before_the_first_step(two, what):
    for message in two.run(unlike.differ, what):
        assert TOLD[what] in message


def test_ranks_that_are_alike_are_told_nothing(two):
    assert two.run(unlike.differ, "nothing") == ["", ""]


def test_weights_that_ddp_made_equal_are_worth_a_warning(two):
    for warnings in two.run(unlike.warned_of_weights):
        assert any("as apply_losia found them" in warning for warning in warnings)


def test_several_models_in_groups_of_their_own(two):
    assert two.run(unlike.independent_models) == [4, 4]


@pytest.mark.parametrize("broadcast", [True, False])
def test_two_forwards_before_a_backward(two, broadcast):
    if broadcast and TORCH < (2, 13):
        pytest.skip("in torch 2.11 a broadcast of buffers is a change that autograd refuses")
    assert_same_bits(*two.run(runs.two_forwards, {"broadcast_buffers": broadcast}))


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("importance", ["sensitivity", "gradient", "marginal"])
def test_ranks_that_take_other_paths(two, importance, accumulation):
    run = Run({"importance": importance}, steps=2 * runs.CYCLE, accumulation=accumulation)
    outcomes = two.run(runs.other_paths, run)
    assert_same_bits(*outcomes)
    whole = runs.other_paths(CPU, run)
    torch.testing.assert_close(outcomes[0], whole, rtol=0, atol=1e-12)
    first = runs.other_paths(CPU, Run(run.config, steps=1))
    for expert in (0, 1):
        name = f"lm.model.layers.0.up_proj.experts.{expert}.out_idx"
        assert not torch.equal(whole[name], first[name]), f"{name} never moved"


def test_uneven_batches_with_weights(two):
    for several, alone in two.run(runs.uneven):
        torch.testing.assert_close(several, alone, rtol=0, atol=1e-12)


def test_join_is_refused(two):
    for message in two.run(runs.join):
        assert "join" in message


def test_mean_of_ranks(four):
    """A factor in the gradient hardly changes what is chosen, so the runs above would not show
    it."""
    assert four.run(runs.mean_of_ranks) == [[2.5, 25.0]] * 4
