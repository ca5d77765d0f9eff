"""What shards cost and which engines are refused; every function gets its device first."""

from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.profiler import ProfilerActivity, profile

from losia_kernels import LoSiAAdamW, apply_losia
from losia_kernels.parallel import ranks as distributed
from tests.parallel.runs import (
    LossOf,
    Run,
    batches_of,
    convert,
    make,
    make_optimizer,
    shard_late,
    train_sharded,
    whole_state,
)
from tests.tiny import paper


def refused(device: torch.device, engine: str) -> str:
    """What a user is told who trains in ``engine``."""
    model = LossOf(torch.float32).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    try:
        if engine == "shards first":
            fully_shard(model)
        elif engine == "tensor parallel first":
            parallelize_module(model, mesh, {"lm.model.layers.*.up_proj": ColwiseParallel()})
        model = model.to(torch.bfloat16) if engine == "split" else model
        apply_losia(
            model,
            paper(
                rank_factor=0.25,
                master="split" if engine == "split" else "float32",
            ),
        )
        if engine == "tensor parallel columns":
            parallelize_module(model, mesh, {"lm.model.layers.*.up_proj": ColwiseParallel()})
        elif engine == "tensor parallel rows":
            parallelize_module(model, mesh, {"lm.model.layers.*.down_proj": RowwiseParallel()})
        elif engine == "FSDP1":
            model = FullyShardedDataParallel(model, use_orig_params=True, device_id=device)
        elif engine == "ZeRO-3":
            model.lm.lm_head.weight.ds_id = 0  # how DeepSpeed marks what it has partitioned
        elif engine == "replicas of shards":
            both = init_device_mesh(
                device.type, (1, dist.get_world_size()), mesh_dim_names=("replicas", "shards")
            )
            fully_shard(model, mesh=both)
        elif engine == "split":
            fully_shard(model)
        options = {engine: True} if engine == "in_backward" else {}
        optimizer = LoSiAAdamW(model, **options)
        if engine == "shards last":
            fully_shard(model)
        model(**batches_of(Run(steps=1), 0, 2, device)[0]).backward()
        optimizer.step()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "trained"


# memory of shards ---------------------------------------------------------------------------------


def bfloat16(device: torch.device, offload: bool) -> tuple[list[float], dict, dict]:
    """bf16 weights and compute, float32 subnets reduced in float32: losses, final state, and each
    subnet's rounding."""
    run = Run(dtype=torch.bfloat16)
    policies = {
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    }
    if offload:
        policies["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    outcome = train_sharded(device, run, policies)
    written = {}
    for name in outcome.subnets[-1]:
        out_idx, in_idx = outcome.subnets[-1][name]
        written[name] = outcome.state[f"{name}.weight"][out_idx][:, in_idx]
    return outcome.losses, outcome.state, written


class Stack(nn.Module):
    """Blocks of two wide linears: nearly all memory is weights."""

    def __init__(self, blocks: int, narrow: int, wide: int):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(narrow, wide, bias=False), nn.ReLU(), nn.Linear(wide, narrow, bias=False)
            )
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = x + block(x)
        return x.square().mean()


def memory(device: torch.device, blocks: int, narrow: int, wide: int) -> tuple[int, list[int]]:
    """Bytes that this rank holds between two steps, and the most it allocates on top in each step
    of a cycle.

    Of four cycles the least: gloo's threads free what they have sent when they come to it, late on
    a busy machine.
    """
    torch.manual_seed(0)
    model = apply_losia(Stack(blocks, narrow, wide).to(device), paper(rank_factor=1 / 8, period=1))
    for block in model.layers:
        fully_shard(block, reshard_after_forward=True)
    fully_shard(model)
    optimizer = LoSiAAdamW(model, lr=1e-3)
    x = torch.ones(2, narrow, device=device)
    peaks = []
    for step in range(5 * blocks):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            model(x).backward()
            optimizer.step()
            optimizer.zero_grad()
        if step >= blocks:  # the first cycle makes the optimizer's state and FSDP's buffers
            peaks.append(peak_of(profiler))
    held = [value for state in optimizer.state.values() for value in state.values()]
    held += model.state_dict(keep_vars=True).values()
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in held), [
        min(peaks[place::blocks]) for place in range(blocks)
    ]


def peak_of(profiler: profile) -> int:
    """The largest sum of what was allocated and not yet freed, as the allocator reports it."""
    events = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def wire(device: torch.device, blocks: int, narrow: int, wide: int, steps: int) -> dict[str, int]:
    """Bytes that the package, not FSDP, hands to collectives in ``steps`` steps with T = 1, by the
    collective."""
    torch.manual_seed(0)
    model = apply_losia(Stack(blocks, narrow, wide).to(device), paper(rank_factor=1 / 8, period=1))
    for block in model.layers:
        fully_shard(block)
    fully_shard(model)
    optimizer = LoSiAAdamW(model, lr=1e-3)
    sent = {"reduce_scatter": 0, "all_gather": 0, "all_reduce": 0}

    def counted(kind, collective, place):
        def count(*args, **kwargs):
            sent[kind] += args[place].nbytes
            return collective(*args, **kwargs)

        return count

    with (
        mock.patch.object(
            distributed,
            "_reduce_scatter",
            counted("reduce_scatter", distributed._reduce_scatter, 1),
        ),
        mock.patch.object(
            distributed, "_all_gather", counted("all_gather", distributed._all_gather, 0)
        ),
        mock.patch.object(dist, "all_reduce", counted("all_reduce", dist.all_reduce, 0)),
    ):
        for _ in range(steps):
            model(torch.ones(2, narrow, device=device)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return sent


def skipping(device: torch.device, engine: str, drop: str | None) -> dict[str, Tensor]:
    """Train, but skip a step after each of two micro-batches, gradients dropped by "optimizer" or
    "model", or zeroed ("optimizer_zeros", "model_zeros"); None: no such step."""
    run = Run(steps=6, attached=engine == "fsdp")
    if engine == "accelerate":  # makes the optimizer first
        model = forward = convert(run, device)
        optimizer, _ = make_optimizer(run, model)
        shard_late(model, optimizer, {})
    else:
        model, forward, optimizer, _ = make(device, engine, run)
    batches = batches_of(run, dist.get_rank(), dist.get_world_size(), device)
    for step, batch in enumerate(batches):
        for spike in (batches[step - 1], batches[step - 2]) if drop else ():
            forward(**spike).backward()
        if drop:
            owner = model if drop.startswith("model") else optimizer
            owner.zero_grad(set_to_none="zeros" not in drop)
        forward(**batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole_state(model)
