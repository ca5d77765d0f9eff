"""What the ranks of the tests run: small models, trained for three cycles; every function gets its
device first."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from losia_kernels import LoSiAAdamW, apply_losia, attach, calibrate
from losia_kernels.checkpoint.resumable import full_state_dict, load_checkpoint, save_checkpoint
from losia_kernels.parallel.ranks import Ranks
from tests.tiny import HIDDEN, make_batches, paper, places, tiny_lm

BLOCKS, PERIOD = 3, 2
CYCLE = BLOCKS * PERIOD


class LossOf(nn.Module):
    """The tiny model with the loss as its output, as DDP and FSDP want to see it."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0, **options):
        super().__init__()
        self.lm = tiny_lm(seed, blocks=BLOCKS, **options).to(dtype)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return self.lm(input_ids, labels).loss


@dataclass(frozen=True)
class Run:
    """One training run, the same however many ranks share its batches."""

    config: dict = field(default_factory=dict)
    steps: int = 3 * CYCLE
    accumulation: int = 1
    attached: bool = False
    calibrated: bool = False
    ddp: dict = field(default_factory=dict)
    no_sync: bool = False
    dtype: torch.dtype = torch.float64
    same_data: bool = False
    optimizer: dict = field(default_factory=dict)  # options of LoSiAAdamW


@dataclass
class Outcome:
    """Subnets after each step, the final state dict, and bytes that this rank has put into
    collectives by kind."""

    subnets: list[dict[str, tuple[list[int], list[int]]]]
    state: dict[str, Tensor]
    sent: dict[str, int]
    losses: list[float]


def convert(run: Run, device: torch.device) -> LossOf:
    model = LossOf(run.dtype).to(device)
    config = paper(**{"rank_factor": 0.25, "period": PERIOD, **run.config})
    return apply_losia(
        model, config, output_layer="lm.lm_head" if config.output_dim_factor else None
    )


def batches_of(run: Run, rank: int, size: int, device) -> list[dict[str, Tensor]]:
    """Each global batch has 12 sequences: this rank's share of them."""
    batches = []
    for four in zip(*[iter(make_batches(4 * run.steps * run.accumulation))] * 4, strict=True):
        whole = {key: torch.cat([batch[key] for batch in four]).to(device) for key in four[0]}
        share = (
            whole
            if run.same_data
            else {key: value.chunk(size)[rank] for key, value in whole.items()}
        )
        batches.append(share)
    return batches


def make_optimizer(run: Run, model: nn.Module):
    if run.attached:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        return optimizer, attach(optimizer, model)
    optimizer = LoSiAAdamW(model, lr=1e-2, **run.optimizer)
    return optimizer, optimizer.timeline


def train(device: torch.device, run: Run) -> Outcome:
    """``run`` on this rank, in DDP if there are several; one process sees the whole batch."""
    several = dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    batches = batches_of(run, rank, size, device)
    model = convert(run, device)
    wrapped = DistributedDataParallel(model, **run.ddp) if several else model
    sent = {"subnets": 0, "importance": 0}
    if several:
        wrapped.register_comm_hook(sent, count_bucket)
    if run.calibrated:
        calibrate(wrapped, batches, steps=2, loss_fn=lambda model, batch: model(**batch))
    sent["subnets"] = 0
    optimizer, timeline = make_optimizer(run, wrapped)
    timeline.loss_divisor = run.accumulation
    subnets, losses = [], []
    with counted_all_reduce(sent):
        for step in range(run.steps):
            for i in range(run.accumulation):
                last = i == run.accumulation - 1
                with wrapped.no_sync() if several and run.no_sync and not last else nullcontext():
                    loss = wrapped(**batches[step * run.accumulation + i])
                    (loss / run.accumulation).backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            subnets.append(places(model))
    return Outcome(
        subnets, {key: value.cpu() for key, value in model.state_dict().items()}, sent, losses
    )


def count_bucket(sent: dict[str, int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's own reduction, counted."""
    sent["subnets"] += bucket.buffer().nbytes
    buffer = bucket.buffer().div_(dist.get_world_size())
    return dist.all_reduce(buffer, async_op=True).get_future().then(lambda done: done.value()[0])


def counted_all_reduce(sent: dict[str, int]):
    """Every ``dist.all_reduce`` of the package, counted; DDP's own is none of Python's."""
    reduce = dist.all_reduce

    def counting(tensor, *args, **kwargs):
        if not kwargs.get("async_op"):
            sent["importance"] += tensor.nbytes
        return reduce(tensor, *args, **kwargs)

    return mock.patch.object(dist, "all_reduce", counting)


# loops that DDP makes harder ----------------------------------------------------------------------


def two_forwards(device: torch.device, ddp: dict) -> dict[str, Tensor]:
    """Two forwards before one backward, as preference losses do."""
    model = convert(Run(), device)
    wrapped = DistributedDataParallel(model, **ddp)
    optimizer = LoSiAAdamW(wrapped, lr=1e-2)
    first, second = batches_of(Run(steps=2), dist.get_rank(), dist.get_world_size(), device)
    for _ in range(PERIOD + 1):
        (wrapped(**first) + wrapped(**second)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {key: value.cpu() for key, value in model.state_dict().items()}


def uneven(device: torch.device) -> tuple[dict, dict]:
    """Rank 1 runs out of data and repeats a batch with weight 0, while rank 0's counts twice; and a
    run on rank 0's."""
    rank = dist.get_rank()
    alone = dist.new_group([0]), dist.new_group([1])
    states = []
    for several in (True, False):
        model = convert(Run(), device)
        forward = DistributedDataParallel(model) if several else model
        optimizer = LoSiAAdamW(forward, lr=1e-2, process_group=None if several else alone[rank])
        for batch in batches_of(Run(steps=2 * PERIOD), 0, 2, device):
            weight = 2.0 * (rank == 0) if several else 1.0
            (forward(**batch) * weight).backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append({key: value.cpu() for key, value in model.state_dict().items()})
    return tuple(states)


class Experts(nn.Module):
    """Two projections, of which ``pick`` is used."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, 12, bias=False) for _ in "ab")
        self.pick = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[self.pick](x)


def other_paths(device: torch.device, run: Run) -> dict[str, Tensor]:
    """Each rank comes by an expert of its own, but in every fifth micro-batch; one process
    by those of both ranks."""
    model = LossOf(run.dtype)
    for block in model.lm.model.layers:
        block.up_proj = Experts().to(run.dtype)
    model = apply_losia(model.to(device), paper(0.25, period=PERIOD, **run.config))
    several = dist.is_initialized()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if several else model
    optimizer = LoSiAAdamW(wrapped, lr=1e-2)
    optimizer.timeline.loss_divisor = run.accumulation
    ranks = [dist.get_rank()] if several else [0, 1]
    shares = (batches_of(run, rank, 2, device) for rank in ranks)
    for number, batches in enumerate(zip(*shares, strict=True)):
        losses = []
        for rank, batch in zip(ranks, batches, strict=True):
            for i, block in enumerate(model.lm.model.layers):
                # with the last block's none comes by the second expert
                block.up_proj.pick = rank if i < 2 and number % 5 else 0
            losses.append(wrapped(**batch) / len(ranks))
        (sum(losses) / run.accumulation).backward()
        if number % run.accumulation == run.accumulation - 1:
            optimizer.step()
            optimizer.zero_grad()
    return {key: value.cpu() for key, value in model.state_dict().items()}


def join(device: torch.device) -> str:
    """Rank 1 has no batch left; returns what ``join`` is answered."""
    wrapped = DistributedDataParallel(convert(Run(), device))
    LoSiAAdamW(wrapped, lr=1e-2)
    batch = batches_of(Run(steps=1), 0, 2, device)[0]
    try:
        with wrapped.join():
            wrapped(**batch)
    except RuntimeError as error:
        return str(error)
    return ""


def mean_of_ranks(device: torch.device) -> list[float]:
    """Of the gradients (1, 10) on rank 0, (2, 20) on rank 1 and so on."""
    grad = (1.0 + dist.get_rank()) * torch.tensor([1.0, 10.0], device=device)
    return Ranks(dist.group.WORLD).all_reduce_mean_(grad).tolist()


# fully_shard --------------------------------------------------------------------------------------


def train_sharded(
    device: torch.device, run: Run, policies: dict | None = None, late: bool = False
) -> Outcome:
    """``run`` under fully_shard; ``late``: the optimizer is made first, then given the sharded
    parameters."""
    rank, size = dist.get_rank(), dist.get_world_size()
    batches = batches_of(run, rank, size, device)
    model = convert(run, device)
    if late:
        optimizer, timeline = make_optimizer(run, model)
        shard_late(model, optimizer, policies or {})
    else:
        shard(model, policies or {})
    if run.calibrated:
        calibrate(model, batches, steps=2, loss_fn=lambda model, batch: model(**batch))
    if not late:
        optimizer, timeline = make_optimizer(run, model)
    timeline.loss_divisor = run.accumulation
    subnets, losses = [], []
    for step in range(run.steps):
        for i in range(run.accumulation):
            model.set_requires_gradient_sync(not run.no_sync or i == run.accumulation - 1)
            loss = model(**batches[step * run.accumulation + i])
            (loss / run.accumulation).backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        subnets.append(places(model))
    return Outcome(subnets, whole_state(model), {}, losses)


def shard(model: LossOf, policies: dict) -> None:
    for block in model.lm.model.layers:
        fully_shard(block, **policies)
    fully_shard(model, **policies)


def shard_late(model: LossOf, optimizer: torch.optim.Optimizer, policies: dict) -> None:
    """As accelerate does with an optimizer that is there."""
    place = {id(parameter): name for name, parameter in model.named_parameters()}
    shard(model, policies)
    sharded = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [sharded[place[id(parameter)]] for parameter in group["params"]]


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every shard gathered: a copy, on the CPU."""
    whole = {
        key: value.full_tensor() if isinstance(value, DTensor) else value
        for key, value in model.state_dict().items()
    }
    return {key: value.detach().cpu().clone() for key, value in whole.items()}


# checkpoints --------------------------------------------------------------------------------------


def make(device: torch.device, engine: str, run: Run):
    """Model, what to call, optimizer and timeline, under ``engine``: "ddp", "fsdp" or "none"."""
    model = forward = convert(run, device)
    if engine == "ddp":
        forward = DistributedDataParallel(model)
    elif engine == "fsdp":
        shard(model, {})
    return model, forward, *make_optimizer(run, forward)


def advance(run: Run, device: torch.device, forward, optimizer, timeline, until: int) -> None:
    """Train to step ``until``, always on the same global batches."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for batch in batches_of(run, rank, size, device)[timeline.step : until]:
        forward(**batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def whole_optimizer(model: nn.Module, optimizer) -> dict:
    """Everything in the optimizer's state dict, shards gathered, by the parameter's name and the
    entry's."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [
        names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]
    ]
    return {
        f"{order[i]}:{kind}": (value.full_tensor() if isinstance(value, DTensor) else value)
        .cpu()
        .clone()
        for i, state in optimizer.state_dict()["state"].items()
        for kind, value in state.items()
    }


def save(device: torch.device, engine: str, run: Run, step: int, folder: str) -> tuple[dict, dict]:
    model, forward, optimizer, timeline = make(device, engine, run)
    advance(run, device, forward, optimizer, timeline, step)
    save_checkpoint(folder, forward, optimizer, {"place": step}, timeline)
    return whole_state(model), whole_optimizer(model, optimizer)


def load(
    device: torch.device, engine: str, run: Run, folder: str, until: int | None = None
) -> tuple[dict, dict, int]:
    model, forward, optimizer, timeline = make(device, engine, run)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    extra = load_checkpoint(folder, forward, optimizer, timeline)
    assert extra == {"place": timeline.step}
    if until is not None:
        advance(run, device, forward, optimizer, timeline, until)
    return whole_state(model), whole_optimizer(model, optimizer), timeline.step


def straight(device: torch.device, engine: str, run: Run, until: int) -> tuple[dict, dict]:
    model, forward, optimizer, timeline = make(device, engine, run)
    advance(run, device, forward, optimizer, timeline, until)
    return whole_state(model), whole_optimizer(model, optimizer)


def torch_helpers(
    device: torch.device, run: Run, step: int, until: int, folder: str
) -> tuple[dict, dict]:
    """Save and resume a sharded run as accelerate does: get_state_dict, dcp.save, dcp.load,
    set_state_dict."""
    model, forward, optimizer, timeline = make(device, "fsdp", run)
    advance(run, device, forward, optimizer, timeline, step)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)

    model, forward, optimizer, timeline = make(device, "fsdp", run)
    timeline.resume_at(step)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    assert timeline.step == step, "making the state was taken for a step"
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    advance(run, device, forward, optimizer, timeline, until)
    return whole_state(model), whole_optimizer(model, optimizer)


def export(device: torch.device, engine: str) -> dict:
    model, forward, optimizer, timeline = make(device, engine, Run())
    advance(Run(), device, forward, optimizer, timeline, 3)
    return full_state_dict(forward)
