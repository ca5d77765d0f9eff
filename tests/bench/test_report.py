"""Tables are pure functions of the rows: what is committed can be made again, byte by byte."""

import json
import re
import shutil
import sys

import pytest

from bench.__main__ import main
from bench.harness.provenance import ROOT
from bench.quality import report as quality_report
from bench.quality.store import Store
from bench.speed import plots, report, tables
from bench.speed.results import RESULTS, load
from bench.speed.slopes import localization_share

GPU = {"device": "NVIDIA Test", "kind": "GPU", "torch": "2.11.0", "triton": "3.6.0"}
GPU |= {"peers": {"peft": "0.18.0", "galore-torch": None}, "commit": "abc", "driver": "580"}
GPU |= {"started": "2026-01-02T00:00:00+00:00", "clocks": "1980 MHz", "threads": 8}
CPU = {**GPU, "device": "Test CPU", "kind": "CPU", "driver": None, "clocks": None}


def key(suite: str, name: str, **more) -> dict:
    return {"id": {"suite": suite, "name": name, "model": "llama-2-7b", **more}}


def timing(ms: float) -> dict:
    return {"ms": ms, "low": ms, "high": ms, "repeats": 5}


def layer_row(name: str, ms: float, **more) -> dict:
    size = {"stack": "block", "batch": 4, "context": 2048, "dtype": "bfloat16"}
    phases = {"total": ms, "forward": ms / 3, "backward": ms / 2, "update": ms / 6}
    held = {"saved_bytes": 2**30, "peak_bytes": 2**31, "trained": 3_000_000, "floor_ms": 10.0}
    timed = {phase: timing(value) for phase, value in phases.items()}
    return {**key("layer", name, **size), "status": "ok", **timed, **held, **more}


def model_row(name, us: float, peak: float, checkpointing=True, batch=4, **fields) -> dict:
    size = {"batch": batch, "context": 2048, "checkpointing": checkpointing, "dtype": "bfloat16"}
    phases = {"forward": us / 4, "backward": us / 2, "other": us / 4, "total": us}
    total = {"ms": 10 * us, "low": 9 * us, "high": 12 * us, "repeats": 5}
    held = {"peak_bytes": int(peak * 1e9), "predicted_bytes": int(peak * 1.01e9)}
    row = {**key("model", name, **size, **fields), "status": "ok", "us_per_token": phases}
    return {**row, **held, "trained": 117_571_584, "total": total}


ROWS = [
    layer_row("losia-pro", 12.0),
    layer_row("losia-pro-off", 10.4),
    layer_row("lora", 13.0),
    model_row("losia-pro", 50.0, 20.0, rank_factor=0.125, output_dim_factor=0.0),
    model_row("losia-pro", 40.0, 60.0, False, rank_factor=0.125, output_dim_factor=0.0),
    model_row("losia-pro", 51.0, 21.5, rank_factor=0.0625, output_dim_factor=0.125),
    model_row("lora-fp32", 90.0, 23.0, rank=64),
]
OOM = {**ROWS[-1]["id"], "checkpointing": False}
ROWS += [{"id": OOM, "status": "oom", "bytes_asked_for": 1_500_000_000}]
NO_PEER = {"status": "missing", "reason": "galore_torch cannot be imported"}
ROWS += [{**key("layer", "galore", stack="block"), **NO_PEER}]
RED = {"status": "red", "reason": "ours: error 1, allowed 0.1"}
ROWS += [{**key("ops", "subnet_grad", linear="up_proj", p=0.125), **RED}]
GROUP = {"provenance": GPU, "rows": ROWS}


def test_ratios_are_to_the_floor_of_the_same_job_and_layers_are_averaged():
    lines = tables.layer(ROWS).splitlines()
    figures = "1.200 | 12 (12-12) | 10 | 4 | 6 | 2 | 1024 | 2048 | 3.0"
    own = lines.index(f"| LoSiA-Pro (ours), in its slot | {figures} |")
    mean = f"| LoSiA-Pro (ours), mean of 32 layers | {(31 * 1.04 + 1.2) / 32:.3f} |"
    assert lines[own - 1].startswith(mean)
    assert lines[own + 1].startswith("| LoSiA-Pro (ours), outside its slot | 1.040 |")
    assert any(line.startswith("| GaLore | not run |") for line in lines)


def test_the_ratio_is_that_of_steps_beside_each_other_where_it_was_kept():
    row = layer_row("lora", 13.0, over_floor={"median": 1.25, "low": 1.2, "high": 1.5})
    assert "| PEFT LoRA | 1.250 | 13 (13-13) | 10 |" in tables.layer([row])


def test_the_svds_are_spread_over_the_steps_between_them():
    svd = {**key("layer", "galore-svd"), "status": "ok", "total": timing(400)}
    rows = [layer_row("galore", 20.0), model_row("galore", 50.0, 30.0), svd]
    assert "| GaLore, with its SVD | 2.200 | 22 | 10 |" in tables.layer(rows)
    other, total = (value + 2 * 32 * 1e3 / 8192 for value in (12.5, 50.0))
    cells = f"|  |  | {other:.4g} | {total:.4g} |  |  |  | 70.1 / 227.5 / 437.7 |"
    assert f"| GaLore, with its SVD {cells}" in tables.model(rows)
    assert "SVD" not in tables.model(rows[:2])


def test_the_papers_column_stands_beside_ours():
    text = tables.model(ROWS)
    ours = "12.5 | 25 | 12.5 | 50 (45-60) | 20.00 | 20.20 | 117.6 | 71.4 / 173.4 / 244.8"
    assert f"| LoSiA-Pro (ours) | {ours} |" in text
    theirs = f"out of memory (1.50 GB asked for) |{'  |' * 6} out of memory"
    assert f"| PEFT LoRA, float32 adapters | {theirs} |" in text
    assert "| LoSiA-Pro, p 1/16, p_o 1/8 | 117.6 | 21.50 | 21.71 | 21.84 |" in tables.table14(ROWS)


@pytest.mark.parametrize("kind", ["GPU", "CPU"])
def test_kernels_have_a_roof_and_a_verdict_on_a_gpu_alone(kind):
    entry = {"status": "ok", "gbs": 10.0, "tflops": 0, "share_of_roof": 2.08}
    forms = {"ours": {**entry, "ms": 1.0}, "eager": {**entry, "ms": 3.0}}
    row = {**key("ops", "x", linear="up_proj"), "status": "ok", "forms": forms, "kind": kind}
    runs = {**row, **key("variants", "backward", linear="up_proj", p=0.125, alignment=16)}
    text = tables.ops([row, runs])
    assert "| backward | llama-2-7b up_proj, p 1/8, runs of 16 | eager | 3 |" in text
    for gpu_only in ("share of the roof", "2.08", "faster", "3.00 x"):
        assert (gpu_only in text) == (kind == "GPU")
    assert "| 3 | 10 |" in text and ("ours is eager torch" in text) == (kind == "CPU")


def test_every_row_without_a_figure_is_told():
    text = tables.trouble(ROWS)
    reasons = "red: ours: error 1", "oom: 1500000000 bytes", "galore_torch cannot be imported"
    assert len(text.splitlines()) == 3 and all(reason in text for reason in reasons)
    assert "wrong result" in tables.ops(ROWS)


def test_where_figures_come_from_is_under_every_table():
    page = "a\n<!-- bench:{0} -->\nold\n<!-- /bench:{0} -->\nb"
    filled = report.fill_page(page.format("layer"), [GROUP])
    end = "<!-- /bench:layer -->\nb"
    assert "old" not in filled and filled.startswith("a\n") and filled.endswith(end)
    versions = "torch 2.11.0, triton 3.6.0, peft 0.18.0, driver 580, clocks 1980 MHz"
    assert f"GPU: NVIDIA Test; {versions}; commit abc; 2026-01-02" in filled
    assert report.fill_page(filled, [GROUP]) == filled
    assert "not measured yet" in report.fill_page(page.format("scaling"), [GROUP])
    with pytest.raises(ValueError, match="no table 'layers'; the tables are layer, model"):
        report.fill_page(page.format("layers"), [GROUP])


def test_a_gpu_goes_before_a_cpu_and_new_before_old():
    old = {"provenance": {**GPU, "started": "2025"}, "rows": ROWS}
    cpu = {"provenance": CPU, "rows": ROWS}
    assert report.by_device([cpu, old, GROUP]) == [[GROUP, old], [cpu]]
    without = {"provenance": {**GPU, "commit": "new", "started": "2027"}, "rows": ROWS[3:7]}
    assert "commit abc" in report.newest_table("layer", [without, GROUP])
    assert "commit new" in report.newest_table("model", [without, GROUP])


@pytest.fixture
def copied(tmp_path):
    """The committed results and the READMEs, without plots and RESULTS.md."""
    (tmp_path / "bench").mkdir()
    for name in ("README.md", "bench/README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    kept = shutil.ignore_patterns("*.svg")
    shutil.copytree(RESULTS, tmp_path / "bench" / "results", ignore=kept)
    return tmp_path


def test_the_committed_report_is_what_its_rows_make(copied):
    pytest.importorskip("matplotlib")
    said = report.write_reports(copied / "bench" / "results", copied)
    for name in ("README.md", "bench/README.md", "bench/RESULTS.md"):
        same = (copied / name).read_bytes() == (ROOT / name).read_bytes()
        assert same, f"{name}: run python -m bench report"
    assert said == (ROOT / "bench" / "RESULTS.md").read_text()


def test_the_committed_report_of_the_study_is_what_its_rows_make(monkeypatch):
    """All but the plots, which take most of the time: those that the page shows are there."""
    store = Store()
    page = (store.folder.parent / "README.md").read_text()
    shown = [store.folder.parent / name for name in re.findall(r"\]\((results/plots/.*?)\)", page)]
    assert len(shown) > 10 and all(picture.exists() for picture in shown)
    monkeypatch.setattr(quality_report, "draw_plots", lambda *arguments: shown)
    assert quality_report.render(store) == page, "run python -m bench quality-report"


def test_plots_are_drawn_and_come_out_the_same(tmp_path):
    pytest.importorskip("matplotlib")
    sweep = [
        {**key("scaling", "tokens", tokens=t), "status": "ok", "total": timing(t / 100 + 1)}
        for t in (1024, 2048, 4096)
    ]
    group = {**GROUP, "rows": ROWS + sweep}
    first, again = (
        {path.name: path.read_bytes() for path in plots.draw_plots([group], tmp_path / name)}
        for name in "ab"
    )
    names = {f"nvidia-test-{name}.svg" for name in ("latency", "memory", "scaling")}
    assert first == again and set(first) == names
    assert "10 ms per 1000 tokens" in tables.scaling(sweep)


def test_localization_counts_the_slot_and_the_move():
    steps = {"resting": 10.0, "observing": 14.0, "moving": 64.0}
    row = {**key("scaling", "relocalization"), "status": "ok", "layers": 32}
    row |= {"relocalization_ms": 50.0, **{n: {"total": timing(ms)} for n, ms in steps.items()}}
    assert localization_share(row, 50) == pytest.approx(5 / (320 + 5))
    assert "T 50: 1.54 %" in tables.scaling([row])


def test_committed_results_name_no_machine_and_no_figure_of_a_red_gate():
    import platform

    for group in load():
        assert platform.node() not in json.dumps(group["provenance"])
        for row in group["rows"]:
            assert row["status"] == "ok" or "total" not in row


def test_tables_are_written_without_matplotlib(copied, monkeypatch, capsys):
    shutil.copytree(RESULTS / "plots", copied / "bench/results/plots", dirs_exist_ok=True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.write_reports(copied / "bench" / "results", copied)
    assert "no new plots" in capsys.readouterr().out
    written, committed = (root / "bench" / "RESULTS.md" for root in (copied, ROOT))
    assert written.read_bytes() == committed.read_bytes()


def test_a_folder_without_results_wipes_nothing(tmp_path, capsys):
    before = (ROOT / "README.md").read_bytes()
    assert main(["report", "--results", str(tmp_path / "nothing")]) == 2
    assert "holds no results" in capsys.readouterr().err
    assert (ROOT / "README.md").read_bytes() == before
