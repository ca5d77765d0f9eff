"""Every method takes a step on a tiny model behind its gate, and a wrong gradient is seen."""

import copy
import functools
import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F

from bench.harness import timing
from bench.harness.gates import RedGate, Reference
from bench.harness.jobs import MissingPeer, run_job
from bench.methods import LAYER_METHODS, METHODS, Options, get_method
from bench.methods.adapters import FusedLoRALinear
from bench.methods.losia import DenseGradientLinear
from bench.speed import layer, model
from bench.speed.models import CONFIGS
from losia_kernels import LoSiALinear

CPU = torch.device("cpu")
RUNNABLE = [name for name in METHODS if name != "lora-fp32"]


@pytest.fixture(autouse=True)
def quick(monkeypatch, ligers_kernels):
    for module, name in ((layer, "samples"), (model, "measure")):
        quick = functools.partial(getattr(timing, name), repeats=1, warmup=1)
        monkeypatch.setattr(
            module, name, lambda phases, device, *_, q=quick, **__: q(phases, device)
        )
    monkeypatch.setattr(layer, "rotation", lambda size, device: 1)


def needs(method: str) -> None:
    peft = ("lora", "lora-fp32", "lora-defaults", "dora", "pissa", "lora-liger")
    peer = "galore_torch" if method.startswith("galore") else "peft" if method in peft else None
    if "liger" in method:
        pytest.importorskip("liger_kernel")
    if peer is not None and importlib.util.find_spec(peer) is None:
        pytest.skip(f"{peer} is not installed")


@pytest.mark.parametrize("stack", ["linears", "block"])
@pytest.mark.parametrize("method", [name for name in LAYER_METHODS if name in RUNNABLE])
def test_a_layer_row(tiny, method, stack):
    needs(method)
    if "liger" in method and stack == "linears":
        pytest.skip("changes nothing there")
    row = layer.run_layer(method, tiny, stack, 1, 32, CPU, torch.float32, Options(rank=4))
    assert row["gate"]["dx"]["error"] <= row["gate"]["dx"]["allowed"]
    assert {"forward", "backward", "update", "total"} <= row.keys() and row["floor_ms"] > 0
    assert ("subnet gradient" in row["gate"]) == method.startswith("losia")
    assert row["peak_bytes"] > 0 and (row["trained"] > 0) == (not method.startswith("frozen"))
    assert method != "frozen" or stack != "linears" or row["saved_bytes"] == 0


@pytest.mark.parametrize("method", ["losia-pro", "losia-pro-fused", "lora", "full", "galore"])
def test_a_model_row(tiny, method):
    needs(method)
    run = model.Run(method, tiny, 1, 32, checkpointing=True, options=Options(rank=4))
    row = model.run_model(run, CPU, torch.float32)
    assert row["us_per_token"]["total"] == pytest.approx(1e3 * row["total"]["ms"] / 32)


@pytest.mark.parametrize(
    "method", ["lora", "lora-fp32", "dora", "pissa", "lora-fused", "galore", "losia-pro"]
)
def test_sixteen_bits(tiny, method):
    needs(method)
    row = layer.run_layer(method, tiny, "block", 1, 32, CPU, torch.bfloat16, Options(rank=4))
    assert row["gate"]["dx"]["error"] <= row["gate"]["dx"]["allowed"]


FLOAT32 = {"lora-fp32": True, "lora-defaults": True, "losia-pro": False}  # autocast


@pytest.mark.parametrize(
    "method", [*FLOAT32, "lora", "dora", "pissa", "lora-fused", "galore", "full"]
)
def test_what_is_trained_has_the_dtype_that_the_readme_says(tiny, method):
    needs(method)
    prepared = get_method(method).prepare(
        model.build_model(tiny, CPU, torch.bfloat16), Options(rank=4)
    )
    assert {p.dtype for p in prepared.module.parameters() if p.requires_grad} == {
        torch.float32 if method in FLOAT32 else torch.bfloat16
    }
    assert prepared.autocast == FLOAT32.get(method, False)
    assert not any(
        part.p for part in prepared.module.modules() if isinstance(part, torch.nn.Dropout)
    )


@pytest.mark.parametrize("method", [name for name in RUNNABLE if not name.startswith("frozen")])
def test_a_step_changes_what_is_trained_and_leaves_no_gradients(tiny, method):
    needs(method)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if method == "losia-pro-lean" else torch.float32
    prepared = get_method(method).prepare(model.build_model(tiny, CPU, dtype), Options(rank=4))
    before = {name: value.clone() for name, value in prepared.module.state_dict().items()}
    for phase in model.step_phases(prepared, torch.zeros(1, 16, dtype=torch.long)).values():
        phase(0)
    assert any(
        not torch.equal(value, before[name]) for name, value in prepared.module.state_dict().items()
    )
    assert all(parameter.grad is None for parameter in prepared.module.parameters())


def test_the_least_memory_is_for_bfloat16_and_says_so(tiny):
    run = model.Run("losia-pro-lean", tiny, 1, 32, checkpointing=True)
    assert model.run_model(run, CPU, torch.bfloat16)["gate"]["dx"]["error"] > 0
    with pytest.raises(MissingPeer, match="needs a bfloat16 model"):
        model.run_model(run, CPU, torch.float32)


def test_the_hand_fused_lora_has_the_gradients_of_the_plain_one():
    torch.manual_seed(0)
    linear = torch.nn.Linear(12, 20, dtype=torch.float64)
    fused = FusedLoRALinear(linear, rank=4, alpha=8)
    torch.nn.init.normal_(fused.up)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    inputs = (x, fused.down, fused.up)
    expected = linear(x) + 2 * (x @ fused.down.T @ fused.up.T)
    dy = torch.randn_like(expected)
    torch.testing.assert_close(fused(x), expected)
    for found, true in zip(
        torch.autograd.grad(fused(x), inputs, dy),
        torch.autograd.grad(expected, inputs, dy),
        strict=True,
    ):
        torch.testing.assert_close(found, true)


def test_liger_is_in_one_model_alone(tiny):
    pytest.importorskip("liger_kernel")
    plain = layer.build_stack(tiny, "block", CPU, torch.float32)
    modeling = vars(sys.modules[type(plain.model.layers[0]).__module__])
    before = dict(modeling)
    prepared = get_method("frozen-liger").prepare(copy.deepcopy(plain), Options())
    assert modeling == before
    changed, block = prepared.module.model.layers[0], plain.model.layers[0]
    for part in ("mlp", "input_layernorm", "post_attention_layernorm", "self_attn"):
        assert "forward" in vars(getattr(changed, part)) and "forward" not in vars(
            getattr(block, part)
        )
    x = torch.randn(1, 4, plain.width)
    rotary = changed.self_attn.forward.__globals__["apply_rotary_pos_emb"]
    assert rotary.__module__.startswith("liger_kernel")
    torch.testing.assert_close(prepared.module(x), plain(x))


def test_liger_without_a_gpu_is_a_missing_peer(tiny, monkeypatch):
    pytest.importorskip("liger_kernel")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(MissingPeer, match="on a GPU only"):
        layer.run_layer("losia-liger", tiny, "block", 1, 4, CPU, torch.float32)


def test_a_tied_output_layer_passes_the_gate(tiny, monkeypatch):
    monkeypatch.setitem(CONFIGS, tiny, {**CONFIGS[tiny], "tie_word_embeddings": True})
    run = model.Run("losia-pro", tiny, 1, 32, False, Options(1 / 8, 1 / 8))
    assert "subnet gradient" in model.gate(run, CPU, torch.float32)


def test_a_wrong_subnet_gradient_is_a_red_gate(tiny, monkeypatch):
    real, hooked = LoSiALinear.forward, set()

    def wrong(self, x):
        if self.subnet.requires_grad and self not in hooked:
            hooked.add(self)
            self.subnet.register_hook(lambda grad: grad * 1.01)
        return real(self, x)

    monkeypatch.setattr(LoSiALinear, "forward", wrong)
    with pytest.raises(RedGate, match="subnet gradient"):
        layer.run_layer("losia-pro-off", tiny, "linears", 1, 32, CPU, torch.float32, Options())


def test_a_wrong_dx_is_a_red_gate(tiny, monkeypatch):
    monkeypatch.setattr(
        DenseGradientLinear, "forward", lambda self, x: F.linear(x * 1.001, self.weight)
    )
    with pytest.raises(RedGate, match="dx"):
        layer.run_layer("losia-dense-off", tiny, "block", 1, 32, CPU, torch.float32, Options())


def test_the_reference_leaves_the_model_as_it_was(tiny):
    block = layer.build_stack(tiny, "block", CPU, torch.bfloat16)
    before = {
        name: value.clone() for name, value in (*block.named_parameters(), *block.named_buffers())
    }
    Reference(block, layer.backward_dx(layer.Inputs(block, 1, 16)))
    for name, value in (*block.named_parameters(), *block.named_buffers()):
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name


def test_a_row_names_what_was_run(tiny, monkeypatch):
    monkeypatch.setattr(model, "run_model", lambda run, device, dtype: {"ran": run.method})
    row = run_job(next(job for job in model.jobs(CPU, torch.float32) if job.name == "lora"))
    assert row["status"] == "ok" and row["ran"] == "lora"
    size = {"model": "smollm2-135m", "batch": 1, "context": 128, "checkpointing": False, "rank": 64}
    assert row["id"] == {"suite": "model", "name": "lora", **size, "dtype": "float32"}
