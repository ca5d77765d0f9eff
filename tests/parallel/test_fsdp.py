"""FSDP2: shards choose and train as the whole model in one process does."""

import math

import pytest
import torch

from tests.parallel import runs, sharding
from tests.parallel.runs import Run
from tests.parallel.test_ddp import assert_replicas, assert_same_bits, assert_same_run

CPU = torch.device("cpu")
AT_RANDOM = {"moves": "random", "init_subnet": "random", "output_dim_factor": 0.5}
VARIANTS = {
    "paper": Run(),
    "marginal": Run({"importance": "marginal"}),
    "gradient": Run({"importance": "gradient"}),
    "bfloat16_importance": Run({"importance": "sensitivity_bfloat16"}),
    "sync": Run({"update_type": "sync"}),
    # the other loss is in float64, this in float32
    "random-moves": Run({**AT_RANDOM, "fused_loss": False}),
    "head": Run({"output_dim_factor": 0.25, "fused_loss": False}),
    "dense_head": Run({"output_dim_factor": 1.0, "fused_loss": False}),
    "norms": Run({"modules_to_save": ["norm"]}),
    "accumulated": Run(accumulation=2),
    "no_sync": Run(accumulation=2, no_sync=True),
    "attached": Run(attached=True),
    "calibrated": Run(calibrated=True),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_two_shards_are_one_process(two, name):
    outcomes = two.run(runs.train_sharded, VARIANTS[name])
    assert_replicas(outcomes)
    assert_same_run(outcomes[0], runs.train(CPU, VARIANTS[name]))


def test_four_uneven_shards_are_one_process(four):
    """Of 3 rows, k_out of up_proj, the ranks hold 1, 1, 1 and none; of the 2 of down_proj two hold
    none."""
    outcomes = four.run(runs.train_sharded, Run())
    assert_replicas(outcomes)
    assert_same_run(outcomes[0], runs.train(CPU, Run()))


def test_optimizer_that_accelerate_gives_the_shards_to(two):
    outcomes = two.run(runs.train_sharded, Run(), None, True)
    assert_same_run(outcomes[0], runs.train(CPU, Run()))


@pytest.mark.parametrize("engine", ["fsdp", "accelerate", "ddp"])
def test_skipped_steps_leave_no_trace(two, engine):
    control = two.run(sharding.skipping, engine, None)[0]
    for drop in ("optimizer", "optimizer_zeros", "model", "model_zeros"):
        assert_same_bits(two.run(sharding.skipping, engine, drop)[0], control)


@pytest.mark.parametrize("offload", [False, True])
def test_bfloat16(two, offload):
    """What is written into the shards is the float32 master, rounded to nearest; nothing else has
    moved."""
    outcomes = two.run(sharding.bfloat16, offload)
    losses, state, written = outcomes[0]
    assert all(other[0] != [] for other in outcomes) and all(map(math.isfinite, losses))
    for name, block in written.items():
        assert torch.equal(block, state[f"{name}.subnet"].bfloat16()), name
        assert state[f"{name}.subnet"].dtype == torch.float32
    start = runs.convert(Run(dtype=torch.bfloat16), CPU).state_dict()
    changed = {name for name in start if not torch.equal(start[name], state[name])}
    assert changed == {
        key
        for key in start
        if ".layers." in key and key.split(".")[-2].endswith("proj") and not key.endswith("bias")
    }
