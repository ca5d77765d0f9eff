"""``finetune``: a causal language model and data in, a fine-tuned ``save_pretrained`` folder out;
``folder`` says what else is in the output folder."""

import os
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import broadcast_object_list
from huggingface_hub.utils import logging as hub_logging
from transformers import TrainerCallback
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import logging
from trl import SFTConfig

from .. import remove_losia
from ..checkpoint.checksums import write_sealed
from ..checkpoint.resumable import full_state_dict
from ..checkpoint.writing import locked, made
from ..integrations.transformers import LoSiACallback
from .card import best_step, check_push, model_card, push_to_hub
from .checkpoints import CheckpointCallback, Checkpoints, list_checkpoints, remove_checkpoint
from .checks import check_options
from .data import Data, check_rows, fingerprint, load_data
from .folder import check_resumes, open_run, save_model, versions, write_failure
from .hub import offline_if_unreachable
from .idle import warn_idle, warn_idle_in_run
from .model import (
    check_causal,
    check_data,
    check_packing,
    convert_model,
    end_where_samples_end,
    load_model,
    load_tokenizer,
    names_on_hub,
)
from .options import FinetuneOptions, InputError
from .progress import ProgressCallback
from .samples import SampleCallback
from .trainer import AllStepsTaken, FinetuneTrainer, NoStepTooMany, one_line, sft_config


@dataclass
class Run:
    """A run that nothing stands against: its model is converted, and nothing is written yet.

    ``record``: what ``run.json`` is to hold. ``found``: earlier checkpoints, the last of which it
    goes on from. ``use_cache``: of the model's config, which the Trainer turns off. ``held``: until
    it is closed the folder is this process's.
    """

    options: FinetuneOptions
    config: SFTConfig
    processes: PartialState
    record: dict
    found: Checkpoints
    model: Any
    use_cache: bool
    tokenizer: Any
    data: Data
    trainer: FinetuneTrainer
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
                begun = (run.folder / "run.json").exists()
                left = "what was there before is whole, --resume goes on from it"
                raise InputError(
                    f"cannot write {run.folder}: {problem}; {left if begun else 'nothing was begun'}"
                ) from None
    return Path(options.output) / "model"


def prepare(options: FinetuneOptions) -> Run | None:
    """Look at everything that may be wrong, the cheap first, and load and convert the model.

    None if the run in the output folder is finished. Raises InputError, having written nothing.
    """
    check_options(options)
    config = sft_config(options)
    _check_report_to(options.report_to)
    check_push(config)
    _be_quiet()
    processes = PartialState(cpu=not torch.accelerator.is_available())
    first = processes.is_main_process
    if not first:
        warnings.simplefilter("ignore")  # the first process says it for all
    warn_idle(options)
    if options.samples and processes.distributed_type == DistributedType.FSDP:
        raise InputError(
            "samples need the whole model on one process, of which FSDP leaves each a part"
        )
    with ExitStack() as held, ExitStack() as loading:
        record, found = _open(options, processes, held)
        folder = Path(options.output)
        if (folder / "model").exists():
            if first:
                print(f"{folder} is finished: the model is in {folder / 'model'}")
            return None
        if first and options.resume:
            _say_what_was_found(found)

        elsewhere = names_on_hub(options)
        if first and elsewhere:
            print(f"no files here, so from the hub: {', '.join(elsewhere)}", flush=True)
        if elsewhere:
            loading.enter_context(offline_if_unreachable())
        check_rows(options, config)
        tokenizer = load_tokenizer(options, config)
        data = load_data(options, config, tokenizer)
        record["tokens_sha256"] = fingerprint(data.train)
        record["eval_tokens_sha256"] = None if data.eval is None else fingerprint(data.eval)
        record["versions"] = versions()
        if options.resume:
            check_resumes(folder, record)
        steps = options.total_steps(len(data.train), processes.num_processes)
        warn_idle_in_run(options, data, steps, processes.num_processes)
        model = load_model(options, config)
        check_causal(model)
        check_data(model, data, tokenizer)
        packs = options.packing and config.packing_strategy != "wrapped"
        if packs or config.padding_free:
            check_packing(model)
        end_where_samples_end(model, data.ends)
        use_cache = model.config.use_cache
        convert_model(model, options, steps)
        return Run(
            options=options,
            config=config,
            processes=processes,
            record=record,
            found=found,
            model=model,
            use_cache=use_cache,
            tokenizer=tokenizer,
            data=data,
            trainer=_make_trainer(model, options, tokenizer, data, steps),
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
    elif found.reached:
        print(
            f"no checkpoint of the {found.reached} steps that were taken: starting from the beginning",
            flush=True,
        )
    else:
        print("no checkpoint yet: starting from the beginning", flush=True)


def _make_trainer(
    model, options: FinetuneOptions, tokenizer, data: Data, steps: int
) -> FinetuneTrainer:
    """The Trainer for a run of ``steps`` optimizer steps; it has written nothing yet."""
    config = sft_config(options, steps)
    if config.use_liger_kernel and not torch.accelerator.is_available():
        raise InputError("config: use_liger_kernel needs a GPU, and there is none here")
    if config.activation_offloading and not torch.accelerator.is_available():
        raise InputError("config: activation_offloading needs a GPU, and there is none here")
    # checkpoints are not for others, nor secrets for checkpoints: the finished model is pushed
    config.push_to_hub, config.hub_token = False, None
    try:
        return FinetuneTrainer(
            model,
            config,
            processing_class=tokenizer,
            train_dataset=data.train,
            eval_dataset=data.eval,
        )
    except (ValueError, ImportError) as error:  # fields of the config that exclude each other
        raise InputError(one_line(error)) from None


def train(run: Run, callbacks: tuple[TrainerCallback, ...] = ()) -> None:
    """Take the run's steps, from its checkpoint on, and leave their records in its folder."""
    options, folder, trainer = run.options, run.folder, run.trainer
    run.processes.wait_for_everyone()  # all have found the folder as it was
    completing = CheckpointCallback(run.tokenizer, run.use_cache, run.found)
    progress = ProgressCallback(folder, options, run.data.train)
    asking = SampleCallback(folder, run.data.single, options.samples, run.tokenizer)
    own: tuple[TrainerCallback, ...] = (completing,)  # first: a checkpoint waits for no picture
    if run.first:
        folder.mkdir(parents=True, exist_ok=True)
        write_sealed(folder / "run.json", run.record)
        own += (progress, asking) if options.samples else (progress,)
    for callback in (
        *own,
        *callbacks,
        LoSiACallback(
            trainer,
            history=folder / "subnets.jsonl",
            show_progress=True,
            total_steps=trainer.args.max_steps,
            moments=options.moments,
            in_backward=options.in_backward,
        ),
        NoStepTooMany(),
    ):
        trainer.add_callback(callback)
    last = run.found.last
    if last:  # which is no start
        trainer.args.eval_on_start = False
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    except AllStepsTaken:  # only the model was not written
        completing.settle(run.first)
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            trainer._load_best_model()
        if run.first:  # what comes after the last checkpoint may have been interrupted
            progress.draw()
            asking.complete(trainer.model, trainer.state.global_step)
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
        card = model_card(run.options, run.record, run.trainer)
        model = run.model if weights else remove_losia(run.model)
        save_model(model, run.tokenizer, output, weights, card, run.folder / "model.json")
        if best := best_step(run.trainer):
            print(
                f"the model is that of step {best}, the best by {run.trainer.args.metric_for_best_model}"
            )
        print(f"model in {output}, loss curve in {run.folder / 'loss_curve.png'}")
        try:
            push_to_hub(output, run.config)
        except Exception as error:  # of the network, or of the hub
            raise InputError(
                f"the model is whole in {output} and was not pushed: {one_line(error)}; "
                f"hf upload NAME {output} does it"
            ) from None
    run.processes.wait_for_everyone()


def _be_quiet() -> None:
    """Progress is said in lines of this command's own."""
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what fails is said by its exception
    hub_logging.set_verbosity_error()  # each of its attempts without a network


def _check_report_to(name: str) -> None:
    """Raises InputError for what the Trainer would not report to."""
    if name not in ("none", "all", *get_available_reporting_integrations()):
        raise InputError(
            f"report_to: {name} is not installed, or nothing that the Trainer reports to"
        )
