"""The plain-torch forms of the ops, which a kernel is held to and timed against; and what launches their kernels."""

from types import ModuleType

from losia_kernels.ops.adamw import subnets_adamw_plain_
from losia_kernels.ops.gather import gather_features_plain
from losia_kernels.ops.importance import importance_marginals_plain, importance_update_plain_
from losia_kernels.ops.scores import score_marginals_plain
from losia_kernels.ops.subnet_grad import subnet_grad_plain

__all__ = [
    "gather_features_plain",
    "importance_marginals_plain",
    "importance_update_plain_",
    "launched",
    "score_marginals_plain",
    "subnet_grad_plain",
    "subnets_adamw_plain_",
]


def launched() -> list[tuple[str, str, ModuleType]]:
    """Where an op finds its plain form, and the launcher that takes its place on a GPU (name, file of the kernel)."""
    from losia_kernels.kernels import adamw, gather, subnet_grad

    return [
        ("losia_kernels.ops.gather.gather_features_plain", "launch_gather_features", gather),
        ("losia_kernels.ops.subnet_grad.subnet_grad_plain", "launch_subnet_grad", subnet_grad),
        ("losia_kernels.ops.adamw.subnets_adamw_plain_", "launch_subnets_adamw_", adamw),
    ]
