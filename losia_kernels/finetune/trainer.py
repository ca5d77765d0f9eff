"""transformers' Trainer as a run needs it, and the arguments that it gets."""

from pathlib import Path

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from ..integrations.transformers import losia_timeline
from .data import EpochLengthGroupedSampler
from .options import FinetuneOptions


class FinetuneTrainer(Trainer):
    """The Trainer, quiet, on one device, and with length groups whose order a resumed run finds
    again."""

    def __init__(self, model, args: TrainingArguments, **kwargs):
        # with more than one, the Trainer would wrap the model in DataParallel
        args._n_gpu = min(args.n_gpu, 1)
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
        return EpochLengthGroupedSampler(batch, lengths, self.args.seed)

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


def training_arguments(options: FinetuneOptions, steps: int) -> TrainingArguments:
    """The Trainer's arguments for a run of ``steps`` optimizer steps."""
    checkpointing = "activation_checkpointing"
    if checkpointing not in TrainingArguments.__dataclass_fields__:
        checkpointing = "gradient_checkpointing"  # its name before transformers 5.20
    return TrainingArguments(
        output_dir=str(Path(options.output) / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        lr_scheduler_type=options.lr_scheduler,
        warmup_steps=options.warmup_steps(steps),
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
