"""A rank that is killed ends the job, and torchrun's restart finishes it as if nothing had
happened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.parallel import runs
from tests.parallel.doomed_worker import DIES_AT, UNTIL
from tests.parallel.rank_pool import TIMEOUT, RemoteError
from tests.parallel.test_ddp import assert_same_bits

HERE = Path(__file__).parent


def torchrun(folder: Path, engine: str, moment: str, restarts: int) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            f"--max-restarts={restarts}",
            str(HERE / "doomed_worker.py"),
            str(folder),
            engine,
            moment,
        ],
        env=os.environ
        # else a restart finds its first life's addresses
        | {
            "PYTHONPATH": str(HERE.parents[1]),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        },
        capture_output=True,
        text=True,
        timeout=150,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine, moment, resumed",
    [
        ("ddp", "backward", 6),
        ("ddp", "save", 3),
        ("fsdp", "relocalization", 6),
    ],
)
def test_a_killed_rank_and_a_restart(two, tmp_path, engine, moment, resumed):
    done = torchrun(tmp_path, engine, moment, restarts=1)
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr  # SIGKILL, and only that: the second life ends well
    assert done.stdout.count("starts at step 0") == 2
    assert done.stdout.count(f"starts at step {resumed}") == 2
    assert not list(tmp_path.glob("*.tmp"))
    straight = two.run(runs.straight, engine, runs.Run({"period": 4}), UNTIL)
    for state, expected in zip(torch.load(tmp_path / "final.pt"), straight[0], strict=True):
        assert_same_bits(state, expected)
    assert resumed < DIES_AT < UNTIL


def test_without_restarts_the_job_fails_and_leaves_whole_checkpoints(tmp_path):
    done = torchrun(tmp_path, "fsdp", "save", restarts=0)
    assert done.returncode == 1
    assert [path.name for path in tmp_path.iterdir() if path.name[0] != "."] == ["step-03"]


def killed(device: torch.device, engine: str) -> float:
    """Rank 1 kills itself in its third step; returns after how many seconds the others are told."""
    model, forward, optimizer, timeline = runs.make(device, engine, runs.Run())
    runs.advance(runs.Run(), device, forward, optimizer, timeline, 2)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        runs.advance(runs.Run(), device, forward, optimizer, timeline, 3)
    except RuntimeError:
        return time.monotonic() - started
    raise AssertionError("a step without rank 1")


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_the_others_are_told_within_the_timeout(two, engine):
    started = time.monotonic()
    with pytest.raises(RemoteError, match="rank 1: the process is gone") as raised:
        two.run(killed, engine)
    assert "rank 0" not in str(raised.value)
    assert time.monotonic() - started < 3 * TIMEOUT
