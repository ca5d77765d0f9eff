"""A loop of one's own under FSDP2: shard, train, save, resume; any number of ranks, GPUs or not.

torchrun --standalone --nproc-per-node=2 examples/distributed/train_fsdp2.py RUN_FOLDER
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from losia_kernels import LoSiAAdamW, LoSiAConfig, apply_losia
from losia_kernels.checkpoint import full_state_dict, load_checkpoint, save_checkpoint

STEPS, SAVE_EVERY, WIDTH = 40, 10, 64


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.layers:
            x = x + block(x)
        return x


def main(folder: Path) -> None:
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)

    torch.manual_seed(0)  # every rank makes the same model
    model = Model().to(device)
    apply_losia(model, LoSiAConfig(period=5))  # while the weights are whole
    for block in model.layers:
        fully_shard(block)
    fully_shard(model)
    optimizer = LoSiAAdamW(model, lr=1e-3, total_steps=STEPS)

    checkpoints = sorted(folder.glob("step-*"))
    if checkpoints:
        load_checkpoint(checkpoints[-1], model, optimizer)
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(32, WIDTH, generator=generator) for _ in range(STEPS)]
    for step in range(optimizer.timeline.step, STEPS):
        x = data[step].chunk(ranks)[rank].to(device)
        loss = (model(x) - x.flip(-1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % SAVE_EVERY == 0:
            save_checkpoint(folder / f"step-{step + 1:06}", model, optimizer)
            if rank == 0:
                print(
                    f"step {step + 1}: loss {loss.item():.4f}, observing {optimizer.timeline.observing}",
                    flush=True,
                )
    weights = full_state_dict(model)
    if rank == 0:
        torch.save(weights, folder / "model.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
