"""A training script for torchrun that saves every few steps and goes on from the last checkpoint;
rank 1 kills itself.

    torchrun ... doomed_worker.py FOLDER ENGINE MOMENT   (MOMENT: backward, relocalization, save or never)

Only in its first life does it die, so that a restart can finish; rank 0 leaves the final state in
FOLDER/final.pt.
"""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from losia_kernels.checkpoint import resumable as checkpoint
from losia_kernels.layers.linear import LoSiALinear
from losia_kernels.parallel import placement as sharded
from tests.parallel import runs

SAVE_EVERY, DIES_AT, UNTIL = 3, 7, 10
MARGIN = 20  # seconds a collective waits
DEVICE = torch.device("cpu")


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, engine: str, moment: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=MARGIN))
    torch.set_num_threads(1)
    doomed = (
        moment != "never"
        and dist.get_rank() == 1
        and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    )
    run = runs.Run({"period": 4})
    model, forward, optimizer, timeline = runs.make(DEVICE, engine, run)
    whole = sorted(path for path in folder.glob("step-??") if path.is_dir())
    if whole:
        checkpoint.load_checkpoint(whole[-1], forward, optimizer)
    print(f"rank {dist.get_rank()} starts at step {timeline.step}", flush=True)
    batches = runs.batches_of(run, dist.get_rank(), dist.get_world_size(), DEVICE)
    while timeline.step < UNTIL:
        last_step = doomed and timeline.step == DIES_AT
        loss = forward(**batches[timeline.step])
        if last_step and moment == "backward":
            model.lm.model.layers[1].down_proj.subnet.register_hook(die)
        loss.backward()
        if last_step and moment == "relocalization":  # step 7 ends the second slot
            place = (
                (sharded.Ranks, "all_reduce_")
                if engine == "fsdp"
                else (LoSiALinear, "read_subnet_")
            )
            mock.patch.object(*place, die).start()
        optimizer.step()
        optimizer.zero_grad()
        if timeline.step % SAVE_EVERY == 0:
            if doomed and moment == "save" and timeline.step > DIES_AT - 2:
                mock.patch.object(dcp.FileSystemWriter, "write_data", die).start()
            checkpoint.save_checkpoint(folder / f"step-{timeline.step:02}", forward, optimizer)
    state = runs.whole_state(model), runs.whole_optimizer(model, optimizer)
    if dist.get_rank() == 0:
        torch.save(state, folder / "final.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # all is written; gloo's threads may abort a process that is torn down


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
