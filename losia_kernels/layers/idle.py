"""Warn of what a config says that cannot act, and of what a model holds that will not be trained."""

import re
import warnings
from collections.abc import Iterable

from torch import nn

from ..config import LoSiAConfig
from .module import SubnetModule
from .shapes import WIDE, has_rank
from .targets import Plan, matches, named_modules

IDLE_BY_HAND = (  # fields of a config that cannot act on layers placed by hand
    "rank_factor",
    "output_dim_factor",
    "rank_pattern",
    "shape",
    "alignment",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
)


def warn_of_unmatched(model: nn.Module, plan: Plan, config: LoSiAConfig) -> None:
    """Warn of patterns in ``target_modules``, ``exclude_modules`` and ``rank_pattern`` that match
    nothing."""
    with_matrices = [
        name
        for name, module in named_modules(model).items()
        if any(p.dim() > 1 for p in module.parameters(False))
    ]
    excluded = config.exclude_modules or []
    # a string is one regex, a list one pattern after the other
    patterns = [(excluded, excluded)] if isinstance(excluded, str) else [(e, [e]) for e in excluded]
    unmatched = [
        ("exclude_modules", pattern, "module with a weight")
        for pattern, rule in patterns
        if not any(matches(name, rule) for name in with_matrices)
    ]
    named = config.target_modules if isinstance(config.target_modules, (list, tuple)) else []
    unmatched += [
        ("target_modules", pattern, "module")
        for pattern in named
        if not any(matches(name, [pattern]) for name in with_matrices)
    ]
    unmatched += [
        ("rank_pattern", pattern, "trained layer")
        for pattern in config.rank_pattern
        if not any(has_rank(target.name, pattern) for target in plan.targets)
    ]
    for option, pattern, what in unmatched:
        within = any(f".{pattern}." in f".{name}" for name in with_matrices)
        hint = f" itself; r'.*{re.escape(pattern)}\\..*' is those within" if within else ""
        warnings.warn(
            f"LoSiA: {option} names {pattern!r}, which matches no {what}{hint}", stacklevel=3
        )


def warn_of_frozen(model: nn.Module, plan: Plan, config: LoSiAConfig) -> None:
    """Warn, with names, of matrices inside the blocks that can hold no subnet: fused experts,
    routers, convolutions."""
    inside = tuple(f"{block}." for block in plan.blocks)
    frozen: dict[str, int] = {}
    trainable = 0
    for name, module in named_modules(model).items():
        skipped = isinstance(module, nn.Embedding) or matches(name, config.exclude_modules)
        if skipped or not name.startswith(inside):
            continue
        matrices = {k: p for k, p in module.named_parameters(recurse=False) if p.dim() > 1}
        if isinstance(module, SubnetModule):
            trainable += module.weight.numel()
        elif matrices and not any(p.requires_grad for p in matrices.values()):
            anonymous = re.sub(r"[.][0-9]+(?=[.])", ".*", name)
            kind = f"{anonymous} ({type(module).__name__}: {', '.join(matrices)})"
            frozen[kind] = frozen.get(kind, 0) + sum(p.numel() for p in matrices.values())
    if frozen:
        share = sum(frozen.values()) / (sum(frozen.values()) + trainable)
        warnings.warn(
            f"LoSiA: {share:.1%} of the blocks' weights stay frozen, for only linear layers can "
            f"hold a subnet: {'; '.join(frozen)}. Name them in modules_to_save to train them in "
            f"full, in exclude_modules if not",
            stacklevel=3,
        )


def warn_of_unused(plan: Plan, config: LoSiAConfig) -> None:
    """Warn of what a config says that its other fields, or the model, keep from acting."""
    usual = LoSiAConfig()
    idle: dict[str, str] = {}
    inner = [target.factors for target in plan.targets if not target.membership.is_output]
    wide = config.shape == "wide" and config.rank_factor < WIDE
    if wide and all(p_out == p_in for p_out, p_in in inner):
        warnings.warn(
            "LoSiA: every subnet is square: LoSiAConfig.shape='wide' cannot act, for no layer's "
            "side is as long as the model's hidden_size or its embeddings; give pairs (p_out, "
            "p_in) in rank_pattern",
            stacklevel=3,
        )
    if config.moves != "importance" and config.init_subnet == "random":
        idle |= dict.fromkeys(
            ("importance", "importance_beta1", "importance_beta2"),
            f"moves={config.moves!r} with random first subnets looks at none",
        )
    if config.moves == "none":
        idle |= dict.fromkeys(("update_type", "rewarm", "reset_step"), "moves='none'")
    if config.output_dim_factor == 0:
        idle["output_init"] = "output_dim_factor=0"
    for name, why in idle.items():
        if getattr(config, name) != getattr(usual, name):
            warnings.warn(
                f"LoSiA: LoSiAConfig.{name} cannot act: {why}",
                stacklevel=3,
            )


def warn_of_outside(plan: Plan) -> None:
    """Warn, with the entry that would train them, of linears outside of the blocks, which
    "all-linear" leaves frozen: a vision-language model's projector, a new head."""
    if plan.outside:
        inside = [t.name for t in plan.targets if not t.membership.is_output]
        entry = [*sorted({name.rpartition(".")[2] for name in inside}), *plan.outside]
        warnings.warn(
            f"LoSiA: {', '.join(plan.outside)}: outside of the blocks, so frozen: to train subnets of "
            f"them too set target_modules={entry}; name them in modules_to_save to train them in "
            f"full, as a new head needs, or in exclude_modules if not",
            stacklevel=3,
        )


def warn_of_idle_fields(config: LoSiAConfig, layers: Iterable[SubnetModule]) -> None:
    """Warn of what a config says that cannot act on ``layers``, which were placed by hand."""
    presets = LoSiAConfig(), LoSiAConfig.paper()
    idle = [
        name
        for name in IDLE_BY_HAND
        if getattr(config, name) not in [getattr(preset, name) for preset in presets]
    ]
    if config.master == "none" and any(layer.master for layer in layers):
        idle.append("master")
    if idle:
        warnings.warn(
            f"LoSiA: {', '.join(idle)} cannot act on layers that were placed by hand and are what "
            f"they are",
            stacklevel=4,
        )
