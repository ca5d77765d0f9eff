"""Real processes for the tests: started once, joined in one process group, and handed one function
after another."""

import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = 20  # seconds a collective waits for the other ranks


class RemoteError(AssertionError):
    """A function failed on some ranks; the message holds their tracebacks."""


class RankPool:
    """``size`` processes over ``backend``; ``run(function, *args)`` calls it on each and returns
    their results.

    The function must be importable and gets ``device`` as its first argument. After a failure the
    processes are started anew: ranks that have not failed may still wait for one that has.
    """

    def __init__(self, size: int, backend: str = "gloo"):
        self.size, self.backend = size, backend
        self._processes: list[mp.Process] = []

    def run(self, function: Callable, *args) -> list:
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            try:
                good, value = pipe.recv() if pipe.poll(3 * TIMEOUT) else (False, "no answer")
            except EOFError:
                good, value = False, "the process is gone"
            (results if good else failures).append(value if good else f"rank {rank}: {value}")
        if failures:
            self.close()
            raise RemoteError("\n".join(failures))
        return results

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        # imported once for all ranks
        context.set_forkserver_preload(["torch.distributed.fsdp", "losia_kernels"])
        meeting = tempfile.mktemp()
        self._pipes = []
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, self.size, self.backend, meeting), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []


def _serve(pipe, rank: int, size: int, backend: str, meeting: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT),
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(device, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
