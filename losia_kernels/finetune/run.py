"""``finetune``: a causal language model and a JSONL file in, a fine-tuned ``save_pretrained``
folder out; ``folder`` says what else is in the output folder."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import logging

from .. import remove_losia
from ..checkpoint.folder import write_json
from ..checkpoint.resumable import full_state_dict
from ..integrations.transformers import LoSiACallback, LoSiAOptimizerFactory
from .data import Collator, load_data, pad_token_id, read_jsonl
from .folder import CheckpointCallback, open_run, save_model
from .model import check_lengths, check_packing, convert_model, load_model
from .options import FinetuneOptions, InputError
from .progress import ProgressCallback
from .trainer import AllStepsTaken, FinetuneTrainer, NoStepTooMany, training_arguments


@dataclass
class Run:
    """A run that nothing stands against: its model is converted, and nothing is written yet.

    ``record``: what ``run.json`` is to hold. ``checkpoint``: the one to go on from. ``use_cache``:
    of the model's config, which the Trainer turns off.
    """

    options: FinetuneOptions
    processes: PartialState
    record: dict
    checkpoint: Path | None
    model: Any
    use_cache: bool
    tokenizer: Any
    train_data: list
    eval_data: list | None
    steps: int

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
    _check_report_to(options.report_to)
    logging.disable_progress_bar()
    processes = PartialState(cpu=not torch.cuda.is_available())
    first = processes.is_main_process
    if not first:
        warnings.simplefilter("ignore")  # the first process says it for all
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

    for path in filter(None, (options.data, options.eval_data)):
        read_jsonl(path)  # a malformed line is an error before the model is loaded
    model, tokenizer = load_model(options)
    train_data, eval_data = load_data(options, tokenizer)
    check_lengths(model, [*train_data, *(eval_data or [])])
    if options.packing:
        check_packing(model)
    steps = options.total_steps(len(train_data), processes.num_processes)
    convert_model(model, options, steps)
    return Run(
        options=options,
        processes=processes,
        record=record,
        checkpoint=checkpoint,
        model=model,
        use_cache=model.config.use_cache,
        tokenizer=tokenizer,
        train_data=train_data,
        eval_data=eval_data,
        steps=steps,
    )


def train(run: Run, callbacks: tuple[TrainerCallback, ...] = ()) -> None:
    """Take the run's steps, from its checkpoint on, and leave their records in its folder."""
    options, folder = run.options, run.folder
    arguments = training_arguments(options, run.steps)
    run.processes.wait_for_everyone()  # all have found the folder as it was
    speaking = []
    if run.first:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "run.json", run.record)
        speaking = [ProgressCallback(folder, options, run.train_data)]
    trainer = FinetuneTrainer(
        run.model,
        arguments,
        data_collator=Collator(pad_token_id(run.tokenizer)),
        train_dataset=run.train_data,
        eval_dataset=run.eval_data,
        optimizer_cls_and_kwargs=(
            LoSiAOptimizerFactory,
            {
                "lr": options.lr,
                "weight_decay": options.weight_decay,
                "total_steps": run.steps,
                "moments": options.moments,
                "in_backward": options.in_backward,
            },
        ),
        callbacks=[*speaking, CheckpointCallback(run.tokenizer, run.use_cache), *callbacks],
    )
    trainer.add_callback(
        LoSiACallback(trainer, history=folder / "subnets.jsonl", show_progress=True)
    )
    trainer.add_callback(NoStepTooMany())
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
        save_model(
            run.model if weights else remove_losia(run.model), run.tokenizer, output, weights
        )
        print(f"model in {output}, loss curve in {run.folder / 'loss_curve.png'}")
    run.processes.wait_for_everyone()


def _check_report_to(name: str) -> None:
    """Raises InputError for what the Trainer would not report to."""
    if name not in ("none", "all", *get_available_reporting_integrations()):
        raise InputError(
            f"report_to: {name} is not installed, or nothing that the Trainer reports to"
        )
