"""Updates as after a few steps, for the tests of AdamW; and how a kernel's results are held to
another's."""

import torch
from torch import Tensor

from losia_kernels.ops.adamw import Update
from losia_kernels.ops.rounding import encode

BF16 = torch.bfloat16
OPTIONS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
WRITTEN = ("weight", "subnet", "exp_avg", "exp_avg_sq")
ODD = [((7, 37), (3, 11)), ((1, 1), (1, 1)), ((5, 300), (2, 259))]  # (out, in), (k_out, k_in)
ALIGNED = [((40, 64), (3, 32)), ((24, 300), (2, 272))]


def choose(size: int, k: int, device: str) -> Tensor:
    return torch.randperm(size)[:k].sort().values.to(device)


def make_update(
    size, k, dtype, subnet_dtype, device, grad_dtype=torch.float32, lr=0.01, step=3, seed=None
) -> Update:
    weight = torch.randn(size, device=device).to(dtype)
    out_idx, in_idx = choose(size[0], k[0], device), choose(size[1], k[1], device)
    return Update(
        weight,
        weight[out_idx][:, in_idx].to(subnet_dtype),
        torch.randn(k, device=device).to(grad_dtype),
        torch.randn(k, device=device) * 0.1,
        torch.rand(k, device=device) + 1e-3,
        out_idx,
        in_idx,
        lr,
        step,
        seed,
    )


def make(sizes, *dtypes_and_device, seeded=True) -> list[Update]:
    """The same ones in every call, each at another rate, step and seed."""
    torch.manual_seed(0)
    return [
        make_update(
            *sizes[n],
            *dtypes_and_device,
            lr=0.01 / (n + 1),
            step=n + 1,
            seed=77 * n + 5 if seeded else None,
        )
        for n in range(len(sizes))
    ]


def copy(updates: list[Update]) -> list[Update]:
    return [
        Update(*(each.clone() if isinstance(each, Tensor) else each for each in update))
        for update in updates
    ]


def launch(updates: list[Update], **options) -> None:
    from losia_kernels.kernels.adamw import launch_subnets_adamw_

    launch_subnets_adamw_(updates, **OPTIONS | options)


def in_bf16(updates: list[Update]) -> list[Update]:
    return [
        u._replace(exp_avg=u.exp_avg.bfloat16(), exp_avg_sq=u.exp_avg_sq.bfloat16())
        for u in updates
    ]


def in_codes(updates: list[Update]) -> list[Update]:
    coded = []
    for update in updates:
        exp_avg, exp_avg_scale = encode(update.exp_avg, True, seed=1)
        exp_avg_sq, exp_avg_sq_scale = encode(update.exp_avg_sq, False, seed=1)
        coded.append(
            update._replace(
                exp_avg=exp_avg,
                exp_avg_sq=exp_avg_sq,
                exp_avg_scale=exp_avg_scale,
                exp_avg_sq_scale=exp_avg_sq_scale,
            )
        )
    return coded


def outside(update: Update) -> Tensor:
    """The entries of the weight that are not in the subnet."""
    inside = torch.zeros(update.weight.shape, dtype=torch.bool, device=update.weight.device)
    inside[update.out_idx[:, None], update.in_idx] = True
    return update.weight[~inside]


def assert_same(ours: list[Update], theirs: list[Update], names=WRITTEN) -> None:
    for a, b in zip(ours, theirs, strict=True):
        for name in names:
            assert torch.equal(getattr(a, name), getattr(b, name)), name
