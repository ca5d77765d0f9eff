"""The output layer's rows: gated, at every share of the vocabulary; a wrong gradient gives no
figure."""

import pytest
import torch

from bench.harness.gates import RedGate
from bench.harness.jobs import MissingPeer
from bench.harness.live_bytes import peak_bytes
from bench.speed import output_layer

CPU = torch.device("cpu")


def make(p_o: float) -> output_layer.Inputs:
    return output_layer.Inputs.make(300, 97, 16, p_o, CPU, torch.float32)


@pytest.mark.parametrize("p_o", [0, 1 / 8, 1])
@pytest.mark.parametrize("name", ["losia", "torch"])
def test_the_gate_is_green(name, p_o):
    row = output_layer.run(output_layer.METHODS[name], make(p_o), CPU)
    assert row["total"]["ms"] > 0 and row["extra_bytes"] > 0
    has_weight_gradient = p_o == 1 or (name == "losia" and p_o > 0)
    assert len(row["gate"]) == 2 + has_weight_gradient


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_the_gate_is_red(wrong):
    def method(inputs):
        results = list(output_layer.losia(inputs))
        results[wrong] = results[wrong] * 1.01
        return tuple(results)

    with pytest.raises(RedGate, match=["loss", "d_hidden", "d_weight"][wrong]):
        output_layer.gate(method, make(1 / 8))


def test_ours_needs_less_memory_than_the_logits():
    inputs = output_layer.Inputs.make(4096, 1000, 8, 0, CPU, torch.float32)
    logits = 4 * 4096 * 1000
    assert peak_bytes(lambda: output_layer.plain_torch(inputs), CPU) > 2 * logits
    # the chunk of 128 MiB holds all
    assert peak_bytes(lambda: output_layer.losia(inputs), CPU) < 1.1 * logits


@pytest.mark.parametrize("name", ["liger", "cut-cross-entropy"])
def test_peers_that_cannot_run_here(name):
    with pytest.raises(MissingPeer):
        output_layer.METHODS[name](make(0))


def test_jobs_are_distinct():
    keys = [str(job.key) for job in output_layer.jobs(torch.device("cuda"), torch.bfloat16)]
    assert len(keys) == len(set(keys)) == 3 * (4 + 4 + 2)
