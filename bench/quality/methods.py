"""The methods that are compared, each from its real library. The rivals' settings are those that
the LoSiA paper gave them (A.3; alpha = 2r on all linears), PiSSA's alpha its library's; the
learning rate is searched."""

import functools
import inspect
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from losia_kernels import LoSiAAdamW, LoSiAConfig, apply_losia, attach, calibrate, remove_losia
from losia_kernels.training.calibrate import start_from_frequency

from ..methods import MissingPeer
from ..methods.base import adamw, decoder_linears, target_names, trained_parameters
from ..methods.imports import import_peer
from .budget import by_importance

CALIBRATION_BATCHES = 4
COUNTED_BATCHES = 64  # whose labels say which tokens are taught most often


@dataclass(frozen=True)
class Setting:
    """What a constructor may need to know of the run. ``batches()`` starts the run's own batches
    anew."""

    lr: float
    steps: int
    warmup: int
    seed: int
    batches: Callable[[], Any]
    options: dict[str, Any]


@dataclass
class Trained:
    """``model`` is trained by ``optimizer``; ``finish()`` gives the plain model of the same
    weights; ``made``: what followed from the run's length."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    finish: Callable[[], nn.Module]
    made: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """``lrs``: the learning rates that are tried, as many for each method."""

    name: str
    title: str
    settings: str
    lrs: tuple[float, ...]
    prepare: Callable[[nn.Module, Setting], Trained]


def _full(model: nn.Module, setting: Setting) -> Trained:
    model.requires_grad_(True)
    return Trained(model, adamw(trained_parameters(model), setting.lr), lambda: model)


def _adapters(model: nn.Module, setting: Setting, rank: int, alpha: int, **config: Any) -> Trained:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingPeer(f"peft cannot be imported: {error}") from None
    torch.manual_seed(setting.seed)  # of the adapters' first values
    adapted = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=target_names(model), **config)
    )
    return Trained(
        adapted, adamw(trained_parameters(adapted), setting.lr), adapted.merge_and_unload
    )


def _galore(model: nn.Module, setting: Setting) -> Trained:
    """As its README: the projection for the decoder's linears, plain AdamW for all other
    parameters."""
    peer = import_peer("galore_torch")
    model.requires_grad_(True)
    projected = [linear.weight for linear in decoder_linears(model).values()]
    of_linears = {id(weight) for weight in projected}
    rank = max(1, model.config.hidden_size // 8)  # the paper's 512 for a hidden size of 4096
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in of_linears]},
        {
            "params": projected,
            "rank": rank,
            "update_proj_gap": 200,
            "scale": 2.0,
            "proj_type": "std",
        },
    ]
    optimizer = peer.GaLoreAdamW(
        groups, lr=setting.lr, weight_decay=0.0, no_deprecation_warning=True
    )
    return Trained(model, optimizer, lambda: model)


OF_THE_STUDY = (
    "cycles",
    "nearest",
    "bfloat16",
    "budget",
)  # options that are no fields of LoSiAConfig
CYCLES = 1  # how often every group moves in a run; the period follows from the number of steps


def losia_config(model: nn.Module, setting: Setting, rank_factor: float) -> LoSiAConfig:
    """The config of a run; options are its fields, or ``cycles``, from which the period follows.

    Raises MissingPeer for a field that this version of the package does not have.
    """
    groups = model.config.num_hidden_layers
    options = {name: value for name, value in setting.options.items() if name not in OF_THE_STUDY}
    unknown = sorted(set(options) - set(inspect.signature(LoSiAConfig).parameters))
    if unknown:
        raise MissingPeer(f"LoSiAConfig has no field {', '.join(unknown)}")
    period = max(1, int(setting.steps / (groups * setting.options.get("cycles", CYCLES))))
    values = {
        "rank_factor": rank_factor,
        "period": period,
        "warmup_steps": setting.warmup,
        "seed": setting.seed,
        "importance": "sensitivity",
    }
    return LoSiAConfig(**(values | options))


def _losia(model: nn.Module, setting: Setting, rank_factor: float) -> Trained:
    config = losia_config(model, setting, rank_factor)
    if setting.options.get("budget"):
        pattern = by_importance(model, setting.batches(), CALIBRATION_BATCHES, rank_factor)
        config = replace(config, rank_pattern=pattern)
    apply_losia(model, config)
    calibration_batches = CALIBRATION_BATCHES if config.init_subnet == "calibrated" else 0
    if calibration_batches:
        calibrate(model, setting.batches(), calibration_batches)
    if config.output_init == "frequency":
        start_from_frequency(model, itertools.islice(setting.batches(), COUNTED_BATCHES))
    if setting.options.get(
        "nearest"
    ):  # what the authors' code does: 16-bit values, no master, rounded to nearest
        optimizer = torch.optim.AdamW(trained_parameters(model), lr=setting.lr, weight_decay=0.0)
        attach(optimizer, model)
    else:
        optimizer = LoSiAAdamW(model, lr=setting.lr)
    made = {"period": config.period, "calibration_batches": calibration_batches}
    if config.rank_pattern:
        made["layers_by_rank_factor"] = dict(
            sorted(Counter(map(str, config.rank_pattern.values())).items())
        )
    return Trained(model, optimizer, lambda: remove_losia(model), made)


_LRS = (3e-4, 1e-3, 3e-3, 1e-2)
_LARGE_RANK_LRS = (1e-4, 3e-4, 1e-3, 3e-3)
_LORA = "no dropout, all linears of the decoder blocks"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "fft",
            "full fine-tuning",
            "all parameters, torch AdamW",
            (1e-5, 3e-5, 1e-4, 3e-4),
            _full,
        ),
        Method(
            "lora-r8",
            "LoRA r 8",
            f"peft, alpha 16, {_LORA}",
            _LRS,
            functools.partial(_adapters, rank=8, alpha=16),
        ),
        Method(
            "losia-p8",
            "LoSiA p 1/8",
            "this package; the paper's settings, but one cycle a run, calibrated start",
            _LRS,
            functools.partial(_losia, rank_factor=1 / 8),
        ),
        Method(
            "lora-r64",
            "LoRA r 64",
            f"peft, alpha 128, {_LORA}",
            _LARGE_RANK_LRS,
            functools.partial(_adapters, rank=64, alpha=128),
        ),
        Method(
            "losia-p4",
            "LoSiA p 1/4",
            "as p 1/8",
            _LRS,
            functools.partial(_losia, rank_factor=1 / 4),
        ),
        Method(
            "dora-r64",
            "DoRA r 64",
            "peft, LoRA r 64 with use_dora",
            _LARGE_RANK_LRS,
            functools.partial(_adapters, rank=64, alpha=128, use_dora=True),
        ),
        Method(
            "pissa-r64",
            "PiSSA r 64",
            "as LoRA r 64, init_lora_weights=pissa_niter_4; alpha 64, as in peft's example",
            (3e-5, 1e-4, 3e-4, 1e-3),
            functools.partial(_adapters, rank=64, alpha=64, init_lora_weights="pissa_niter_4"),
        ),
        Method(
            "galore",
            "GaLore",
            "galore-torch, rank 1/8 of the hidden size, scale 2, gap 200 (in a run shorter than "
            "that one projection); embeddings and norms by AdamW",
            _LARGE_RANK_LRS,
            _galore,
        ),
        Method(
            "losia-p16",
            "LoSiA p 1/16",
            "as p 1/8",
            _LRS,
            functools.partial(_losia, rank_factor=1 / 16),
        ),
        Method(
            "lora-r11",
            "LoRA r 11",
            "peft, alpha 22: adds as many bytes as LoSiA p 1/8",
            _LRS,
            functools.partial(_adapters, rank=11, alpha=22),
        ),
        Method(
            "losia-p2",
            "LoSiA p 1/2",
            "as p 1/8",
            _LRS,
            functools.partial(_losia, rank_factor=1 / 2),
        ),
    )
}


@dataclass(frozen=True)
class Variant:
    """One choice of LoSiA p 1/8 changed, at the learning rate that was found for it unchanged."""

    name: str
    title: str
    options: dict[str, Any]


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("random", "random first subnets (the paper)", {"init_subnet": "random"}),
        Variant(
            "marginal",
            "importance: sums only, no state of the weight's size",
            {"importance": "marginal"},
        ),
        Variant(
            "importance-bf16", "importance kept in bfloat16", {"importance": "sensitivity_bfloat16"}
        ),
        Variant("gl", "GL: size of the gradient instead of importance", {"importance": "gradient"}),
        Variant("sl", "SL: all layers move together", {"update_type": "sync"}),
        Variant("no-wds", "w/o WDS: no rewarming", {"rewarm": False}),
        Variant("no-reset", "Adam's step count kept", {"reset_step": False}),
        Variant("ffto", "FFTO: the output layer trained in full", {"output_dim_factor": 1.0}),
        Variant("head", "1/8 of the output layer's outputs too", {"output_dim_factor": 1 / 8}),
        Variant(
            "head-frequency",
            "the same, first those of the tokens that the data teach most often",
            {"output_dim_factor": 1 / 8, "output_init": "frequency"},
        ),
        Variant("alignment-16", "neurons in runs of 16", {"alignment": 16}),
        Variant("budget", "rank factors by importance, as many values in all", {"budget": True}),
        Variant(
            "period-100", "the paper's period of 100: in fewer steps nothing moves", {"period": 100}
        ),
        Variant(
            "cycles-quarter", "coverage: a quarter of the groups gets a turn", {"cycles": 0.25}
        ),
        Variant(
            "cycles-quarter-random",
            "the same from random subnets",
            {"cycles": 0.25, "init_subnet": "random"},
        ),
        Variant("cycles-half", "twice the period", {"cycles": 0.5}),
        Variant("cycles-2", "half the period", {"cycles": 2}),
        Variant(
            "together-100",
            "all layers move together, every 100 steps",
            {"update_type": "sync", "period": 100},
        ),
        Variant(
            "together-100-marginal",
            "the same, importance: sums only",
            {"update_type": "sync", "period": 100, "importance": "marginal"},
        ),
        Variant("bf16", "bf16 model, float32 master", {"bfloat16": True}),
        Variant(
            "bf16-stochastic",
            "bf16 model, no master, stochastic rounding",
            {"bfloat16": True, "master_weights": False},
        ),
        Variant(
            "bf16-nearest",
            "bf16 model, no master, rounded to nearest (the authors' code)",
            {"bfloat16": True, "master_weights": False, "nearest": True},
        ),
    )
}
