"""Rows that are whole at any moment, and runs that go on where the last one stopped."""

import ast
import json

import pytest
import torch

from bench import __main__ as command
from bench.harness import provenance, store
from bench.harness.jobs import Clock, DeviceLost, Job, describe, free_memory, run_all
from bench.speed.results import Results, load

PROVENANCE = {
    "device": "A CPU (of ours)",
    "kind": "CPU",
    "commit": "abc",
    "sources": "1",
    "started": "2026-01-01T00:00:00",
    "torch": "2.13.0",
    "threads": 2,
    "peers": {"peft": "0.21", "galore-torch": None},
}


def job(run, name: str, **settings) -> Job:
    return Job("ops", name, settings, run)


def row(name: str, status: str = "ok", **more) -> dict:
    return {"id": {"suite": "ops", "name": name}, "status": status, **more}


def keep(results: Results):
    return lambda job, row: results.add(row) or describe(row)


def test_rows_are_on_disk_at_once_and_measured_again_replace_the_old(tmp_path):
    results = Results.for_run(PROVENANCE, tmp_path)
    for name, ms in (("a", 1), ("b", 2), ("a", 3)):
        results.add(row(name, ms=ms))
        [group] = load(tmp_path)
        assert group["rows"][-1]["ms"] == ms and group["provenance"] == PROVENANCE
    assert [(old["id"]["name"], old["ms"]) for old in group["rows"]] == [("b", 2), ("a", 3)]
    assert [path.name for path in tmp_path.iterdir()] == ["speed.jsonl"]


def test_a_line_that_was_cut_off_is_left_out_and_replaced(tmp_path):
    path = tmp_path / "x.jsonl"
    assert store.load(path) == []
    store.append(path, {"a": 1})
    path.write_text(path.read_text() + '{"a":2, "b')
    assert store.load(path) == [{"a": 1}]
    store.append(path, {"a": 3})
    assert store.load(path) == [{"a": 1}, {"a": 3}] and path.read_text() == '{"a":1}\n{"a":3}\n'
    path.write_text('{"a":1}\n<<<<<<<\n{"a":3}\n')
    with pytest.raises(json.JSONDecodeError):
        store.load(path)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, True),
        ({"commit": "def"}, True),  # a commit that changes nothing that is measured
        ({"peers": {"peft": "0.21", "galore-torch": "1.0"}}, True),
        ({"sources": "2"}, False),
        ({"sources": "2", "commit": "def"}, False),
        ({"commit": "abc-changed"}, False),
        ({"torch": "2.11.0"}, False),
        ({"threads": 1}, False),
        ({"peers": {"peft": "0.22", "galore-torch": None}}, False),
        ({"device": "Another"}, False),
    ],
)
def test_rows_are_kept_while_code_and_environment_are_the_same(tmp_path, changes, kept):
    Results.for_run(PROVENANCE, tmp_path).add(row("a"))
    now = {**PROVENANCE, "started": "2026-02-02T00:00:00", **changes}
    results = Results.for_run(now, tmp_path)
    assert (len(results.rows) == 1) == kept
    results.add(row("b"))
    groups = load(tmp_path)
    assert [len(group["rows"]) for group in groups] == ([2] if kept else [1, 1])
    assert groups[0]["provenance"]["started"] == PROVENANCE["started"]
    assert groups[-1]["provenance"]["peers"] == now["peers"]


def test_a_run_goes_on_where_it_stopped_and_failures_come_last(tmp_path):
    results = Results.for_run(PROVENANCE, tmp_path)
    known = {"measured": "ok", "too large": "oom", "failed": "failed", "missing": "missing"}
    for name, status in known.items():
        results.add(row(name, status))
    order = []
    names = ("measured", "failed", "too large", "new", "missing")
    jobs = [job(lambda name=name: order.append(name) or {}, name) for name in names]
    run_all(command.not_measured(jobs, results), keep(results), Clock(), lambda line: None)
    assert order == ["new", "failed", "missing"]
    assert {results.status_of(job.key) for job in jobs} == {"ok", "oom"}


def test_what_no_row_depends_on_is_imported_by_nothing_that_measures():
    """Else a change of it would leave rows of other code standing, unseen."""
    found = []
    for file in (provenance.ROOT / "bench").rglob("*.py"):
        name = str(file.relative_to(provenance.ROOT / "bench").with_suffix(""))
        reports = file.stem in provenance.REPORTING or name.startswith("quality/")
        if reports or name == "__main__":  # which starts both kinds
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                parts = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
                found += [(name, each) for each in parts if each in provenance.REPORTING]
    assert found == [("methods/__init__", "study")], "whose methods are none of METHODS"


@pytest.fixture
def only(monkeypatch) -> list:
    """One job of the suite "ops" and none of the others; how often it ran."""
    ran = []
    one = job(lambda: ran.append(1) or {"total": {"ms": 1.0}}, "only")
    for module in ("layer", "model", "output_layer", "scaling", "simulated"):
        monkeypatch.setattr(getattr(command, module), "jobs", lambda device, dtype: [])
    monkeypatch.setattr(command.ops, "jobs", lambda device, dtype: [one])
    return ran


def test_the_command_keeps_what_is_measured_unless_told_again(tmp_path, only, capsys):
    arguments = ["ops", "--device", "cpu", "--results", str(tmp_path)]
    assert [command.main(arguments), command.main(arguments)] == [0, 0] and len(only) == 1
    assert "0 jobs, about 0:00 in all; 1 measured before" in capsys.readouterr().out
    assert command.main([*arguments, "--again"]) == 0 and len(only) == 2


def test_the_time_told_is_what_the_jobs_need_and_not_what_is_left(tmp_path, only, capsys):
    """First what the job declares; then what it took on this device before, though by other code."""
    arguments = ["ops", "--device", "cpu", "--results", str(tmp_path), "--minutes", "9"]
    assert command.main(arguments) == 0
    assert "1 jobs, about 0:15 in all" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    lines[0]["provenance"]["sources"], lines[0]["seconds"] = "other code", 3700.0
    (tmp_path / "speed.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert command.main(arguments) == 0
    assert "1 jobs, about 61:40 in all" in capsys.readouterr().out


def test_time_and_jobs_left_are_told():
    lines = []
    jobs = [job(lambda: {"total": {"ms": 1.0}}, "same", tokens=tokens) for tokens in range(3)]
    run_all(jobs, lambda job, row: describe(row), Clock(1.0), lines.append)
    assert "2 to go, about 0:00" in lines[0] and "0 to go" in lines[2]


def test_a_job_of_a_kind_never_run_is_not_begun_at_the_end():
    ran, clock = [], Clock(3.0)
    first = job(lambda: ran.append("first") or {}, "first")
    long = Job("model", "long", {}, lambda: ran.append("long") or {}, 1.0, seconds=240)
    assert run_all([first, long], lambda *a: "", clock, lambda line: None) == [long]
    assert ran == ["first"]


def test_a_lost_device_ends_the_run_after_the_row_that_lost_it(monkeypatch, tmp_path, capsys):
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    results = Results.for_run(PROVENANCE, tmp_path)
    jobs = [job(lambda: 1 / 0, "a"), job(lambda: {}, "b")]
    with pytest.raises(DeviceLost, match="illegal memory access was encountered$"):
        free_memory()
    assert command._run(jobs, 0, results, torch.device("cpu"), Clock()) == 3
    assert [row["id"]["name"] for row in load(tmp_path)[0]["rows"]] == ["a"]
    assert "the device is lost: CUDA error" in capsys.readouterr().err
