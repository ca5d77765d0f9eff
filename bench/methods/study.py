"""The methods of the quality study, each from its real library and with a search of its own.

The rivals' settings are those that the LoSiA paper gave them (A.3; alpha = 2r on all linears), PiSSA's alpha its
library's; the learning rate is searched."""

from dataclasses import replace
from typing import Any

from . import blocks, galore, losia, plain
from .adapters import prepare_other, prepare_peft
from .base import Method
from .explored import explored

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
LOWER, LOWEST = (1e-4, 3e-4, 1e-3, 3e-3), (1e-5, 3e-5, 1e-4, 3e-4)  # of large ranks; of all weights
PLAIN = "no dropout, all linears of the decoder blocks"


def _lora(name: str, title: str, text: str, lrs: tuple, rank: int, alpha: int, **config) -> Method:
    def prepare(model, options):
        return prepare_peft(model, replace(options, rank=rank, alpha=alpha), **config)

    return Method(name, title, prepare, settings=text, lrs=lrs)


def _peft(
    name: str, title: str, text: str, lrs: tuple, kind: str, seeded=False, **config
) -> Method:
    """Another method of PEFT's; ``seeded``: its places are drawn from ``random_seed``."""

    def prepare(model, options):
        seed = {"random_seed": options.seed} if seeded else {}
        return prepare_other(model, options, kind, **config, **seed)

    return Method(name, title, prepare, settings=f"peft, {text}, {PLAIN}", lrs=lrs)


def _placed(
    name: str, title: str, text: str, lrs: tuple[float, ...] = RATES[1:], **changes: Any
) -> Method:
    """A choice of shape, places and moves, with a learning rate of its own."""

    def prepare(model, options):
        return losia.prepare_study(model, replace(options, changes=changes))

    return Method(f"losia-{name}", title, prepare, settings=text, lrs=lrs, chooses=True)


EVERYTHING = "all parameters, torch AdamW"
CALIBRATED = "this package; the paper's settings, but one cycle a run, calibrated start"
DORA = "peft, LoRA r 64 with use_dora"
PISSA_RATES, PISSA_INIT = (3e-5, 1e-4, 3e-4, 1e-3), "pissa_niter_4"
PISSA = "as LoRA r 64, init_lora_weights=pissa_niter_4; alpha 64, as in peft's example"
GALORE = (
    "galore-torch, rank 1/8 of the hidden size, scale 2, gap 200 (in a run shorter than that one "
    "projection); embeddings and norms by AdamW"
)
AS_LORA = "as many values as LoRA r 8"
SHIRA = f"ShiraConfig(r=8): random single weights, {AS_LORA}"
MISS = f"MissConfig(r=16), its defaults otherwise: {AS_LORA}, and 2 % more"
DIABLO = (
    "64 disjoint blocks at random that cover all outputs and inputs of each linear, as many values as LoSiA p 1/8; "
    "after DiaBlo, whose blocks are the diagonal ones"
)
PACA = f"16 random columns (inputs) of each linear, {AS_LORA}, and 2 % more; after PaCA"
_PEERS = (
    _peft("shira", "SHiRA r 8", SHIRA, RATES[1:], "ShiraConfig", seeded=True, r=8),
    _peft("miss", "MiSS r 16", MISS, RATES[:3], "MissConfig", r=16),
    blocks.method("blocks-64", "DiaBlo-like, 64", blocks.random_blocks, 64, DIABLO, RATES[1:]),
    blocks.method("columns-16", "PaCA-like, 16", blocks.random_columns, 16, PACA, RATES[1:]),
)
WIDE = {"shape": "wide", "init_subnet": "random", "moves": "random", "cycles": 2}
SQUARE = WIDE | {"shape": "square"}
DEFAULT_CHOICES = WIDE | {"rank_factor": 3 / 20}
STILL = {"moves": "none"}
SCORED = {"shape": "wide", "cycles": 2}
HEAD = {"output_dim_factor": 1 / 8, "output_init": "frequency", "lr_of": "full"}
DEFAULT = "the default: wide, at random, moved at random twice in the run; p 3/20, as many values as LoRA r 8"
NO_MASTER = {"bfloat16": True, "master": "none"}
IN_BFLOAT16 = (
    (
        "bf16",
        "bfloat16",
        "as LoSiA, bfloat16 weights, float32 master of the subnets",
        {"bfloat16": True},
    ),
    ("bf16-stochastic", "bfloat16, no master", "rounded stochastically", NO_MASTER),
    (
        "bf16-nearest",
        "bfloat16, to nearest",
        "no master, torch's AdamW attached",
        NO_MASTER | {"nearest": True},
    ),
)
_PLACED = (
    _placed("wide-r8", "LoSiA", DEFAULT, **DEFAULT_CHOICES),
    _placed("wide", "LoSiA p 1/8", "as LoSiA, of the paper's p", **WIDE),
    _placed("wide-still", "LoSiA p 1/8, never moved", "wide, at random", **WIDE | STILL),
    _placed("square", "LoSiA p 1/8, square", "square, at random, moved at random twice", **SQUARE),
    _placed("square-still", "LoSiA p 1/8, square, never moved", "at random", **SQUARE | STILL),
    _placed(
        *("wide-once", "LoSiA p 1/8, all at once", "wide, at random, all moved at random half-way"),
        **WIDE | {"update_type": "sync"},
    ),
    _placed(
        *("wide-scored", "LoSiA p 1/8, by importance"),
        "wide, calibrated, moved by importance twice",
        **SCORED,
    ),
    _placed(
        *("wide-head", "LoSiA p 1/8 and 1/8 of the output layer"),
        "never moved; rates are full fine-tuning's, as for every share",
        **{**WIDE, **STILL, **HEAD, "lrs": LOWEST[:3]},
    ),
    *(
        _placed(f"wide-{name}", f"LoSiA, {title}", text, **DEFAULT_CHOICES | changes)
        for name, title, text, changes in IN_BFLOAT16
    ),
    *(
        _placed(
            *(f"wide-p{part}", f"LoSiA p 1/{part}", f"as LoSiA, p 1/{part}"),
            **{**WIDE, "rank_factor": 1 / part, "lrs": lrs},
        )
        for part, lrs in ((16, RATES[1:]), (4, RATES[:3]), (2, LOWER[:3]))
    ),
)
# the share of each weight's values that is trained, of methods that differ in nothing else
TRAINED_SHARE = {"fft": 1.0, "losia-wide-p2": 1 / 4, "losia-wide-p4": 1 / 16}
TRAINED_SHARE |= {"losia-wide-r8": 9 / 400, "losia-wide": 1 / 64, "losia-wide-p16": 1 / 256}
PAPER = _placed(
    *(
        "paper",
        "LoSiA as published",
        "11 cycles a run, 1/8 of the output layer, random first places",
    ),
    **{"init_subnet": "random", "output_dim_factor": 1 / 8, "cycles": 11, "lrs": RATES[:3]},
)
_METHODS = (
    Method("fft", "full fine-tuning", plain.prepare_full, settings=EVERYTHING, lrs=LOWEST),
    _lora("lora-r8", "LoRA r 8", f"peft, alpha 16, {PLAIN}", RATES, 8, 16),
    Method(
        "losia-p8", "LoSiA calibrated, p 1/8", losia.prepare_study, settings=CALIBRATED, lrs=RATES
    ),
    _lora("lora-r64", "LoRA r 64", f"peft, alpha 128, {PLAIN}", LOWER, 64, 128),
    _lora("dora-r64", "DoRA r 64", DORA, LOWER, 64, 128, use_dora=True),
    _lora("pissa-r64", "PiSSA r 64", PISSA, PISSA_RATES, 64, 64, init_lora_weights=PISSA_INIT),
    Method("galore", "GaLore", galore.prepare_whole, settings=GALORE, lrs=LOWER),
    PAPER,
    *_PEERS,
    *_PLACED,
    *explored(DEFAULT_CHOICES, RATES[1:]),
)
STUDY: dict[str, Method] = {method.name: method for method in _METHODS}
