"""``finetune``: a causal language model and a JSONL file in, a fine-tuned ``save_pretrained``
folder out; ``folder`` says what else is in the output folder."""

import os
import pickle
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import logging

from .. import remove_losia
from ..checkpoint.checksums import write_sealed
from ..checkpoint.folder import INDEX, WEIGHTS, ModelFolder
from ..checkpoint.resumable import full_state_dict
from ..checkpoint.writing import locked, made
from ..integrations.transformers import LoSiACallback, LoSiAOptimizerFactory
from .checkpoints import CheckpointCallback, Checkpoints, list_checkpoints, remove_checkpoint
from .data import Collator, load_data, pad_token_id, read_jsonl
from .folder import (
    check_resumes,
    fingerprint,
    open_run,
    save_model,
    versions,
    write_failure,
)
from .model import check_lengths, check_packing, convert_model, load_model
from .options import FinetuneOptions, InputError
from .progress import ProgressCallback, draw_loss_curve
from .trainer import AllStepsTaken, FinetuneTrainer, NoStepTooMany, training_arguments


@dataclass
class Run:
    """A run that nothing stands against: its model is converted, and nothing is written yet.

    ``record``: what ``run.json`` is to hold. ``found``: earlier checkpoints, the last of which it
    goes on from. ``use_cache``: of the model's config, which the Trainer turns off. ``held``: until
    it is closed the folder is this process's.
    """

    options: FinetuneOptions
    processes: PartialState
    record: dict
    found: Checkpoints
    model: Any
    use_cache: bool
    tokenizer: Any
    train_data: list
    eval_data: list | None
    steps: int
    held: ExitStack = field(default_factory=ExitStack)

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
        InputError: for a mistake in the options or the data, another process in the folder, damage
            that leaves nothing to go on from, or a disk that takes no more.
        FloatingPointError: when the loss is no longer finite.
    """
    run = prepare(options)
    if run is not None:
        with run.held:
            try:
                train(run, callbacks)
                save(run)
            except Exception as error:
                problem = write_failure(error)
                if problem is None:
                    raise
                raise InputError(
                    f"cannot write {run.folder}: {problem}; what was there before is whole, --resume goes on from it"
                ) from None
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
    with ExitStack() as held:
        record, found = _open(options, processes, held)
        folder = Path(options.output)
        if (folder / "model").exists():
            if first:
                print(f"{folder} is finished: the model is in {folder / 'model'}")
            return None
        if first and options.resume:
            _say_what_was_found(found)

        for path in filter(None, (options.data, options.eval_data)):
            read_jsonl(path)  # a malformed line is an error before the model is loaded
        model, tokenizer = _load(options)
        train_data, eval_data = load_data(options, tokenizer)
        record["tokens_sha256"] = fingerprint(train_data)
        record["eval_tokens_sha256"] = eval_data and fingerprint(eval_data)
        record["versions"] = versions()
        if options.resume:
            check_resumes(folder, record)
        check_lengths(model, [*train_data, *(eval_data or [])])
        if options.packing:
            check_packing(model)
        steps = options.total_steps(len(train_data), processes.num_processes)
        convert_model(model, options, steps)
        return Run(
            options=options,
            processes=processes,
            record=record,
            found=found,
            model=model,
            use_cache=model.config.use_cache,
            tokenizer=tokenizer,
            train_data=train_data,
            eval_data=eval_data,
            steps=steps,
            held=held.pop_all(),
        )


def _open(
    options: FinetuneOptions, processes: PartialState, held: ExitStack
) -> tuple[dict, Checkpoints]:
    """``open_run`` by the first process, which then holds the folder; all get what it found."""
    outcome: list[Any] = [None]
    if processes.is_main_process:
        folder = Path(options.output)
        try:
            if folder.is_dir() or not (options.resume or os.path.lexists(folder)):
                held.enter_context(made(folder))
                held.enter_context(locked(folder.resolve()))
            outcome[0] = open_run(options, processes.num_processes)
        except ValueError as error:
            outcome[0] = InputError(str(error))
    if processes.num_processes > 1:
        broadcast_object_list(outcome)
    if isinstance(outcome[0], InputError):
        raise outcome[0]
    return outcome[0]


def _say_what_was_found(found: Checkpoints) -> None:
    for path, why in found.damaged.items():
        print(f"{path.name} does not count and will be set aside: {why}")
    for path in found.unfinished:
        print(f"{path.name} was not finished and will be removed")
    if found.last:
        print(f"resuming from {found.last}", flush=True)
    else:
        print("no checkpoint yet: starting from the beginning", flush=True)


def _load(options: FinetuneOptions) -> tuple[Any, Any]:
    """``load_model``, held to weights that can be read. Raises InputError naming the file."""
    folder = Path(options.model).expanduser()
    try:
        if any((folder / name).exists() for name in (WEIGHTS, INDEX)):
            ModelFolder(folder)  # reads the headers alone
        return load_model(options)
    except InputError:
        raise
    except (ValueError, OSError, RuntimeError, TypeError, AttributeError, EOFError) as error:
        problem = str(error).strip().partition("\n")[0]
    except pickle.UnpicklingError:
        problem = "its weights are damaged, or no file of torch.save"
    raise InputError(f"cannot load the model {options.model}: {problem}")


def train(run: Run, callbacks: tuple[TrainerCallback, ...] = ()) -> None:
    """Take the run's steps, from its checkpoint on, and leave their records in its folder."""
    options, folder = run.options, run.folder
    arguments = training_arguments(options, run.steps)
    run.processes.wait_for_everyone()  # all have found the folder as it was
    speaking = []
    if run.first:
        folder.mkdir(parents=True, exist_ok=True)
        write_sealed(folder / "run.json", run.record)
        speaking = [ProgressCallback(folder, options, run.train_data)]
    completing = CheckpointCallback(run.tokenizer, run.use_cache, run.found)
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
        callbacks=[*speaking, completing, *callbacks],
    )
    trainer.add_callback(
        LoSiACallback(trainer, history=folder / "subnets.jsonl", show_progress=True)
    )
    trainer.add_callback(NoStepTooMany())
    last = run.found.last
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    except AllStepsTaken:  # only the model was not written
        completing.settle(run.first)
        if run.first:  # it may have been interrupted while it was drawn
            draw_loss_curve(folder / "log.jsonl", folder / "loss_curve.png")
    except Exception as error:
        if last and not completing.loaded and write_failure(error) is None:
            problem = str(error).strip().partition("\n")[0]
            raise InputError(
                f"cannot go on from {last}: {type(error).__name__}: {problem:.200}; nothing was changed"
            ) from error
        if run.first and write_failure(error):  # a part of a checkpoint is of no use
            for path in list_checkpoints(folder / "checkpoints"):
                if path.name == f"checkpoint-{trainer.state.global_step}":
                    remove_checkpoint(path)
        raise


def save(run: Run) -> None:
    """Write the trained model as a plain one, whole."""
    run.model.config.use_cache = run.use_cache
    output = run.folder / "model"
    weights = full_state_dict(run.model) if run.processes.num_processes > 1 else None
    if run.first:
        save_model(
            run.model if weights else remove_losia(run.model),
            run.tokenizer,
            output,
            weights,
            run.folder / "model.json",
        )
        print(f"model in {output}, loss curve in {run.folder / 'loss_curve.png'}")
    run.processes.wait_for_everyone()


def _check_report_to(name: str) -> None:
    """Raises InputError for what the Trainer would not report to."""
    if name not in ("none", "all", *get_available_reporting_integrations()):
        raise InputError(
            f"report_to: {name} is not installed, or nothing that the Trainer reports to"
        )
