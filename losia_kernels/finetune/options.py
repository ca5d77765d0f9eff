"""What a fine-tuning run can be told, each option once: its default, and what the command line says
of it.

Free of heavy imports, so that the command line can ask for help at once.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from ..config import IMPORTANCES, MASTERS, LoSiAConfig
from ..training.adam_state import MOMENTS
from .declare import InputError, option, option_value, parse_config, parse_fraction, parse_period

__all__ = ["PICTURES", "FinetuneOptions", "InputError", "set_by_user", "with_config"]

# Of ``losia-kernels plot``: what each shows.
PICTURES = {
    "loss": "by step, with the moves of subnets",
    "timeline": "which group observes when, what moves kept",
    "subnets": "which neurons are trained, over layers and time",
    "frequency": "how often each neuron is trained",
    "gradients": "of the model before training, by neuron",
    "singular_vectors": "how far training turned those of each weight",
}


@dataclass(kw_only=True)
class FinetuneOptions:
    """Everything ``finetune`` can be told; ``losia-kernels finetune --help`` says what each is and
    its unit."""

    model: str = option(
        "model and data", "a local folder or a name on the hub", trl="model_name_or_path"
    )
    data: str = option(
        "model and data",
        'JSONL, JSON, CSV or Parquet, also compressed, a folder of them, or a name on the hub; of {"prompt", '
        '"completion"}, {"messages": [{"role", "content"}, ...]} or {"text"} a row; learned are completions, the '
        "assistant's turns, all of the text",
        trl="dataset_name",
        metavar="FILE",
    )
    data_config: str | None = option(
        "model and data",
        "which configuration of a data set of the hub",
        None,
        trl="dataset_config",
        metavar="NAME",
    )
    data_split: str = option(
        "model and data",
        "which part of a folder or a data set of the hub",
        "train",
        trl="dataset_train_split",
        metavar="NAME",
    )
    eval_split: str = option(
        "model and data",
        "which part of --eval-data, if that is a folder or a data set of the hub",
        "test",
        trl="dataset_test_split",
        metavar="NAME",
    )
    eval_data: str | None = option(
        "model and data",
        "of the same forms, for the evaluation loss",
        None,
        exclusive="one evaluation set",
        metavar="FILE",
    )
    eval_fraction: float = option(
        "model and data",
        "share of the data that is held out for the evaluation loss, drawn by --seed",
        0.0,
        exclusive="one evaluation set",
        type=parse_fraction,
        metavar="SHARE",
    )
    output: str = option(
        "model and data", "a new folder for the run", trl="output_dir", metavar="FOLDER"
    )
    config: dict[str, Any] | None = option(
        "model and data",
        "YAML: any of these options, and any field of TRL's SFTConfig; what the command line says goes first",
        None,
        type=parse_config,
        metavar="FILE",
    )
    max_length: int = option(
        "model and data",
        "longer samples lose their end",
        2048,
        trl="max_length",
        metavar="TOKENS",
    )
    packing: bool = option(
        "model and data",
        "join short samples into rows of up to --max-length",
        False,
        exclusive="packed rows have one length",
        trl="packing",
    )
    group_by_length: bool = option(
        "model and data",
        "batch samples of similar length",
        False,
        exclusive="packed rows have one length",
    )
    dtype: str = option(
        "model and data",
        "of the weights; auto: bfloat16 on a GPU that has it, else float32",
        "auto",
        choices=("auto", "float32", "bfloat16"),
        trl="dtype",
    )

    rank_factor: float = option(
        "LoSiA",
        "p: p^2 of a layer's weights are trained, such as 1/8",
        LoSiAConfig.rank_factor,
        type=parse_fraction,
        metavar="P",
    )
    shape: str = option(
        "LoSiA",
        "which p^2: half of the side that is the residual stream and as much of the other, or p of both sides as in "
        "the paper",
        LoSiAConfig.shape,
        choices=("wide", "square"),
    )
    output_dim_factor: float = option(
        "LoSiA",
        "share of the vocabulary whose output weights are trained; 0: none, 1: all",
        0.0,
        type=parse_fraction,
        metavar="P",
    )
    period: int | Literal["auto"] = option(
        "LoSiA",
        "steps until the next group of layers moves its subnets; auto: the paper's 100, or in a short run as many as "
        "give every group two turns",
        "auto",
        type=parse_period,
        metavar="STEPS",
    )
    moves: str = option(
        "LoSiA",
        "where subnets move: to new places at random, to where the importance is largest as in the paper, nowhere",
        LoSiAConfig.moves,
        choices=("random", "importance", "none"),
    )
    importance: str = option(
        "LoSiA",
        "what subnets move by with --moves importance; sensitivity_bfloat16 keeps it in half the memory, marginal "
        "needs none of the weights' size",
        "sensitivity",
        choices=IMPORTANCES,
    )
    init_subnet: str = option(
        "LoSiA",
        "place the first subnets at random as in the paper, or by the first 4 batches",
        LoSiAConfig.init_subnet,
        choices=("random", "calibrated"),
    )
    alignment: int = option(
        "LoSiA",
        "choose runs of so many neighbours: 16 makes gathers read only the memory they need; 1 is the paper",
        1,
        metavar="NEURONS",
    )

    # What is kept for each trained value; docs/memory.md has the bytes.
    moments: str = option(
        "memory of the optimizer",
        "how the optimizer keeps its moments",
        "float32",
        choices=tuple(MOMENTS),
    )
    master: str = option(
        "memory of the optimizer",
        "how the trained values are kept: in float32, in bfloat16 with the missing bits beside them, in bfloat16 alone "
        "with stochastic rounding",
        "float32",
        choices=MASTERS,
    )
    in_backward: bool = option(
        "memory of the optimizer", "update inside the backward, keep no gradients", False
    )

    lr: float = option(
        "training",
        "peak learning rate, of full fine-tuning: each subnet's is that divided by the share it trains (for --moves "
        "importance or --init-subnet calibrated: the subnets' own)",
        5e-5,
        trl="learning_rate",
    )
    lr_scheduler: str = option(
        "training",
        "over the whole run",
        "cosine",
        choices=("cosine", "linear", "constant", "constant_with_warmup"),
        trl="lr_scheduler_type",
    )
    warmup_ratio: float = option(
        "training", "share of the steps in which the rate rises", 0.1, metavar="SHARE"
    )
    epochs: float = option(
        "training",
        "passes over the data",
        3.0,
        exclusive="each says how long the run is",
        trl="num_train_epochs",
    )
    steps: int | None = option(
        "training",
        "optimizer steps, instead of --epochs",
        None,
        exclusive="each says how long the run is",
        type=int,
        trl="max_steps",
    )
    batch_size: int = option(
        "training",
        "samples (packed: rows) of one forward",
        4,
        metavar="SAMPLES",
        trl="per_device_train_batch_size",
    )
    gradient_accumulation: int = option(
        "training",
        "batches of one optimizer step",
        1,
        metavar="BATCHES",
        trl="gradient_accumulation_steps",
    )
    weight_decay: float = option("training", "decoupled, on the subnets", 0.0, trl="weight_decay")
    max_grad_norm: float = option(
        "training",
        "clip gradients to this norm; 0: never",
        1.0,
        metavar="NORM",
        trl="max_grad_norm",
    )
    gradient_checkpointing: bool = option(
        "training",
        "recompute activations: less memory, more time",
        False,
        trl="gradient_checkpointing",
    )
    seed: int = option(
        "training", "of the order of the data, the first subnets, dropout", 0, trl="seed"
    )

    print_every: int = option(
        "progress",
        "a line on the terminal; log.jsonl has every step",
        10,
        metavar="STEPS",
        trl="logging_steps",
    )
    report_to: str = option(
        "progress",
        "where the Trainer reports to as well: tensorboard, wandb, ...",
        "none",
        metavar="NAME",
        trl="report_to",
    )
    eval_steps: int = option(
        "progress",
        "between evaluations; the last step has one too",
        500,
        metavar="STEPS",
        trl="eval_steps",
    )
    save_steps: int = option(
        "progress",
        "between checkpoints, two are kept; 0: none",
        500,
        metavar="STEPS",
        trl="save_steps",
    )
    samples: int = option(
        "progress",
        "prompts of the evaluation data, or else of the data, that the model is shown to answer, at each evaluation "
        "and at the end",
        0,
        metavar="COUNT",
    )
    resume: bool = option(
        "progress",
        "go on with the run in --output from its last checkpoint; run.json there has the options",
        False,
    )

    def total_steps(self, samples: int, processes: int = 1) -> int:
        """Optimizer steps of a run whose ``processes`` take a batch of the ``samples`` each at a
        time."""
        batches = samples / (self.batch_size * processes)
        if (self.config or {}).get("dataloader_drop_last") is True:
            batches = math.floor(batches)
            if not batches:
                raise InputError(
                    f"config: dataloader_drop_last leaves nothing of {samples} samples, fewer than a batch"
                )
        if self.steps is not None:
            return self.steps
        batches = math.ceil(batches)
        return math.ceil(self.epochs * math.ceil(batches / self.gradient_accumulation))

    def warmup_steps(self, total_steps: int) -> int:
        """Optimizer steps of the warm-up, which the scheduler "constant" has not."""
        if self.lr_scheduler == "constant":
            return 0
        # the last step of a warm-up of all steps would still be none: the first has a rate of 0
        return min(math.ceil(total_steps * self.warmup_ratio), max(0, total_steps - 1))

    def losia_config(self, total_steps: int = 0) -> LoSiAConfig:
        """What a run of ``total_steps`` trains and when it moves.

        Raises:
            InputError: for a value out of range.
        """
        # where every subnet is its layer, there is no place to choose
        whole = self.rank_factor == 1 and self.output_dim_factor in (0, 1)
        try:
            return LoSiAConfig(
                rank_factor=self.rank_factor,
                shape=self.shape,
                output_dim_factor=self.output_dim_factor,
                period=self.period,
                warmup_steps=self.warmup_steps(total_steps),
                moves=self.moves,
                importance=self.importance,
                init_subnet="random" if whole else self.init_subnet,
                alignment=self.alignment,
                master=self.master,
                seed=self.seed,
            )
        except ValueError as error:
            raise InputError(str(error)) from None


def set_by_user(options: FinetuneOptions) -> set[str]:
    """Names of the options that are not as they would be without a word."""
    return {
        declared.name
        for declared in fields(options)
        if getattr(options, declared.name) != declared.default
    }


def with_config(given: dict[str, Any]) -> dict[str, Any]:
    """The options that the command line was ``given``, with those of its config file for the rest,
    but for what the given exclude; what is left of the file is ``config``.

    Raises:
        InputError: for a value that its option does not take, or an option under two names.
    """
    settings = given.get("config")
    if settings is None:
        return given
    named = {}
    for declared in fields(FinetuneOptions):
        for name in {declared.name, declared.metadata["trl"]} - {None, "config", "resume"}:
            named[name] = declared
    found: dict[str, Any] = {}
    for name in [name for name in settings if name in named]:
        declared = named[name]
        if declared.name in found:
            raise InputError(f"config: {declared.name} stands there twice, also as {name}")
        value = settings[name]
        if name == "max_steps" and value == -1:  # how TRL says that epochs count
            value = None
        found[declared.name] = option_value(declared, value, "config")
    excluded = {named[name].metadata["exclusive"] for name in given if name in named} - {None}
    found = {
        name: value
        for name, value in found.items()
        if named[name].metadata["exclusive"] not in excluded
    }
    rest = {name: value for name, value in settings.items() if name not in named}
    return {**found, **given, "config": rest or None}
