"""Timing, gates, and rows for what goes wrong."""

import json
import time

import pytest
import torch

from bench import __main__ as command
from bench.harness.gates import RedGate, gate_relative, gate_rule
from bench.harness.jobs import Clock, Job, MissingPeer, bytes_asked_for, run_all, run_job
from bench.harness.timing import Roof, measure, rotation
from bench.methods import UnknownMethod, get_method
from bench.speed import ops

CPU = torch.device("cpu")


def job(run, name: str = "x", suite: str = "ops", priority: float = 0.0, **settings) -> Job:
    return Job(suite, name, settings, run, priority)


def test_a_known_duration_is_measured_phase_by_phase():
    phases = {"short": lambda i: time.sleep(0.002), "long": lambda i: time.sleep(0.01)}
    found = measure(phases, CPU, repeats=7)
    short, long, total = (found[name] for name in ("short", "long", "total"))
    assert 2 <= short.ms < long.ms and 10 <= long.ms < total.ms
    assert long.low <= long.ms <= long.high and long.repeats == 7


def test_a_known_kernel_is_timed_on_rotated_inputs(monkeypatch):
    monkeypatch.setattr(ops, "measure_roof", lambda device, dtype: Roof(10.0, 0.1))
    case = ops.gather_features((64, 256), 1 / 8, 128, torch.float32)
    seen = set()
    ours = case.forms["ours"]
    case.forms["ours"] = lambda x, idx: seen.add(x.data_ptr()) or ours(x, idx)
    found = ops.run_case(case, CPU, torch.float32)["forms"]["ours"]
    assert found["ms"] > 0 and found["gate"]["error"] == 0 and len(seen) > 2
    assert found["gbs"] == pytest.approx(case.moved_bytes / found["ms"] / 1e6)


def test_inputs_are_rotated_past_the_cache():
    assert rotation(2**20, CPU) > 32 and rotation(2**40, CPU) == 2


def test_a_wrong_kernel_has_no_figure(monkeypatch):
    monkeypatch.setattr(ops, "measure_roof", lambda device, dtype: Roof(10.0, 0.1))
    case = ops.subnet_grad((32, 64), 1 / 4, 16, torch.float32)
    right = case.forms["ours"]
    case.forms["ours"] = lambda *a: right(*a) * 1.001
    row = run_job(job(lambda: ops.run_case(case, CPU, torch.float32)))
    assert row["status"] == "red" and "error" in row["reason"]
    assert "forms" not in row and "total" not in row


@pytest.mark.parametrize("name", ["ours, another way", "library"])
def test_another_form_that_is_wrong_is_told_and_the_others_are_timed(monkeypatch, name):
    monkeypatch.setattr(ops, "measure_roof", lambda device, dtype: Roof(10.0, 0.1))
    case = ops.importance_marginals((32, 64), 1, 1, torch.float32)
    case.forms[name] = lambda w, g: (w.sum(1), g.sum(0))
    forms = ops.run_case(case, CPU, torch.float32)["forms"]
    assert "RedGate" in forms[name]["status"] and "ms" not in forms[name]
    assert forms["ours"]["status"] == forms["eager"]["status"] == "ok"


@pytest.mark.parametrize("name", ops.CASES)
def test_every_op_passes_its_gate(name):
    case = ops.CASES[name]((48, 80), 1 / 4, 32, torch.bfloat16)
    arguments = case.inputs(torch.Generator().manual_seed(0))
    for form, run in case.forms.items():
        ops.gate(case, form, run, arguments)


def test_gates_refuse_what_is_not_a_number():
    truth = torch.ones(3, dtype=torch.float64)
    broken = torch.tensor([1.0, float("nan"), 1.0])
    with pytest.raises(RedGate, match="x: error inf"):
        gate_rule("x", broken, torch.ones(3), truth)
    with pytest.raises(RedGate, match="x: error inf, allowed inf"):
        gate_rule("x", broken, broken, truth)
    with pytest.raises(RedGate, match="x: relative error"):
        gate_relative("x", broken, truth, 0.1)


@pytest.mark.parametrize("gate", [gate_rule, gate_relative])
def test_gates_refuse_another_shape(gate):
    """Which a subtraction would spread over the truth's."""
    truth = torch.ones(3, dtype=torch.float64)
    eager = (torch.ones(3),) if gate is gate_rule else ()
    allowed = () if gate is gate_rule else (0.1,)
    with pytest.raises(RedGate, match=r"x: a result of \(1,\), expected \(3,\)"):
        gate("x", torch.ones(1), *eager, truth, *allowed)


def test_out_of_memory_is_a_row_and_the_run_goes_on():
    def fail():
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of"
        )

    rows = []
    jobs = [job(fail, "first"), job(lambda: {"total": {"ms": 1.0}}, "next")]
    run_all(jobs, lambda job, row: rows.append(row) or "", Clock(), lambda line: None)
    assert [row["status"] for row in rows] == ["oom", "ok"]
    assert rows[0]["bytes_asked_for"] == int(1.5 * 2**30)


def test_the_cpu_allocator_runs_out_of_memory_too():
    error = RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."
    )
    assert bytes_asked_for(error) == 4096
    assert bytes_asked_for(RuntimeError("shapes do not match")) is None


def test_missing_and_failing_peers_are_rows():
    def missing():
        raise MissingPeer("galore_torch cannot be imported")

    row = run_job(job(missing))
    assert (row["status"], row["reason"]) == ("missing", "galore_torch cannot be imported")
    row = run_job(job(lambda: 1 / 0))
    assert row["status"] == "failed" and row["reason"].startswith("ZeroDivisionError")


def test_the_most_telling_come_first_and_the_run_stops_in_time():
    order = []
    jobs = [job(lambda k=k: order.append(k) or {}, str(k), priority=k) for k in (3, 1, 2)]
    assert run_all(jobs, lambda *a: "", Clock(), lambda line: None) == []
    assert order == [1, 2, 3]
    slow = [job(lambda: time.sleep(0.11) or {}, str(k), "layer") for k in range(20)]
    left = run_all(slow, lambda *a: "", Clock(0.5 / 60), lambda line: None)
    assert 0 < 20 - len(left) <= 5 and left[-1].name == "19"


def test_an_unknown_method_is_named_with_the_known_ones(capsys):
    known = "unknown method 'lorra'; the methods are frozen, losia-pro, lora"
    with pytest.raises(UnknownMethod, match=known):
        get_method("lorra")
    assert command.main(["layer", "--methods", "lora,lorra"]) == 2
    assert "'lorra'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("all --minutes -1", "expected a positive number of minutes, got -1"),
        ("all --minutes soon", "expected a positive number of minutes, got soon"),
        ("all --device tpu", "expected cuda, cuda:1 or cpu"),
        ("all --device cuda:99", "torch sees"),
        ("all --commit ../x", "expected a commit's hash"),
        ("ops --methods lora --device cpu", "it has subnet_grad, importance_update_"),
        ("layers", "invalid choice: 'layers'"),
    ],
)
def test_bad_arguments_say_what_was_expected(arguments, problem, capsys):
    try:
        code = command.main(arguments.split())
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2 and problem in capsys.readouterr().err


def test_the_list_is_in_the_order_of_the_run(capsys):
    assert command.main(["all", "--device", "cpu", "--methods", "frozen,lora", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("layer frozen model=smollm2-135m stack=block") and len(lines) > 5


def test_provenance_says_what_was_measured_and_not_where(tmp_path):
    import platform

    from bench.harness.provenance import provenance

    found = provenance(CPU)
    assert set("device kind torch triton peers commit sources started".split()) <= found.keys()
    assert found["kind"] == "CPU" and found["torch"] == torch.__version__
    assert platform.node() not in json.dumps(found)
