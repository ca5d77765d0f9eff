"""``finetune``: a causal language model and a JSONL file in, a fine-tuned ``save_pretrained``
folder out.

The output folder of a run:
    model/         the result: an ordinary transformers folder, there only when the run is done
    checkpoints/   what ``resume`` goes on from
    log.jsonl      one line a step
    subnets.jsonl  where each layer's subnet has been
    loss_curve.png
    run.json       the options, which ``resume`` holds to
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import warnings
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import logging

from .. import LoSiAConfig, apply_losia, remove_losia
from ..checkpoint.resumable import full_state_dict
from ..integrations.transformers import LoSiACallback, LoSiAOptimizerFactory, losia_timeline
from ..layers.linear import losia_layers
from ..training.schedule import auto_period
from . import data
from .folder import (
    MARKER,
    CheckpointCallback,
    last_checkpoint,
    remove_interrupted,
    save_model,
    write_json,
)
from .options import FinetuneOptions, InputError
from .progress import ProgressCallback

FREE_ON_RESUME = (
    "output",
    "resume",
    "save_steps",
    "print_every",
    "report_to",
)  # options that do not change the result


def finetune(options: FinetuneOptions, callbacks: tuple[TrainerCallback, ...] = ()) -> Path:
    """Fine-tune as ``options`` say and return the folder of the finished model.

    Under torchrun or ``accelerate launch`` every process calls this, and the first one writes and
    speaks. Raises InputError for a mistake in the options or the data, FloatingPointError when the
    loss is no longer finite.
    """
    options.check()
    if options.report_to not in ("none", "all", *get_available_reporting_integrations()):
        raise InputError(
            f"report_to: {options.report_to} is not installed, or nothing that the Trainer reports to"
        )
    logging.disable_progress_bar()
    processes = PartialState(cpu=not torch.cuda.is_available())
    first = processes.is_main_process
    if not first:
        warnings.simplefilter("ignore")  # the first process says it for all
    run = Path(options.output)
    with processes.main_process_first():  # who resumes removes checkpoints that were interrupted
        record, checkpoint = _check_run(run, options, processes.num_processes)
        finished = (run / "model").exists()
    if first and checkpoint:
        print(f"resuming from {checkpoint}")
    elif first and options.resume:
        print("no checkpoint yet: starting from the beginning")
    if finished:
        if first:
            print(f"{run} is finished: the model is in {run / 'model'}")
        return run / "model"

    for path in filter(None, (options.data, options.eval_data)):
        data.read_jsonl(path)  # a malformed line is told before the model is loaded
    model, tokenizer = load_model(options)
    train_data, eval_data = load_data(options, tokenizer)
    check_lengths(model, [*train_data, *(eval_data or [])])
    if options.packing:
        check_packing(model)
    steps = total_steps(options, len(train_data), processes.num_processes)
    processes.wait_for_everyone()  # all have found the folder as it was
    config = convert_model(model, options, steps)
    arguments = training_arguments(options, steps)
    use_cache = model.config.use_cache
    speaking = []
    if first:
        run.mkdir(parents=True, exist_ok=True)  # not before: what is refused leaves nothing behind
        write_json(run / "run.json", record)
        print(_summary(options, model, train_data, config, arguments, steps), flush=True)
        speaking = [
            ProgressCallback(run / "log.jsonl", run / "loss_curve.png", options.print_every)
        ]

    trainer = FinetuneTrainer(
        model,
        arguments,
        data_collator=data.Collator(pad_token_id(tokenizer)),
        train_dataset=train_data,
        eval_dataset=eval_data,
        optimizer_cls_and_kwargs=(
            LoSiAOptimizerFactory,
            {
                "lr": options.lr,
                "weight_decay": options.weight_decay,
                "moments": options.moments,
                "remainder": options.master == "remainder",
                "in_backward": options.in_backward,
            },
        ),
        callbacks=[*speaking, CheckpointCallback(tokenizer, use_cache), *callbacks],
    )
    trainer.add_callback(LoSiACallback(trainer, history=run / "subnets.jsonl"))
    trainer.add_callback(NoStepTooMany())
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except AllStepsTaken:  # only the model was not written
        pass
    model.config.use_cache = use_cache
    weights = full_state_dict(model) if processes.num_processes > 1 else None
    if first:
        save_model(model if weights else remove_losia(model), tokenizer, run / "model", weights)
        print(f"model in {run / 'model'}, loss curve in {run / 'loss_curve.png'}")
    processes.wait_for_everyone()
    return run / "model"


class AllStepsTaken(Exception):
    """The checkpoint that was resumed from is the run's last."""


class NoStepTooMany(TrainerCallback):
    """Resumed from the last checkpoint of all, the Trainer would take one more step."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            raise AllStepsTaken


class FinetuneTrainer(Trainer):
    """The Trainer, quiet, on one device, and with length groups whose order a resumed run finds
    again."""

    def __init__(self, model, args: TrainingArguments, **kwargs):
        args._n_gpu = min(
            args.n_gpu, 1
        )  # with more, the Trainer would wrap the model in DataParallel
        super().__init__(model, args, **kwargs)
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        lengths = [len(sample["input_ids"]) for sample in self.train_dataset]
        batch = (
            self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size
        )
        return data.EpochLengthGroupedSampler(batch, lengths, self.args.seed)

    def _load_optimizer_and_scheduler(self, checkpoint):
        """Sharded states are loaded into the tensors that the optimizer has at the checkpoint's
        step."""
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
            timeline = losia_timeline(self.optimizer)
            timeline.plan(self.args.max_steps)
            timeline.resume_at(state.global_step)
        super()._load_optimizer_and_scheduler(checkpoint)


def training_arguments(options: FinetuneOptions, steps: int) -> TrainingArguments:
    """The Trainer's arguments for a run of ``steps`` optimizer steps."""
    checkpointing = "activation_checkpointing"
    if (
        checkpointing not in TrainingArguments.__dataclass_fields__
    ):  # its name before transformers 5.20
        checkpointing = "gradient_checkpointing"
    return TrainingArguments(
        output_dir=str(Path(options.output) / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        lr_scheduler_type=options.lr_scheduler,
        warmup_steps=warmup_steps(options, steps),
        max_grad_norm=options.max_grad_norm,
        train_sampling_strategy="group_by_length" if options.group_by_length else "random",
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 500,
        save_total_limit=2,
        eval_strategy="steps" if options.eval_data else "no",
        eval_steps=options.eval_steps,
        prediction_loss_only=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all"
        if options.packing
        else "non_padding",  # packed rows have no mask
        seed=options.seed,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=options.report_to,
        **{
            checkpointing: options.gradient_checkpointing,
            f"{checkpointing}_kwargs": {"use_reentrant": False},
        },
    )


def load_model(options: FinetuneOptions):
    """Model and tokenizer of a local folder or a hub name. Raises InputError with the loader's
    first line."""
    name = os.path.expanduser(options.model)
    local = os.path.exists(name) or name[:1] in ("", ".", "/") or name.count("/") > 1
    if local:
        _check_model_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=resolve_dtype(options.dtype))
    except (OSError, ValueError, KeyError, ImportError) as error:
        origin = "" if local else " from the hub (there is no such folder)"
        raise InputError(
            f"cannot load the model {name}{origin}: {str(error).strip().splitlines()[0]}"
        ) from None
    return model, tokenizer


def _check_model_folder(name: str) -> None:
    """Raises InputError for what would be mistaken for a model folder."""
    folder = Path(name)
    if not folder.is_dir():
        raise InputError(f"no model folder {name}")
    if (folder / MARKER).exists():
        raise InputError(
            f"{folder} is a checkpoint of a LoSiA run: --resume goes on with the run, "
            f"losia-kernels export makes a plain model of it"
        )
    if not (folder / "config.json").exists():
        inside = folder / "model"
        hint = f"; there is one in {inside}" if (inside / "config.json").exists() else ""
        raise InputError(f"{folder} is no model folder: it has no config.json{hint}")


def resolve_dtype(name: str) -> torch.dtype:
    """The weights' dtype; "auto" is bfloat16 on a GPU that has it, else float32."""
    if name == "auto":
        good = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if good else torch.float32
    return getattr(torch, name)


def pad_token_id(tokenizer) -> int:
    """The padding token, else the end of the sequence: masks go by position, so either is only a
    filler."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def load_data(options: FinetuneOptions, tokenizer) -> tuple[list, list | None]:
    """Encoded (and packed) training samples, evaluation samples or None."""

    def load(path: str) -> list:
        samples, dropped = data.load_samples(path, tokenizer, options.max_length)
        if dropped:
            print(
                f"{path}: {dropped} samples have nothing to learn within {options.max_length} tokens, left out"
            )
        return data.pack(samples, options.max_length) if options.packing else samples

    return load(options.data), None if options.eval_data is None else load(options.eval_data)


def check_lengths(model, samples: list[dict]) -> None:
    """Raises InputError for a sample longer than the positions that the model has learned, if it
    has learned any."""
    learned = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding)
        and re.search(r"(^|\.)(wpe|\w*position\w*)$", name)
    ]
    positions = getattr(model.config, "max_position_embeddings", None)
    if not learned or positions is None:
        return
    longest = max(
        int(sample["position_ids"].max()) + 1
        if "position_ids" in sample
        else len(sample["input_ids"])
        for sample in samples
    )
    if longest > positions:
        raise InputError(
            f"a sample has {longest} tokens, but {type(model).__name__} has learned {positions} "
            f"positions: set max_length to {positions} or less"
        )


@torch.no_grad()
def check_packing(model) -> None:
    """Raises InputError unless the model keeps the samples of a packed row apart."""
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [3, 1, 2, 4, 5, 6]], device=model.device)
    positions = torch.arange(3, device=model.device).repeat(2, 2)
    model.eval()
    first, other = (
        model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 3:].float()
    )
    if (first - other).abs().max() > 1e-3 * first.abs().max():
        raise InputError(
            f"{type(model).__name__} with {model.config._attn_implementation} attention lets the samples of a packed "
            f"row see each other: use group_by_length instead of packing"
        )


def total_steps(options: FinetuneOptions, samples: int, processes: int = 1) -> int:
    """Optimizer steps of the run, whose ``processes`` take a batch each at a time."""
    if options.steps is not None:
        return options.steps
    batches = math.ceil(samples / (options.batch_size * processes))
    return math.ceil(options.epochs * math.ceil(batches / options.gradient_accumulation))


def warmup_steps(options: FinetuneOptions, steps: int) -> int:
    """Optimizer steps of the warm-up, which the scheduler "constant" has not."""
    return 0 if options.lr_scheduler == "constant" else math.ceil(steps * options.warmup_ratio)


def convert_model(model, options: FinetuneOptions, steps: int) -> LoSiAConfig:
    """Convert ``model`` for a run of ``steps``; the config has the period that "auto" stands
    for."""
    if options.master == "remainder" and model.dtype != torch.bfloat16:
        raise InputError(
            f"master remainder completes bfloat16 weights, the model is {model.dtype}: set dtype bfloat16"
        )
    config = options.losia_config(warmup_steps(options, steps))
    try:
        apply_losia(model, config)
    except ValueError as error:
        raise InputError(str(error)) from None
    period = auto_period(steps, count_groups(model)) if config.period == "auto" else config.period
    return dataclasses.replace(config, period=period)


def count_groups(model) -> int:
    """Groups that take turns observing."""
    return len({layer.membership.group for _, layer in losia_layers(model)} - {None})


def _summary(
    options, model, train_data, config: LoSiAConfig, arguments: TrainingArguments, steps: int
) -> str:
    layers = [layer for _, layer in losia_layers(model)]
    values = sum(layer.subnet.numel() for layer in layers)
    total = model.num_parameters() - values
    tokens = sum(len(sample["input_ids"]) for sample in train_data)
    learned = sum(int((sample["labels"] != data.IGNORE).sum()) for sample in train_data)
    cycle = count_groups(model) * int(config.period)
    period = f"period {config.period} steps" + (" (auto)" if options.period == "auto" else "")
    return "\n".join(
        [
            f"model  {options.model}: {total / 1e6:,.1f}M values, {model.dtype} on {arguments.device}",
            f"data   {options.data}: {len(train_data):,} {'packed rows' if options.packing else 'samples'}, "
            f"{tokens:,} tokens, {learned:,} learned",
            f"LoSiA  {len(layers)} layers in {count_groups(model)} groups, {values:,} trained values "
            f"({100 * values / total:.2f} %); {period}, {steps / cycle:.1f} cycles",
            f"run    {steps} steps of {options.batch_size} x {options.gradient_accumulation} samples"
            f"{f' on each of {arguments.world_size} processes' if arguments.world_size > 1 else ''}, lr {options.lr:g} "
            f"{options.lr_scheduler}, {config.warmup_steps} steps of warm-up",
        ]
    )


def _check_run(run: Path, options: FinetuneOptions, processes: int) -> tuple[dict, Path | None]:
    """What ``run.json`` is to hold, and the checkpoint to go on from. Raises InputError if the
    folder forbids it.

    A resumed run must have the options and the data of the first; on another number of processes,
    batches such that all of them together are as large.
    """
    record = {
        name: value
        for name, value in dataclasses.asdict(options).items()
        if name not in FREE_ON_RESUME
    }
    record["batch_size"] *= processes
    for name in ("data", "eval_data"):
        if record[name] is not None:
            record[f"{name}_sha256"] = _sha256(record[name])
    if not options.resume:
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise InputError(
                f"{run} exists and is not empty: name another output, or go on with --resume"
            )
        return record, None
    if not (run / "run.json").exists():
        raise InputError(f"nothing to resume: {run} holds no run (no run.json)")
    first = json.loads((run / "run.json").read_text())
    changed = sorted(name for name in record | first if record.get(name) != first.get(name))
    if changed:
        was = ", ".join(
            f"{name} was {first.get(name)!r}, now {record.get(name)!r}" for name in changed
        )
        raise InputError(f"cannot resume {run} with other options: {was}")
    remove_interrupted(run / "checkpoints")
    return record, last_checkpoint(run / "checkpoints")


def _sha256(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
