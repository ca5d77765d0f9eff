"""TRL's SFTTrainer as a run needs it, and the arguments that it gets."""

import difflib
import math
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, get_scheduler
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer, TrlParser

from ..integrations.transformers import losia_timeline
from .checkpoints import damage_of
from .data import lengths
from .model import has_embedding
from .options import FinetuneOptions, InputError

# Fields of SFTConfig that a run decides, and why; whatever an option sets is the option's.
DECIDED = {
    "dataset_kwargs": "the data is prepared before the model is converted",
    "do_eval": "give eval_data or eval_fraction",
    "do_train": "it always does",
    "do_predict": "give samples",
    "disable_tqdm": "progress is said line by line",
    "logging_strategy": "log.jsonl has every step",
    "logging_first_step": "log.jsonl has every step",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "optim": "LoSiA brings its own optimizer",
    "optim_args": "LoSiA brings its own optimizer",
    "optim_target_modules": "LoSiA brings its own optimizer",
    "save_only_model": "a resumed run needs the optimizer's state",
    "ignore_data_skip": "a resumed run goes on with the batches that are left",
    "warmup_steps": "give warmup_ratio, which LoSiA's own schedule is told",
    "prediction_loss_only": "evaluations are of the loss and the accuracy",
    "include_for_metrics": "evaluations are of the loss and the accuracy",
    "batch_eval_metrics": "evaluations are of the loss and the accuracy",
    "eval_do_concat_batches": "evaluations are of the loss and the accuracy",
    "eval_use_gather_object": "evaluations are of the loss and the accuracy",
    "eval_accumulation_steps": "evaluations keep no logits",
    "remove_unused_columns": "the data has no other columns",
    "label_names": "the data has no other columns",
    "length_column_name": "the data has no other columns",
    "dataset_num_proc": "the data is prepared by one process",
    "hub_strategy": "the finished model is pushed, once",
    "hub_always_push": "the finished model is pushed, once",
    "parallelism_config": "accelerate launch has it",
    "resume_from_checkpoint": "give --resume",
    "resume": "give --resume",
    "config": "one file says it all",
    "model_init_kwargs": "the model is loaded by the options model and dtype",
}


# What SFTConfig takes and a library would not, steps later: from, and below.
RANGES = {
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "eval_delay": (0, math.inf),
    "label_smoothing_factor": (0, 1),
    "neftune_noise_alpha": (0, math.inf),
    "pad_to_multiple_of": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "save_total_limit": (1, math.inf),
}


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """transformers' length grouping, ordered by seed and epoch alone: a resumed epoch has the order
    of the first."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class FinetuneTrainer(SFTTrainer):
    """TRL's Trainer, quiet, on one device, on data that is encoded already.

    The loss that trains is the model's own, which also trains a subnet in the output layer; TRL's
    takes the layer's weight past it. An evaluation is of all learned tokens alike, whatever batch
    they stand in. Length groups have an order that a resumed run finds again.
    """

    def __init__(self, model, args: SFTConfig, processing_class, **kwargs):
        # with more than one, the Trainer would wrap the model in DataParallel
        args._n_gpu = min(args.n_gpu, 1)
        # what is done already, to the tokenizer, the model and the data
        args.chat_template_path, args.max_length, args.assistant_only_loss = None, None, False
        text, pad = model.config.get_text_config(), processing_class.pad_token
        # what TRL changes in what will be saved: the filler, and of experts a loss on their balance
        changed = [(text, "pad_token_id"), (model.generation_config, "pad_token_id")]
        if args.router_aux_loss_coef is None:
            changed += [(text, "output_router_logits"), (text, "router_aux_loss_coef")]
        before = [
            (each, name, getattr(each, name)) for each, name in changed if hasattr(each, name)
        ]
        if pad is not None and not has_embedding(model, processing_class.pad_token_id):
            processing_class.pad_token = None  # the end of the sequence fills: masks go by position
        output, args.output_dir = args.output_dir, "."  # which the Trainer makes at once
        try:
            super().__init__(model, args, processing_class=processing_class, **kwargs)
        finally:
            args.output_dir, processing_class.pad_token = output, pad
        for each, name, value in before:
            setattr(each, name, value)
        self.processing_class = None  # or the Trainer fits the model's special tokens to it
        self.remove_callback(PrinterCallback)
        self._sums: list[torch.Tensor] = []

    def _send_telemetry(self):
        """A command on the user's own data says nothing to anyone."""

    def create_model_card(self, *args, **kwargs):
        """The run's card stands beside its model; checkpoints have none."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.args.loss_type != "nll":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Of each sample the summed loss, the learned tokens and those that were guessed right;
        nothing of the size of the vocabulary is made."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            output = model(**inputs, fused_lm_head=True)
        values = torch.stack(
            [-output.log_probs.float(), output.label_mask.float(), output.is_top1.float()]
        )
        if "position_ids" in inputs:  # one row, in which samples begin at position 0
            sample = (inputs["position_ids"] == 0).cumsum(1)[0, 1:] - 1
            sums = values.new_zeros(3, int(sample[-1]) + 1 if len(sample) else 1)
            sums.index_add_(1, sample, values[:, 0])
        else:
            sums = values.sum(-1)
        # of a sample that fills up the last batch of several processes nothing counts twice
        self._sums.append(
            self.accelerator.gather_for_metrics(sums.T.contiguous()).double().sum(0).cpu()
        )
        return values[0].sum() / values[1].sum().clamp(min=1), None, None

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        self._sums.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, learned, right = torch.stack(self._sums).sum(0).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss / max(1.0, learned)
        output.metrics[f"{metric_key_prefix}_mean_token_accuracy"] = right / max(1.0, learned)
        return output

    def _init_training_state(self, *args, **kwargs):
        """What a resumed run may have otherwise is no mistake and goes before what its checkpoint had,
        and the best checkpoint is found by ``CheckpointCallback``."""
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            begun = super()._init_training_state(*args, **kwargs)
        finally:
            logging.set_verbosity(verbosity)
        self.state.compute_steps(self.args, self.state.max_steps)
        return begun

    def _issue_warnings_after_load(self, load_result):
        """A weight that is also another's is saved once: under that name nothing is missing."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        missing = set(load_result.missing_keys)
        loaded = {id(weight) for name, weight in named.items() if name not in missing}
        lost = [name for name in missing if id(named.get(name)) not in loaded]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=sorted(lost)))

    def _load_best_model(self):
        """Raises InputError if the best checkpoint is not as it was saved."""
        best = Path(self.state.best_model_checkpoint)
        damage = damage_of(best)
        if damage:
            raise InputError(f"cannot load the best model, {best}: {damage}")
        super()._load_best_model()

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch = (
            self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size
        )
        return EpochLengthGroupedSampler(
            batch, lengths(self.train_dataset).tolist(), self.args.seed
        )

    def _load_optimizer_and_scheduler(self, checkpoint):
        """Sharded states are loaded into the tensors that the optimizer has at the checkpoint's
        step."""
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
            losia_timeline(self.optimizer).resume_at(state.global_step)
        super()._load_optimizer_and_scheduler(checkpoint)


class AllStepsTaken(Exception):
    """The checkpoint that was resumed from is the run's last."""


class NoStepTooMany(TrainerCallback):
    """Resumed from the last checkpoint of all, the Trainer would take one more step."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            raise AllStepsTaken


class _Parser(TrlParser):
    """Reads settings into SFTConfig as TRL's command does; what is wrong is said in one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"config: {message}")


def sft_config(options: FinetuneOptions, steps: int | None = None) -> SFTConfig:
    """TRL's configuration of a run of ``steps`` optimizer steps: what the options say, what a run
    needs, and ``options.config`` for all else.

    Raises:
        InputError: for a field that SFTConfig has not, that an option sets or that a run decides,
            or a value that it does not take.
    """
    given = {name: value for name, value in (options.config or {}).items() if name != "env"}
    for name in ("eval_strategy", "save_strategy"):
        if given.get(name) is False:  # what YAML makes of "no"
            given[name] = "no"
    set_by = {each.metadata["trl"]: each.name for each in fields(options) if each.metadata["trl"]}
    known = [each.name for each in fields(SFTConfig)]
    for name in given:
        if name in set_by:
            raise InputError(f"config: {name} is the option {set_by[name]}")
        if name in DECIDED:
            raise InputError(f"config: {name} cannot be set: {DECIDED[name]}")
        if name not in known:
            close = difflib.get_close_matches(
                name, [*known, *(each.name for each in fields(options))], 1
            )
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InputError(
                f"config: there is no option {name}, nor has TRL's SFTConfig one{hint}"
            )
    if given.get("loss_type", "nll") == "dft" and options.output_dim_factor:
        raise InputError(
            "config: loss_type dft takes the output layer's weight past the layer, whose subnet then learns nothing: "
            "it needs output_dim_factor 0"
        )
    if given.get("dataloader_persistent_workers") and not given.get("dataloader_num_workers"):
        raise InputError("config: dataloader_persistent_workers needs dataloader_num_workers")
    values: dict[str, Any] = {
        trl: getattr(options, name) for trl, name in set_by.items() if trl in known
    }
    total = steps or options.steps or -1
    unpadded = options.packing or given.get("padding_free") is True
    values |= {
        "output_dir": str(Path(options.output).absolute() / "checkpoints"),
        "max_steps": total,
        "logging_steps": 1,
        "per_device_eval_batch_size": options.batch_size,
        "warmup_steps": options.warmup_steps(max(total, 0)),
        "train_sampling_strategy": "group_by_length" if options.group_by_length else "random",
        "save_strategy": "steps" if options.save_steps else "no",
        "save_steps": options.save_steps or 500,
        "save_total_limit": 2,
        "eval_strategy": "steps" if options.eval_data or options.eval_fraction else "no",
        "eval_packing": False,
        "prediction_loss_only": True,
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "all" if unpadded else "non_padding",
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": False,  # the weights' dtype is the option dtype
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "assistant_only_loss": True,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    # its name since transformers 5.20
    if "activation_checkpointing" in known:
        values["activation_checkpointing"] = values.pop("gradient_checkpointing")
    if "gradient_checkpointing_kwargs" not in given:
        values["activation_checkpointing_kwargs"] = {"use_reentrant": False}
    if given:
        parser = _Parser([SFTConfig], prog="config")
        parser.set_defaults_with_config(**given)
        read = vars(parser.parse_args([]))
        for action in parser._actions:  # argparse holds no default to its choices
            if action.dest in given and action.choices and read[action.dest] not in action.choices:
                parser.error(f"{action.dest} must be one of {', '.join(action.choices)}")
        values |= {name: read[name] for name in given}
    try:
        config = SFTConfig(**values)
        _try_scheduler(config)
        _check_ranges(config, given)
        return config
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"config: {one_line(error)}") from None


def _check_ranges(config: SFTConfig, given: dict[str, Any]) -> None:
    """Raises ValueError for a number that is out of range."""
    for name in given.keys() & RANGES.keys():
        value, (low, below) = getattr(config, name), RANGES[name]
        if isinstance(value, (int, float)) and not low <= value < below:
            most = "" if below == math.inf else f" and below {below}"
            raise ValueError(f"{name} must be at least {low}{most}, got {value}")


def _try_scheduler(config: SFTConfig) -> None:
    """Raises TypeError or ValueError for ``lr_scheduler_kwargs`` that the schedule does not take."""
    get_scheduler(
        config.lr_scheduler_type,
        torch.optim.SGD([torch.zeros(1, requires_grad=True)]),
        num_warmup_steps=1,
        num_training_steps=2,
        scheduler_specific_kwargs=config.lr_scheduler_kwargs,
    )


def one_line(error: Exception) -> str:
    """What the error says, of which a terminal gets the first lines only."""
    lines = str(error).strip().partition("\n\n")[0].splitlines()
    return " ".join(line.strip() for line in lines[:3]) or type(error).__name__
