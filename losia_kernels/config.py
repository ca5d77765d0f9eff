"""LoSiAConfig: every choice of the method, checked when it is made."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

IMPORTANCES: list[str] = []  # the kinds that training/importance.py defines, as they are defined
MASTERS = ("float32", "split", "none")


@dataclass(frozen=True)
class LoSiAConfig:
    """What is trained and when it moves.

    The defaults are what learns best, and loses least, of as many values as a LoRA of rank 8
    (bench/quality); ``paper`` has the method as published.

    Args:
        rank_factor: p; a linear ``[out, in]`` trains ``int(p * out) x int(p * in)`` of its weights.
        shape: "square": p of both sides (the paper); "wide": as many values, half of the side that
            is the residual stream and ``2 p**2`` of the other.
        output_dim_factor: p_o of the output layer, which trains ``int(p_o * vocabulary)`` outputs
            and all inputs (Section 3.2). 0: left frozen. 1: trained densely, without a slot in the
            timeline (ablation FFTO).
        period: T, optimizer steps in which one group observes before its subnets move (Section
            3.3). "auto": two cycles in the run, T being at most 100 (``schedule.auto_period``); the
            optimizer must know the run's ``total_steps``, which the Trainer adapter tells it.
        warmup_steps: warm-up of the user's learning-rate schedule; before its end nothing is
            rewarmed.
        moves: where a subnet goes at the end of its slot. "importance": to the neurons that are
            most important (Algorithm 1); "random": to new ones, drawn from ``seed``; "none":
            nowhere. Only "importance" observes: the others need no importance state, no dense
            gradient and no calibration.
        update_type: "async": groups take turns; "sync" (ablation SL): all move together, once a
            cycle.
        importance: "sensitivity" (Eqs. 3-6); "sensitivity_bfloat16": the same, its two states kept
            in 2 bytes a weight each instead of 4; "gradient" (ablation GL): |g| of the slot's last
            step; "marginal": row and column sums of the sensitivity only, no state of the weight's
            size.
        init_subnet: "calibrated": ``calibrate`` places the initial subnets from data
            (``apply_losia`` has none and draws at random; the Trainer adapter and ``finetune`` call
            it by themselves); "random": as in the paper.
        importance_beta1, importance_beta2: smoothing of the importance and of its uncertainty.
        output_init: "frequency": the output layer starts at the tokens that the data teach most
            often (``start_from_frequency``, which the Trainer adapter calls by itself); "random":
            as ``init_subnet`` says.
        lr_of: whose learning rate an optimizer is given. "full": full fine-tuning's, and each
            subnet's is that times ``out * in / (k_out * k_in)``, so that one rate is right for every
            rank factor; "subnet": the subnets' own (the paper). "auto": "full" where first places
            and moves are at random, which the rule is for, else "subnet". ``output_init`` changes
            nothing of it: the output layer's rate is scaled as the others' are.
        rewarm: ramp the learning rate up over T steps after a move, the first of which runs at lr/T
            (Eq. 8; the authors' code takes it at 0); False is the ablation w/o WDS.
        reset_step: restart Adam's step counter with the moments; False is what the authors' code
            does.
        target_modules: PEFT's rules: a string is a regex for the whole name, a list holds names or
            their last components; "all-linear" is every linear in the decoder blocks.
        exclude_modules: by the same rules, never targets.
        modules_to_save: trained densely beside the subnets (embeddings, norms); all others stay
            frozen.
        rank_pattern: other rank factors by module name, ``{regex: p}``, or a pair ``(p_out, p_in)``
            that is the shape too; a key matches a name or its last components.
        master: where the float32 values of a subnet are. "float32": in the subnet, rounded into the
            weight; "split": the subnet is bfloat16 as the weight, and the optimizer keeps the 16
            bits that it lacks; "none": nowhere, the subnet has the weight's 16 bits and is rounded
            stochastically, which saves 2 bytes a trained value.
        fused_loss: compute the loss of ``model(labels=...)`` without its logits, where that is
            exact; False: as the model does.
        seed: of the initial subnets, of moves at random and of the stochastic rounding.
        alignment: choose runs of that many neighbouring neurons, by their summed score, in place of
            single ones (1, the paper): a gather of 16 reads only the memory it needs. A power of
            two; a side taken whole has no runs.

    Raises:
        ValueError: a value is out of range.
        TypeError: a field is unknown.
    """

    rank_factor: float = 3 / 20
    output_dim_factor: float = 0.0
    period: int | Literal["auto"] = 100
    warmup_steps: int = 0
    update_type: str = "async"
    importance: str = "sensitivity"
    init_subnet: str = "random"
    importance_beta1: float = 0.85
    importance_beta2: float = 0.85
    output_init: str = "random"
    rewarm: bool = True
    reset_step: bool = True
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, float | tuple[float, float]] = field(default_factory=dict)
    master: str = "float32"
    fused_loss: bool = True
    seed: int = 0
    alignment: int = 1
    shape: str = "wide"
    moves: str = "random"
    lr_of: str = "auto"

    def __post_init__(self) -> None:
        _check_factor("rank_factor", self.rank_factor)
        _check(
            "rank_pattern",
            self.rank_pattern,
            isinstance(self.rank_pattern, dict)
            and all(_is_regex(pattern) for pattern in self.rank_pattern),
            "a dict {regex: rank factor}",
        )
        object.__setattr__(self, "rank_pattern", dict(self.rank_pattern))
        for pattern, factor in self.rank_pattern.items():
            pair: Sequence[Any] = factor if isinstance(factor, (tuple, list)) else ()
            if pair:  # JSON makes lists of them
                self.rank_pattern[pattern] = tuple(pair)
            for each in pair if len(pair) == 2 else (factor,):
                _check_factor(f"rank_pattern[{pattern!r}]", each)
        _check(
            "output_dim_factor",
            self.output_dim_factor,
            _is_number(self.output_dim_factor) and 0 <= self.output_dim_factor <= 1,
            "a number in [0, 1]",
        )
        _check(
            "period",
            self.period,
            self.period == "auto" or _is_int(self.period) and self.period >= 1,
            "a whole number of steps, at least 1, or 'auto'",
        )
        _check(
            "warmup_steps",
            self.warmup_steps,
            _is_int(self.warmup_steps) and self.warmup_steps >= 0,
            "a whole number of steps, at least 0",
        )
        _check(
            "alignment",
            self.alignment,
            _is_int(self.alignment)
            and self.alignment >= 1
            and self.alignment & (self.alignment - 1) == 0,
            "a power of two, at least 1",
        )
        _check_choice("lr_of", self.lr_of, ("auto", "full", "subnet"))
        _check_choice("shape", self.shape, ("square", "wide"))
        _check_choice("moves", self.moves, ("importance", "random", "none"))
        _check_choice("update_type", self.update_type, ("async", "sync"))
        _check_choice("importance", self.importance, IMPORTANCES)
        _check_choice("init_subnet", self.init_subnet, ("calibrated", "random"))
        _check_choice("output_init", self.output_init, ("random", "frequency"))
        _check_choice("master", self.master, MASTERS)
        for name in ("importance_beta1", "importance_beta2"):
            value = getattr(self, name)
            _check(name, value, _is_number(value) and 0 <= value < 1, "a number in [0, 1)")
        for name in ("rewarm", "reset_step", "fused_loss"):
            _check(
                name, getattr(self, name), isinstance(getattr(self, name), bool), "True or False"
            )
        _check_names("target_modules", self.target_modules)
        if self.exclude_modules is not None:
            _check_names("exclude_modules", self.exclude_modules)
        if self.modules_to_save is not None:
            _check(
                "modules_to_save",
                self.modules_to_save,
                _is_names(self.modules_to_save),
                "a list of module names",
            )
        _check(
            "seed", self.seed, _is_int(self.seed) and self.seed >= 0, "a whole number, at least 0"
        )

    @classmethod
    def paper(cls, **changes: Any) -> "LoSiAConfig":
        """The method as published (A.3, of LLaMA-2 7B), whatever the defaults are: square subnets,
        random at first, moved to where the importance is largest; p_o is 1/8.

        Args:
            changes: fields that are to differ from it.

        Raises:
            ValueError, TypeError: as of the class.
        """
        published: dict[str, Any] = {
            "rank_factor": 1 / 8,
            "shape": "square",
            "output_dim_factor": 1 / 8,
            "lr_of": "subnet",
            "period": 100,
            "moves": "importance",
            "importance": "sensitivity",
            "init_subnet": "random",
        }
        return cls(**published | changes)

    @property
    def scales_lr(self) -> bool:
        """Whether learning rates are full fine-tuning's (``lr_of``)."""
        at_random = self.init_subnet == "random" and self.moves != "importance"
        return self.lr_of == "full" or self.lr_of == "auto" and at_random

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, for JSON and checkpoints; ``from_dict`` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LoSiAConfig":
        """The config of ``to_dict``. Raises TypeError naming unknown fields and the known ones."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise TypeError(
                f"LoSiAConfig has no field {', '.join(unknown)}; its fields are {', '.join(known)}"
            )
        return cls(**values)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check(name: str, value: Any, good: bool, expected: str) -> None:
    if not good:
        raise ValueError(f"LoSiAConfig.{name} must be {expected}, got {value!r}")


def _check_factor(name: str, value: Any) -> None:
    _check(name, value, _is_number(value) and 0 < value <= 1, "a number in (0, 1]")


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    _check(name, value, value in choices, "one of " + ", ".join(repr(choice) for choice in choices))


def _is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def _is_regex(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return True


def _check_names(name: str, value: Any) -> None:
    good = _is_regex(value) if isinstance(value, str) else _is_names(value)
    _check(name, value, good and len(value) > 0, "a regex or a list of module names")
