"""The host path of a GPU is measured without one: every launcher is reached, and no kernel runs."""

import pytest
import torch

from bench.speed import host, simulated
from losia_kernels.layers.module import losia_layers

pytest.importorskip("triton")


@pytest.mark.parametrize("kind", ["losia", "losia, in backward"])
def test_with_launches_stubbed_nothing_is_computed_and_steps_count(kind, monkeypatch):
    monkeypatch.setattr(host, "LAYERS", 14)
    launched = []
    monkeypatch.setattr(
        simulated,
        "launch_nothing",
        lambda kernel, grid: lambda *args, **constants: launched.append(1),
    )
    chain, optimizer = host.make(kind)
    before = [layer.weight.clone() for _, layer in losia_layers(chain)]
    x = torch.randn(host.TOKENS, host.FEATURES, requires_grad=True)
    for stubbed in (True, False):
        with host.launches_stubbed() if stubbed else torch.enable_grad():
            chain(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        layers = [layer for _, layer in losia_layers(chain)]
        kept = [torch.equal(layer.weight, old) for layer, old in zip(layers, before, strict=True)]
        assert all(kept) if stubbed else not any(kept)
    # what is gathered, gradients, updates
    assert len(launched) == 14 + 14 + (1 if kind == "losia" else 14)
    assert all(optimizer.state[layer.subnet]["step"] == 2 for layer in layers)


def test_in_a_graph_the_host_is_busy_with_gradients_and_the_step_alone(monkeypatch):
    monkeypatch.setattr(host, "LAYERS", 14)
    with host.launches_stubbed(), host.graphs_stubbed():
        found = host.microseconds("losia", captured=True)
        eager = host.microseconds("losia")
    assert set(found) == {"backward", "step"}
    assert found["backward"] < eager["forward"] + eager["backward"]
