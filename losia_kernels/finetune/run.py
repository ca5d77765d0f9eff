"""``finetune``: a causal language model and data in, a fine-tuned ``save_pretrained`` folder out;
``folder`` says what else is in the output folder."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import DistributedType, PartialState
from transformers import TrainerCallback
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import logging
from trl import SFTConfig

from .. import remove_losia
from ..checkpoint.folder import write_json
from ..checkpoint.resumable import full_state_dict
from ..integrations.transformers import LoSiACallback, LoSiAOptimizerFactory
from .card import check_push, model_card, push_to_hub
from .data import Data, check_rows, fingerprint, load_data
from .folder import CheckpointCallback, open_run, save_model
from .model import (
    check_data,
    check_packing,
    convert_model,
    end_where_samples_end,
    load_model,
    load_tokenizer,
)
from .options import FinetuneOptions, InputError
from .progress import ProgressCallback
from .samples import SampleCallback
from .trainer import AllStepsTaken, FinetuneTrainer, NoStepTooMany, sft_config


@dataclass
class Run:
    """A run that nothing stands against: its model is converted, and nothing is written yet.

    ``record``: what ``run.json`` is to hold. ``checkpoint``: the one to go on from. ``use_cache``:
    of the model's config, which the Trainer turns off.
    """

    options: FinetuneOptions
    config: SFTConfig
    processes: PartialState
    record: dict
    checkpoint: Path | None
    model: Any
    use_cache: bool
    tokenizer: Any
    data: Data
    trainer: FinetuneTrainer

    @property
    def folder(self) -> Path:
        """Where everything is left."""
        return Path(self.options.output)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.processes.is_main_process


def finetune(options: FinetuneOptions, callbacks: tuple[TrainerCallback, ...] = ()) -> Path:
    """Fine-tune a causal language model; under torchrun or ``accelerate launch`` every process calls
    this.

    Args:
        options: the model, the data, the output folder, and how to train.
        callbacks: the Trainer gets these too.

    Returns:
        The folder of the finished model, an ordinary ``save_pretrained`` one.

    Raises:
        InputError: for a mistake in the options or the data.
        FloatingPointError: when the loss is no longer finite.
    """
    run = prepare(options)
    if run is not None:
        train(run, callbacks)
        save(run)
    return Path(options.output) / "model"


def prepare(options: FinetuneOptions) -> Run | None:
    """Look at everything that may be wrong, the cheap first, and load and convert the model.

    None if the run in the output folder is finished. Raises InputError, having written nothing.
    """
    options.check()
    config = sft_config(options)
    _check_report_to(options.report_to)
    check_push(config)
    _be_quiet()
    processes = PartialState(cpu=not torch.accelerator.is_available())
    first = processes.is_main_process
    if not first:
        warnings.simplefilter("ignore")  # the first process says it for all
    if options.samples and processes.distributed_type == DistributedType.FSDP:
        raise InputError(
            "samples need the whole model on one process, of which FSDP leaves each a part"
        )
    folder = Path(options.output)
    with processes.main_process_first():  # who resumes removes checkpoints that were interrupted
        record, checkpoint = open_run(options, processes.num_processes)
        finished = (folder / "model").exists()
    if first and checkpoint:
        print(f"resuming from {checkpoint}")
    elif first and options.resume:
        print("no checkpoint yet: starting from the beginning")
    if finished:
        if first:
            print(f"{folder} is finished: the model is in {folder / 'model'}")
        return None

    check_rows(options, config)
    tokenizer = load_tokenizer(options, config)
    data = load_data(options, config, tokenizer)
    model = load_model(options, config)
    check_data(model, data, tokenizer)
    if options.packing and config.packing_strategy != "wrapped":
        check_packing(model)
    end_where_samples_end(model, data.ends)
    use_cache = model.config.use_cache
    steps = options.total_steps(len(data.train), processes.num_processes)
    convert_model(model, options, steps)
    return Run(
        options=options,
        config=config,
        processes=processes,
        record=record,
        checkpoint=checkpoint,
        model=model,
        use_cache=use_cache,
        tokenizer=tokenizer,
        data=data,
        trainer=_make_trainer(model, options, tokenizer, data, steps),
    )


def _make_trainer(
    model, options: FinetuneOptions, tokenizer, data: Data, steps: int
) -> FinetuneTrainer:
    """The Trainer for a run of ``steps`` optimizer steps; it has written nothing yet."""
    optimizer = {
        "lr": options.lr,
        "weight_decay": options.weight_decay,
        "total_steps": steps,
        "moments": options.moments,
        "in_backward": options.in_backward,
    }
    config = sft_config(options, steps)
    config.push_to_hub = False  # checkpoints are not for others: the finished model is pushed
    try:
        return FinetuneTrainer(
            model,
            config,
            processing_class=tokenizer,
            train_dataset=data.train,
            eval_dataset=data.eval,
            optimizer_cls_and_kwargs=(LoSiAOptimizerFactory, optimizer),
        )
    except (ValueError, ImportError) as error:  # fields of the config that exclude each other
        raise InputError(str(error).strip().splitlines()[0]) from None


def train(run: Run, callbacks: tuple[TrainerCallback, ...] = ()) -> None:
    """Take the run's steps, from its checkpoint on, and leave their records in its folder."""
    options, folder, trainer = run.options, run.folder, run.trainer
    run.processes.wait_for_everyone()  # all have found the folder as it was
    callbacks = (CheckpointCallback(run.tokenizer, run.use_cache), *callbacks)
    if run.first:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "run.json", run.record)
        callbacks = (ProgressCallback(folder, options, run.data.train), *callbacks)
    if run.first and options.samples:
        shown = run.data.eval or run.data.train
        callbacks += (SampleCallback(folder, shown, options.samples, run.tokenizer),)
    for callback in (
        *callbacks,
        LoSiACallback(trainer, history=folder / "subnets.jsonl"),
        NoStepTooMany(),
    ):
        trainer.add_callback(callback)
    try:
        trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    except AllStepsTaken:  # only the model was not written
        pass


def save(run: Run) -> None:
    """Write the trained model as a plain one, whole."""
    run.model.config.use_cache = run.use_cache
    output = run.folder / "model"
    weights = full_state_dict(run.model) if run.processes.num_processes > 1 else None
    if run.first:
        card = model_card(
            run.options, run.record, fingerprint(run.data.train, run.data.eval), run.trainer
        )
        model = run.model if weights else remove_losia(run.model)
        save_model(model, run.tokenizer, output, weights, card)
        print(f"model in {output}, loss curve in {run.folder / 'loss_curve.png'}")
        push_to_hub(output, run.config)
    run.processes.wait_for_everyone()


def _be_quiet() -> None:
    """Progress is said in lines of this command's own."""
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()


def _check_report_to(name: str) -> None:
    """Raises InputError for what the Trainer would not report to."""
    if name not in ("none", "all", *get_available_reporting_integrations()):
        raise InputError(
            f"report_to: {name} is not installed, or nothing that the Trainer reports to"
        )
