"""LoSiA in transformers' Trainer: an optimizer factory and a callback; the Trainer itself stays as it is.

    model = apply_losia(model, config)
    trainer = Trainer(
        model, args, train_dataset=..., callbacks=[LoSiACallback()],
        optimizer_cls_and_kwargs=(LoSiAOptimizerFactory, {"lr": args.learning_rate}),
    )

Checkpoints and ``resume_from_checkpoint`` are the Trainer's own: the subnets and their places are in the model's state
dict, everything else in the optimizer's.
"""

from itertools import islice

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from ..calibrate import calibrate, start_from_frequency
from ..optimizer import LoSiAAdamW
from ..timeline import Timeline

CALIBRATION_STEPS = 4
COUNTED_BATCHES = 64


class LoSiAOptimizerFactory:
    """What ``optimizer_cls_and_kwargs`` takes: the Trainer calls ``LoSiAOptimizerFactory()(model, **kwargs)``.

    ``kwargs`` are those of ``LoSiAAdamW``; ``model`` is one that ``apply_losia`` has converted.
    """

    def __call__(self, model: nn.Module, **kwargs) -> LoSiAAdamW:
        return LoSiAAdamW(model, **kwargs)


class LoSiACallback(TrainerCallback):
    """Places the initial subnets from the first batches, and tells the timeline how the Trainer scaled the loss.

    Calibration takes ``calibration_steps`` batches before the first step, if the config's ``init_subnet`` is
    "calibrated"; with ``output_init="frequency"`` the labels of the first 64 batches are counted. A resumed run is left
    where it was.
    """

    def __init__(self, calibration_steps: int = CALIBRATION_STEPS):
        self.calibration_steps = calibration_steps
        self._hook = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs):
        timeline = losia_timeline(optimizer)
        if state.global_step == 0 and timeline.config.init_subnet == "calibrated":
            batches = _first_batches(train_dataloader, self.calibration_steps, args.device)
            calibrate(model.train(), batches, self.calibration_steps)  # in training mode gradients are checkpointed
        if state.global_step == 0 and timeline.config.output_init == "frequency":
            start_from_frequency(model, _first_batches(train_dataloader, COUNTED_BATCHES, args.device))
        if args.gradient_accumulation_steps > 1:
            divisor = _LossDivisor(timeline, args.gradient_accumulation_steps)
            self._hook = model.register_forward_pre_hook(divisor, with_kwargs=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self._hook is not None:
            self._hook.remove()


def losia_timeline(optimizer: torch.optim.Optimizer) -> Timeline:
    """The timeline of the LoSiAAdamW that a callback is handed; accelerate wraps it."""
    return getattr(optimizer, "optimizer", optimizer).timeline


class _LossDivisor:
    """Before each micro-batch: what the Trainer is about to divide its mean loss by.

    The Trainer's loss is a sum over the micro-batch divided by the learned tokens of the whole accumulated batch, and
    so is its mean over the processes, of whose micro-batches both then count all tokens; for
    models that do not take ``num_items_in_batch`` it is the mean divided by the accumulation steps.
    """

    def __init__(self, timeline: Timeline, accumulation_steps: int):
        self.timeline, self.accumulation_steps = timeline, accumulation_steps

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not torch.is_grad_enabled():
            return
        items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
        if items is None or labels is None:
            self.timeline.loss_divisor = float(self.accumulation_steps)
        else:
            learned = self.timeline.ranks.total((labels[..., 1:] != -100).sum())
            self.timeline.loss_divisor = float(items) / max(1, learned)


def _first_batches(dataloader, count: int, device: torch.device) -> list[dict]:
    """The first batches of an epoch, made beside the dataloader, whose own iteration is left for the training."""
    if isinstance(dataloader.dataset, IterableDataset):
        raise ValueError(
            "cannot calibrate from an iterable dataset: call losia_kernels.calibrate before the Trainer, and set "
            "init_subnet='random'"
        )
    batches = []
    for indices in islice(dataloader.batch_sampler, count):
        batch = dataloader.collate_fn([dataloader.dataset[i] for i in indices])
        batches.append({key: value.to(device) for key, value in batch.items()})
    return batches
