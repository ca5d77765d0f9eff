"""``make kernels``: the table of kernels and oracles."""

import torch

from losia_kernels.kernels import gather
from tests.kernels import table


def test_a_wrong_kernel_is_over(poison, monkeypatch, capsys):
    monkeypatch.setattr(table, "CASES", table.CASES[:1])
    monkeypatch.setattr(table, "DTYPES", [torch.float32])
    assert table.main() == 0
    right = gather.launch_gather_features
    monkeypatch.setattr(gather, "launch_gather_features", lambda x, idx: right(x, idx) + 2e-6)
    assert table.main() == 1
    monkeypatch.setattr(gather, "launch_gather_features", lambda x, idx: right(x, idx) * torch.nan)
    assert table.main() == 1
    verdicts = [
        line.split()[-2] for line in capsys.readouterr().out.splitlines() if "csrc_ref" in line
    ]
    assert verdicts == ["ok"] * 2 + ["OVER"] * 4


def test_every_launch_has_a_row():
    assert {case.op for case in table.CASES} == {
        name.removeprefix("launch_")
        for word in ("gather", "subnet_grad", "adamw", "importance", "scores", "cross_entropy")
        for name in vars(table.import_module(f"losia_kernels.kernels.{word}"))
        if name.startswith("launch_")
        and name not in ("launch_config", "launch_partials", "launch_sum")  # parts of another
    }
