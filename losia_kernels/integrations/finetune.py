"""``finetune``: a causal language model and a JSONL file in, a fine-tuned ``save_pretrained`` folder out.

The output folder of a run:
    model/         the result: an ordinary transformers folder, there only when the run is done
    checkpoints/   what ``resume`` goes on from
    log.jsonl      one line a step
    loss_curve.png
    run.json       the options, which ``resume`` holds to
"""

import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from .. import LoSiAConfig, apply_losia, remove_losia
from ..linear import losia_layers
from . import data
from .checkpoints import CheckpointCallback, last_checkpoint, save_model, write_json
from .options import FinetuneOptions, InputError
from .progress import ProgressCallback
from .transformers import LoSiACallback, LoSiAOptimizerFactory

PAPER_PERIOD = 100
FREE_ON_RESUME = ("output", "resume", "save_steps", "print_every")  # options that do not change the result


def finetune(options: FinetuneOptions, callbacks: tuple[TrainerCallback, ...] = ()) -> Path:
    """Fine-tune as ``options`` say and return the folder of the finished model.

    Raises InputError for a mistake in the options or the data, FloatingPointError when the loss is no longer finite.
    """
    options.check()
    logging.disable_progress_bar()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("finetune runs in one process: start it without torchrun or accelerate launch")
    run = Path(options.output)
    record, checkpoint = _check_run(run, options)
    if (run / "model").exists():
        print(f"{run} is finished: the model is in {run / 'model'}")
        return run / "model"

    model, tokenizer = load_model(options)
    train_data, eval_data = load_data(options, tokenizer)
    if options.packing:
        check_packing(model)
    steps = total_steps(options, len(train_data))
    config = apply_with_period(model, options, steps)
    run.mkdir(parents=True, exist_ok=True)  # not before: what is refused leaves nothing behind
    write_json(run / "run.json", record)
    arguments = training_arguments(options, steps)
    use_cache = model.config.use_cache
    print(_summary(options, model, train_data, config, arguments, steps), flush=True)

    trainer = FinetuneTrainer(
        model,
        arguments,
        data_collator=data.Collator(pad_token_id(tokenizer)),
        train_dataset=train_data,
        eval_dataset=eval_data,
        optimizer_cls_and_kwargs=(
            LoSiAOptimizerFactory,
            {"lr": options.lr, "weight_decay": options.weight_decay, "total_steps": steps},
        ),
        callbacks=[
            LoSiACallback(),
            ProgressCallback(run / "log.jsonl", run / "loss_curve.png", options.print_every),
            CheckpointCallback(tokenizer),
            *callbacks,
        ],
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.config.use_cache = use_cache
    save_model(remove_losia(model), tokenizer, run / "model")
    print(f"model in {run / 'model'}, loss curve in {run / 'loss_curve.png'}")
    return run / "model"


class FinetuneTrainer(Trainer):
    """The Trainer, quiet, on one device, and with length groups whose order a resumed run finds again."""

    def __init__(self, model, args: TrainingArguments, **kwargs):
        args._n_gpu = min(args.n_gpu, 1)  # with more, the Trainer would wrap the model in DataParallel
        super().__init__(model, args, **kwargs)
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        lengths = [len(sample["input_ids"]) for sample in self.train_dataset]
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return data.EpochLengthGroupedSampler(batch, lengths, self.args.seed)


def training_arguments(options: FinetuneOptions, steps: int) -> TrainingArguments:
    """The Trainer's arguments for a run of ``steps`` optimizer steps."""
    checkpointing = "activation_checkpointing"
    if checkpointing not in TrainingArguments.__dataclass_fields__:  # its name before transformers 5.20
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
        include_num_input_tokens_seen="non_padding",
        seed=options.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        **{checkpointing: options.gradient_checkpointing, f"{checkpointing}_kwargs": {"use_reentrant": False}},
    )


def load_model(options: FinetuneOptions):
    """Model and tokenizer of a local folder or a hub name. Raises InputError with the loader's first line."""
    name = os.path.expanduser(options.model)
    if name[0] in "./" and not os.path.isdir(name):
        raise InputError(f"no model folder {name}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=resolve_dtype(options.dtype))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"cannot load the model {name}: {str(error).strip().splitlines()[0]}") from None
    return model, tokenizer


def resolve_dtype(name: str) -> torch.dtype:
    """The weights' dtype; "auto" is bfloat16 on a GPU that has it, else float32."""
    if name == "auto":
        good = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if good else torch.float32
    return getattr(torch, name)


def pad_token_id(tokenizer) -> int:
    """The padding token, else the end of the sequence: masks go by position, so either is only a filler."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def load_data(options: FinetuneOptions, tokenizer) -> tuple[list, list | None]:
    """Encoded (and packed) training samples, evaluation samples or None."""
    loaded = []
    for path in (options.data, options.eval_data):
        if path is None:
            loaded.append(None)
            continue
        samples, dropped = data.load_samples(path, tokenizer, options.max_length)
        if dropped:
            print(f"{path}: {dropped} samples have nothing to learn within {options.max_length} tokens, left out")
        loaded.append(data.pack(samples, options.max_length) if options.packing else samples)
    return tuple(loaded)


@torch.no_grad()
def check_packing(model) -> None:
    """Raises InputError unless the model keeps the samples of a packed row apart."""
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [3, 1, 2, 4, 5, 6]], device=model.device)
    positions = torch.arange(3, device=model.device).repeat(2, 2)
    model.eval()
    first, other = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 3:].float()
    if (first - other).abs().max() > 1e-3 * first.abs().max():
        raise InputError(
            f"{type(model).__name__} with {model.config._attn_implementation} attention lets the samples of a packed "
            f"row see each other: use group_by_length instead of packing"
        )


def total_steps(options: FinetuneOptions, samples: int) -> int:
    """Optimizer steps of the run."""
    if options.steps is not None:
        return options.steps
    batches = math.ceil(samples / options.batch_size)
    return math.ceil(options.epochs * math.ceil(batches / options.gradient_accumulation))


def warmup_steps(options: FinetuneOptions, steps: int) -> int:
    """Optimizer steps of the warm-up."""
    return math.ceil(steps * options.warmup_ratio)


def apply_with_period(model, options: FinetuneOptions, steps: int) -> LoSiAConfig:
    """Convert ``model`` for a run of ``steps``; without a period given, the paper's or the largest that fits."""
    try:
        config = LoSiAConfig(
            rank_factor=options.rank_factor,
            output_dim_factor=options.output_dim_factor,
            period=options.period or PAPER_PERIOD,
            warmup_steps=warmup_steps(options, steps),
            importance=options.importance,
            init_subnet=options.init_subnet,
            seed=options.seed,
        )
        apply_losia(model, config)
        if options.period is None and count_groups(model) * PAPER_PERIOD > steps:
            config = dataclasses.replace(config, period=max(1, steps // count_groups(model)))
            apply_losia(remove_losia(model), config)
    except ValueError as error:
        raise InputError(str(error)) from None
    return config


def count_groups(model) -> int:
    """Groups that take turns observing."""
    return len({layer.losia.group for _, layer in losia_layers(model)} - {None})


def _summary(options, model, train_data, config: LoSiAConfig, arguments: TrainingArguments, steps: int) -> str:
    layers = [layer for _, layer in losia_layers(model)]
    values = sum(layer.subnet.numel() for layer in layers)
    total = model.num_parameters() - values
    tokens = sum(len(sample["input_ids"]) for sample in train_data)
    learned = sum(int((sample["labels"] != data.IGNORE).sum()) for sample in train_data)
    cycle = count_groups(model) * config.period
    period = f"period {config.period} steps" + ("" if options.period else f", the paper's is {PAPER_PERIOD}")
    return "\n".join([
        f"model  {options.model}: {total / 1e6:,.1f}M values, {model.dtype} on {arguments.device}",
        f"data   {options.data}: {len(train_data):,} {'packed rows' if options.packing else 'samples'}, "
        f"{tokens:,} tokens, {learned:,} learned",
        f"LoSiA  {len(layers)} layers in {count_groups(model)} groups, {values:,} trained values "
        f"({100 * values / total:.2f} %); {period}, {steps / cycle:.1f} cycles",
        f"run    {steps} steps of {options.batch_size} x {options.gradient_accumulation} samples, lr {options.lr:g} "
        f"{options.lr_scheduler}, {config.warmup_steps} steps of warm-up",
    ])


def _check_run(run: Path, options: FinetuneOptions) -> tuple[dict, Path | None]:
    """What ``run.json`` is to hold, and the checkpoint to go on from. Raises InputError if the folder forbids it.

    A resumed run must have the options and the data of the first.
    """
    record = {name: value for name, value in dataclasses.asdict(options).items() if name not in FREE_ON_RESUME}
    for name in ("data", "eval_data"):
        if record[name] is not None:
            record[f"{name}_sha256"] = _sha256(record[name])
    if not options.resume:
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise InputError(f"{run} exists and is not empty: name another output, or go on with --resume")
        return record, None
    if not (run / "run.json").exists():
        raise InputError(f"nothing to resume: {run} holds no run (no run.json)")
    first = json.loads((run / "run.json").read_text())
    changed = sorted(name for name in record | first if record.get(name) != first.get(name))
    if changed:
        was = ", ".join(f"{name} was {first.get(name)!r}, now {record.get(name)!r}" for name in changed)
        raise InputError(f"cannot resume {run} with other options: {was}")
    checkpoint = last_checkpoint(run / "checkpoints")
    print(f"resuming from {checkpoint}" if checkpoint else "no checkpoint yet: starting from the beginning")
    return record, checkpoint


def _sha256(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None

