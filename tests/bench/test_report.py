"""Tables are pure functions of the JSON: what is committed can be made again, byte by byte."""

import json
import shutil
import sys

import pytest

from bench import report, tables
from bench.__main__ import main
from bench.provenance import ROOT
from bench.slopes import localization_share
from bench.store import RESULTS, load

GPU = {
    "device": "NVIDIA Test",
    "kind": "GPU",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "peers": {"peft": "0.18.0", "losia": None},
    "commit": "abc",
    "started": "2026-01-02T00:00:00+00:00",
    "driver": "580",
    "clocks": "1980 MHz",
    "threads": 8,
}
CPU = {**GPU, "device": "Test CPU", "kind": "CPU", "driver": None, "clocks": None}


def timing(ms: float) -> dict:
    return {"ms": ms, "low": ms, "high": ms, "repeats": 5}


def layer_row(name: str, ms: float, **more) -> dict:
    return {
        "id": {
            "suite": "layer",
            "name": name,
            "model": "llama-2-7b",
            "stack": "block",
            "batch": 4,
            "context": 2048,
            "dtype": "bfloat16",
        },
        "status": "ok",
        "total": timing(ms),
        "forward": timing(ms / 3),
        "backward": timing(ms / 2),
        "update": timing(ms / 6),
        "floor_ms": 10.0,
        "saved_bytes": 2**30,
        "peak_bytes": 2**31,
        "trained": 3_000_000,
        **more,
    }


def model_row(
    name: str, us: float, peak: float, checkpointing: bool = True, batch: int = 4, **fields
) -> dict:
    return {
        "id": {
            "suite": "model",
            "name": name,
            "model": "llama-2-7b",
            "batch": batch,
            "context": 2048,
            "checkpointing": checkpointing,
            "dtype": "bfloat16",
            **fields,
        },
        "status": "ok",
        "us_per_token": {"forward": us / 4, "backward": us / 2, "other": us / 4, "total": us},
        "peak_bytes": int(peak * 1e9),
        "predicted_bytes": int(peak * 1.01e9),
        "trained": 117_571_584,
        "total": {"ms": 10 * us, "low": 9 * us, "high": 12 * us, "repeats": 5},
    }


ROWS = [
    layer_row("losia-pro", 12.0),
    layer_row("losia-pro-off", 10.4),
    layer_row("lora", 13.0),
    model_row("losia-pro", 50.0, 20.0, rank_factor=0.125, output_dim_factor=0.0),
    model_row(
        "losia-pro", 40.0, 60.0, checkpointing=False, rank_factor=0.125, output_dim_factor=0.0
    ),
    model_row("losia-pro", 51.0, 21.5, rank_factor=0.0625, output_dim_factor=0.125),
    model_row("lora-fp32", 90.0, 23.0, rank=64),
    {
        "id": {**model_row("lora-fp32", 1, 1)["id"], "checkpointing": False, "rank": 64},
        "status": "oom",
        "bytes_asked_for": 1_500_000_000,
    },
    {
        "id": {
            "suite": "layer",
            "name": "losia-reference",
            "model": "llama-2-7b",
            "stack": "block",
        },
        "status": "missing",
        "reason": "losia cannot be imported",
    },
    {
        "id": {
            "suite": "ops",
            "name": "subnet_grad",
            "model": "llama-2-7b",
            "linear": "up_proj",
            "p": 0.125,
        },
        "status": "red",
        "reason": "ours: error 1, allowed 0.1",
    },
]
FILE = {"provenance": GPU, "rows": ROWS}


def test_ratios_are_to_the_floor_of_the_same_job_and_layers_are_averaged():
    lines = tables.layer(ROWS).splitlines()
    own = lines.index(
        "| LoSiA-Pro (ours), in its slot | 1.200 | 12 (12-12) | 4 | 6 | 2 | 1024 | 2048 | 3.0 |"
    )
    assert lines[own - 1].startswith(
        f"| LoSiA-Pro (ours), mean of 32 layers | {(31 * 1.04 + 1.2) / 32:.3f} |"
    )
    assert lines[own + 1].startswith("| LoSiA-Pro (ours), outside its slot | 1.040 |")
    assert any(
        line.startswith("| losia 0.1.5 (the authors'), in its slot | not run |") for line in lines
    )


def test_the_svds_are_spread_over_the_steps_between_them():
    svd = {
        "id": {"suite": "layer", "name": "galore-svd", "model": "llama-2-7b"},
        "status": "ok",
        "total": timing(400),
    }
    rows = [layer_row("galore", 20.0), model_row("galore", 50.0, 30.0), svd]
    assert "| GaLore, with its SVD | 2.200 | 22 |" in tables.layer(rows)
    other, total = (value + 2 * 32 * 1e3 / 8192 for value in (12.5, 50.0))
    cells = f"|  |  | {other:.4g} | {total:.4g} |  |  |  | 70.1 / 227.5 / 437.7 |"
    assert f"| GaLore, with its SVD {cells}" in tables.model(rows)
    assert "SVD" not in tables.model(rows[:2])


def test_the_papers_column_stands_beside_ours():
    text = tables.model(ROWS)
    paper = "71.4 / 173.4 / 244.8"
    assert (
        f"| LoSiA-Pro (ours) | 12.5 | 25 | 12.5 | 50 (45-60) | 20.00 | 20.20 | 117.6 | {paper} |"
        in text
    )
    assert (
        f"| PEFT LoRA, float32 adapters | out of memory (1.50 GB asked for) |{'  |' * 6} out of memory |"
        in text
    )
    assert "| LoSiA-Pro, p 1/16, p_o 1/8 | 117.6 | 21.50 | 21.71 | 21.84 |" in tables.table14(ROWS)


def test_the_fastest_within_a_card_is_what_was_measured_to_fit():
    text = tables.budget(ROWS)
    assert (
        "| LoSiA-Pro (ours) | 20000 (4 x 2048, checkpointed) | 20000 (4 x 2048, checkpointed) | 25000"
        in text
    )


def test_every_row_without_a_figure_is_told():
    text = tables.trouble(ROWS)
    assert len(text.splitlines()) == 3
    assert (
        "red: ours: error 1" in text
        and "oom: 1500000000 bytes" in text
        and "losia cannot be imported" in text
    )
    assert "wrong result" in tables.ops(ROWS)


def test_where_figures_come_from_is_under_every_table():
    filled = report.fill_markers("a\n<!-- bench:layer -->\nold\n<!-- /bench:layer -->\nb", [FILE])
    assert (
        "old" not in filled
        and filled.startswith("a\n")
        and filled.endswith("<!-- /bench:layer -->\nb")
    )
    versions = "torch 2.11.0, triton 3.6.0, peft 0.18.0, driver 580, clocks 1980 MHz"
    assert f"GPU: NVIDIA Test; {versions}; commit abc; 2026-01-02" in filled
    assert report.fill_markers(filled, [FILE]) == filled
    assert "not measured yet" in report.fill_markers(
        "<!-- bench:scaling -->\n<!-- /bench:scaling -->", [FILE]
    )
    with pytest.raises(ValueError, match="no table 'layers'; the tables are layer, model"):
        report.fill_markers("<!-- bench:layers -->\n<!-- /bench:layers -->", [FILE])


def test_a_gpu_goes_before_a_cpu_and_new_before_old():
    old, cpu = (
        {"provenance": {**GPU, "started": "2025"}, "rows": ROWS},
        {"provenance": CPU, "rows": ROWS},
    )
    assert report.by_device([cpu, old, FILE]) == [[FILE, old], [cpu]]
    without = {"provenance": {**GPU, "commit": "new", "started": "2027"}, "rows": ROWS[3:7]}
    assert "commit abc" in report.newest_table("layer", [without, FILE])
    assert "commit new" in report.newest_table("model", [without, FILE])


def test_the_committed_report_is_what_its_json_makes(tmp_path):
    """RESULTS.md, plots and the README's tables, from the committed files into an empty folder."""
    (tmp_path / "bench").mkdir()
    for name in ("README.md", "bench/README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(
        RESULTS, tmp_path / "bench" / "results", ignore=shutil.ignore_patterns("*.svg", "*.partial")
    )
    report.write_reports(tmp_path / "bench" / "results", tmp_path)
    for name in ("README.md", "bench/README.md", "bench/RESULTS.md"):
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes(), (
            f"{name}: run python -m bench report"
        )


def test_plots_are_drawn_and_come_out_the_same(tmp_path):
    pytest.importorskip("matplotlib")
    sweep = [
        {
            "id": {"suite": "scaling", "name": "tokens", "tokens": t},
            "status": "ok",
            "total": timing(t / 100 + 1),
        }
        for t in (1024, 2048, 4096)
    ]
    file = {**FILE, "rows": ROWS + sweep}
    first = {path.name: path.read_bytes() for path in report.draw_plots([file], tmp_path / "a")}
    again = {path.name: path.read_bytes() for path in report.draw_plots([file], tmp_path / "b")}
    assert first == again and set(first) == {
        f"nvidia-test-{name}.svg" for name in ("latency", "memory", "scaling")
    }
    assert "10 ms per 1000 tokens" in tables.scaling(sweep)


def test_localization_counts_the_slot_and_the_move():
    row = {
        "id": {"suite": "scaling", "name": "relocalization"},
        "status": "ok",
        "layers": 32,
        "relocalization_ms": 50.0,
        "resting": {"total": timing(10.0)},
        "observing": {"total": timing(14.0)},
        "moving": {"total": timing(64.0)},
    }
    assert localization_share(row, 50) == pytest.approx(5 / (320 + 5))
    assert "T 50: 1.54 %" in tables.scaling([row])


def test_committed_results_name_no_machine_and_no_figure_of_a_red_gate():
    import platform

    for file in load():
        assert platform.node() not in json.dumps(file["provenance"])
        for row in file["rows"]:
            assert row["status"] == "ok" or "total" not in row


def test_tables_are_written_without_matplotlib(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    shutil.copytree(
        RESULTS, tmp_path / "bench" / "results", ignore=shutil.ignore_patterns("*.partial")
    )
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.write_reports(tmp_path / "bench" / "results", tmp_path)
    assert "no new plots" in capsys.readouterr().out
    assert (tmp_path / "bench" / "RESULTS.md").read_bytes() == (
        ROOT / "bench" / "RESULTS.md"
    ).read_bytes()


def test_a_folder_without_results_wipes_nothing(tmp_path, capsys):
    before = (ROOT / "README.md").read_bytes()
    with pytest.raises(ValueError, match="holds no results"):
        report.write_reports(tmp_path / "nothing", ROOT)
    assert main(["report", "--results", str(tmp_path / "nothing")]) == 2
    assert (
        "holds no results" in capsys.readouterr().err
        and (ROOT / "README.md").read_bytes() == before
    )
