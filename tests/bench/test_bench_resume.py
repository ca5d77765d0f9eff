"""Files that are whole at any moment, and runs that go on where the last one stopped."""

import pytest
import torch

from bench import __main__ as command
from bench import jobs as bench_jobs
from bench.jobs import DeviceLost, Job, run_all
from bench.store import Results, load

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


def test_rows_are_on_disk_at_once_and_measured_again_replace_the_old(tmp_path):
    results = Results.for_run(PROVENANCE, tmp_path)
    assert results.path.name == "a-cpu-of-ours-abc.json"
    for name, ms in (("a", 1), ("b", 2), ("a", 3)):
        results.add(row(name, ms=ms))
    assert [(old["id"]["name"], old["ms"]) for old in load(tmp_path)[0]["rows"]] == [
        ("b", 2),
        ("a", 3),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["a-cpu-of-ours-abc.json"]
    (tmp_path / "other.json").write_text('{"rows": 3}')
    assert len(load(tmp_path)) == 1


@pytest.mark.parametrize(
    ("changes", "kept", "name"),
    [
        ({}, True, "abc"),
        ({"commit": "def"}, True, "abc"),  # a commit that changes nothing that is measured
        (
            {"started": "2026-02-02T00:00:00", "peers": {"peft": "0.21", "galore-torch": "1.0"}},
            True,
            "abc",
        ),
        ({"sources": "2"}, False, "abc"),
        ({"sources": "2", "commit": "def"}, False, "def"),
        ({"commit": "abc-changed"}, False, "abc-changed"),
        ({"torch": "2.11.0"}, False, "abc-2"),
        ({"threads": 1}, False, "abc-2"),
        ({"peers": {"peft": "0.22", "galore-torch": None}}, False, "abc-2"),
        ({"device": "Another"}, False, "another"),
    ],
)
def test_rows_are_kept_while_code_and_environment_are_the_same(tmp_path, changes, kept, name):
    Results.for_run(PROVENANCE, tmp_path).add(row("a"))
    results = Results.for_run({**PROVENANCE, **changes}, tmp_path)
    assert (len(results.rows) == 1) == kept and name in results.path.name
    results.add(row("b"))
    files = load(tmp_path)
    replaced = name == "abc" and not kept
    assert len(files) == (1 if kept or replaced else 2)
    assert all(file["provenance"]["started"] == PROVENANCE["started"] for file in files)


def test_a_run_goes_on_where_it_stopped_and_failures_come_last(tmp_path):
    results = Results.for_run(PROVENANCE, tmp_path)
    for name, status in (
        ("measured", "ok"),
        ("too large", "oom"),
        ("failed", "failed"),
        ("missing", "missing"),
    ):
        results.add(row(name, status))
    order = []
    names = ("measured", "failed", "too large", "new", "missing")
    jobs = [job(lambda name=name: order.append(name) or {}, name) for name in names]
    run_all(command.not_measured(jobs, results), results.add, None, say=lambda line: None)
    assert order == ["new", "failed", "missing"]
    assert {results.status_of(job.key) for job in jobs} == {"ok", "oom"}


def test_the_command_keeps_what_is_measured_unless_told_again(tmp_path, monkeypatch, capsys):
    ran = []
    one = job(lambda: ran.append(1) or {"total": {"ms": 1.0}}, "only")
    for module in (
        command.layer,
        command.model,
        command.output_layer,
        command.scaling,
        command.memory,
    ):
        monkeypatch.setattr(module, "jobs", lambda device, dtype: [])
    monkeypatch.setattr(command.ops, "jobs", lambda device, dtype: [one])
    arguments = ["ops", "--device", "cpu", "--results", str(tmp_path)]
    assert [command.main(arguments), command.main(arguments)] == [0, 0] and len(ran) == 1
    assert "0 jobs, 1 measured before" in capsys.readouterr().out
    assert command.main([*arguments, "--again"]) == 0 and len(ran) == 2


def test_time_and_jobs_left_are_told():
    lines = []
    jobs = [job(lambda: {"total": {"ms": 1.0}}, "same", tokens=tokens) for tokens in range(3)]
    run_all(jobs, lambda row: None, 1.0, lines.append)
    assert "2 to go, about 0:00" in lines[0] and "0 to go" in lines[2]


def test_a_job_of_a_kind_never_run_is_not_begun_at_the_end():
    ran = []
    first = job(lambda: ran.append("first") or {}, "first")
    long = Job("context", "long", {}, lambda: ran.append("long") or {}, 1.0)
    assert run_all([first, long], lambda row: None, 3.0, lambda line: None) == [long] and ran == [
        "first"
    ]


def test_a_lost_device_ends_the_run_after_the_row_that_lost_it(monkeypatch, tmp_path, capsys):
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    rows = []
    with pytest.raises(DeviceLost, match="illegal memory access was encountered$"):
        run_all(
            [job(lambda: 1 / 0, "a"), job(lambda: {}, "b")],
            rows.append,
            None,
            say=lambda line: None,
        )
    assert [row["id"]["name"] for row in rows] == ["a"]
    monkeypatch.setattr(command, "run_all", lambda *a: bench_jobs.free_memory())
    results = Results.for_run(PROVENANCE, tmp_path)
    assert command._run([], 0, results, torch.device("cpu"), None) == 3
    assert "the device is lost: CUDA error" in capsys.readouterr().err
