"""The plain-torch forms of the ops, which a kernel is held to and timed against; and what launches their kernels."""

from types import ModuleType

from torch import Tensor

from losia_kernels.ops import eager
from losia_kernels.ops.eager import (
    gather_features,
    importance_marginals,
    importance_update_,
    score_marginals,
    subnet_adamw_,
)

__all__ = [
    "gather_features",
    "importance_marginals",
    "importance_update_",
    "launched",
    "score_marginals",
    "subnet_adamw_",
    "subnet_grad",
]


def subnet_grad(dy: Tensor, x: Tensor, out_idx: Tensor | None) -> Tensor:
    return eager.subnet_grad_partials(dy, x, out_idx, None).sum(0)  # [k_out, k_in]


def launched() -> list[tuple[ModuleType, str, str, ModuleType]]:
    """Where an op finds its plain form (module, name), and the launcher that takes its place on a
    GPU (name, file of the kernel)."""
    from losia_kernels.kernels import adamw, gather, subnet_adamw
    from losia_kernels.kernels import subnet_grad as grad

    return [
        (eager, "gather_features", "launch_gather_features", gather),
        (eager, "subnet_grad_partials", "launch_subnet_grad", grad),
        (eager, "subnet_adamw_", "launch_subnet_adamw_", subnet_adamw),
        (eager, "subnets_adamw_", "launch_subnets_adamw_", adamw),
    ]
