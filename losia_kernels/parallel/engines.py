"""Ways to split a model or its data that LoSiA cannot train in, refused by name."""

from torch import nn

from .placement import NO_DEEPSPEED, cut_parameters, owned_by_deepspeed
from .ranks import several_processes


def check_engines(model: nn.Module) -> None:
    """Raise ValueError, naming what to use instead, if an engine has split the model in a way that
    LoSiA cannot train in."""
    for name, parameter in model.named_parameters():
        if owned_by_deepspeed(parameter):
            raise ValueError(f"{name}: {NO_DEEPSPEED}")
    if not several_processes():
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    sharded: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            raise ValueError(
                "LoSiA cannot train in FSDP1, which flattens a layer's parameters into one: use "
                "FSDP2, torch.distributed.fsdp.fully_shard (accelerate: fsdp_version: 2)"
            )
        if isinstance(module, FSDPModule):
            sharded.update(module.modules())
    for name, module in model.named_modules():
        for key in cut_parameters(module) if module not in sharded else ():
            raise ValueError(
                f"{name}.{key} is split by a tensor-parallel plan, which LoSiA cannot train in: "
                f"shard the model by FSDP2 (fully_shard) instead, after apply_losia"
            )


def add_join_check(model: nn.Module) -> None:
    """Make a DistributedDataParallel raise RuntimeError in ``join``, where a rank without data
    takes no more steps."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model.register_forward_pre_hook(_check_join)


def _check_join(model: nn.parallel.DistributedDataParallel, args: tuple) -> None:
    if model._join_config.enable:
        raise RuntimeError(
            "LoSiA: a rank that DDP's join lets run out of data would keep its old subnets and "
            "optimizer state; give every rank as many batches (DistributedSampler does), or repeat "
            "one with its loss multiplied by 0"
        )
