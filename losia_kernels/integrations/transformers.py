"""LoSiA in transformers' Trainer, TRL's trainers and any other subclass: one callback; the Trainer
stays as it is.

    model = apply_losia(model, config)
    trainer = Trainer(model, args, train_dataset=...)
    trainer.add_callback(LoSiACallback(trainer))

Checkpoints and ``resume_from_checkpoint`` are the Trainer's own: the subnets and their places are
in the model's state dict, everything else in the optimizer's.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK

from ..layers.module import SubnetModule
from ..layers.subnet import Subnet
from ..parallel.placement import NO_DEEPSPEED
from ..training.calibrate import start_from_frequency
from ..training.optimizer import LoSiAAdamW
from ..training.timeline import Timeline
from .arguments import check_options, create_optimizer, warn_of_idle_arguments
from .aside import Scaling, calibrate_aside, find_scaling, same_random_state
from .following import sync_by_weights
from .history import Place, SubnetHistory, append_log, rewind_log

CALIBRATION_STEPS = 4
COUNTED_BATCHES = 64
# methods of the Trainer that the callback stands in for, by its own
STANDS_IN = {
    "compute_loss": "_compute_loss",
    "create_optimizer": "_create_optimizer",
    "get_batch_samples": "_get_batch_samples",
    "training_step": "_training_step",
}


class LoSiAOptimizerFactory:
    """What ``optimizer_cls_and_kwargs`` takes: the Trainer calls ``LoSiAOptimizerFactory()(model,
    **kwargs)``.

    Args:
        model: one that ``apply_losia`` has converted.
        kwargs: those of ``LoSiAAdamW``.
    """

    def __call__(self, model: nn.Module, **kwargs) -> LoSiAAdamW:
        return LoSiAAdamW(model, **kwargs)


class LoSiACallback(TrainerCallback):
    """Makes a Trainer train subnets, whichever it is: gives it the optimizer, places the first
    subnets, tells the timeline the number of steps (``period="auto"``) and how each loss is scaled,
    and reports what the subnets do.

    The optimizer is made when the Trainer makes its own, from the arguments that it has then
    (``learning_rate``, ``weight_decay``, ``adam_beta1``, ``adam_beta2``, ``adam_epsilon``), so that
    a hyperparameter search reaches it: a LoSiAAdamW if ``optim`` is torch's AdamW, else that
    optimizer, attached. One that the Trainer was given is attached if it does not drive the subnets
    yet.

    Calibration is by the Trainer's own training step on its first batches, if the config's
    ``init_subnet`` is "calibrated"; with ``output_init="frequency"`` the labels of the first 64
    batches are counted. Neither moves torch's random state nor the Trainer's metrics. A resumed
    run, and one that a second ``train()`` continues, is left where it was. A run that ends before
    every group has moved once is warned about.

    What an accumulated micro-batch's loss is divided by, which the importance must know, is found
    out by three backwards of the first one: no class of Trainer tells it reliably.

    Whatever ``args.report_to`` names (TensorBoard, ...) gets, with each of the Trainer's logs:
    ``losia/lr/<group>``, the group's learning rate with its rewarming; ``losia/observing``, the
    number of the group that observes (-1: none; with ``update_type="sync"`` 0 stands for all); and
    of the layers that have moved since the last log, averaged, ``losia/overlap`` and
    ``losia/captured`` (see ``history.Place``).

    Args:
        trainer: the one that the callback is added to; a second callback replaces the first.
        calibration_steps: batches before the first step.
        history: a file that gets every place of every subnet, for ``losia-kernels plot``.
        show_progress: a bar on stderr while it calibrates, which takes as long as that many steps
            that all observe.
        loss_divisor: what the mean loss of each micro-batch is divided by; None finds it out.
        options: of ``LoSiAAdamW``, such as ``moments="int8"``; they win over the Trainer's
            arguments.

    Raises:
        ValueError: the Trainer uses DeepSpeed; ``options`` are for another optimizer than it has;
            when training begins, gradients to clip or to accumulate that ``in_backward=True`` has
            spent, or several GPUs in one process (DataParallel).
    """

    def __init__(
        self,
        trainer: Trainer,
        calibration_steps: int = CALIBRATION_STEPS,
        history: str | Path | None = None,
        show_progress: bool = False,
        loss_divisor: float | None = None,
        **options: Any,
    ):
        if trainer.is_deepspeed_enabled:
            raise ValueError(f"LoSiACallback: {NO_DEEPSPEED}")
        if trainer.optimizer is not None:
            check_options(options, "optimizers=")
        elif trainer.optimizer_cls_and_kwargs is not None:
            check_options(options, "optimizer_cls_and_kwargs=")
        self.trainer, self.calibration_steps = trainer, calibration_steps
        self.show_progress = show_progress
        self.history = None if history is None else Path(history)
        self.loss_divisor, self.options = loss_divisor, options
        self._starting, self._ahead, self._scale = False, deque[Any](), 1.0
        self._scaling: Scaling | None = None
        for name, ours in STANDS_IN.items():
            before = getattr(vars(trainer).get(name), "__self__", None)
            if isinstance(before, LoSiACallback):
                delattr(trainer, name)
                if before in trainer.callback_handler.callbacks:
                    trainer.remove_callback(before)
            setattr(self, f"_trainers_{name}", getattr(trainer, name))
            setattr(trainer, name, getattr(self, ours))

    def _create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        create = self._trainers_create_optimizer
        return create_optimizer(self.trainer, create, model, LoSiAOptimizerFactory, self.options)

    # before the first step ------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        timeline = losia_timeline(optimizer)
        self._check(args, optimizer)
        warn_of_idle_arguments(args, getattr(optimizer, "optimizer", optimizer))
        # a checkpoint without the optimizer's state has no period
        if self._begins() or timeline.config.period == "auto":
            timeline.plan(state.max_steps)
        # before the first batch, which a run that was resumed at its end does not have
        if self.history and state.global_step and state.is_world_process_zero:
            rewind_log(self.history, state.global_step)
        self._starting, self._scaling = True, None
        sync_by_weights(self.trainer.callback_handler.callbacks)
        kinds = tuple(INTEGRATION_TO_CALLBACK.values())
        self._reporters = [
            each for each in self.trainer.callback_handler.callbacks if isinstance(each, kinds)
        ]
        self._moved: list[Place] = []

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._ahead.clear()  # of an epoch that was broken off

    def _check(self, args, optimizer: torch.optim.Optimizer) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                f"the Trainer would spread the batch over {args.n_gpu} GPUs by DataParallel, in which layers cannot "
                f"observe: start a process for each (torchrun, accelerate launch), or set CUDA_VISIBLE_DEVICES to one"
            )
        if not getattr(getattr(optimizer, "optimizer", optimizer), "in_backward", False):
            return
        if args.max_grad_norm:
            raise ValueError(
                f"max_grad_norm={args.max_grad_norm} would find nothing to clip: with in_backward=True the gradients "
                f"are spent before the step; set max_grad_norm=0"
            )
        if args.gradient_accumulation_steps > 1:
            raise ValueError(
                f"gradient_accumulation_steps={args.gradient_accumulation_steps}: with in_backward=True the gradients "
                f"of each micro-batch are spent before the next; set it to 1, or in_backward=False"
            )

    def _begins(self) -> bool:
        """Not so in a second train(), which keeps the optimizer."""
        timeline = losia_timeline(self.trainer.optimizer)
        return self.trainer.state.global_step == timeline.step == 0

    def _get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, *args, **kwargs):
        """The Trainer's next micro-batches; before the first of a run that begins, the first subnets
        are placed by them."""
        if self._starting:
            self._starting = False
            self._start(epoch_iterator)
        ahead = [self._ahead.popleft() for _ in range(min(num_batches, len(self._ahead)))]
        iterator = chain(ahead, epoch_iterator)
        batches, items = self._trainers_get_batch_samples(iterator, num_batches, *args, **kwargs)
        timeline = losia_timeline(self.trainer.optimizer)
        asks = self.loss_divisor is None and timeline.config.moves == "importance"
        if len(batches) > 1 and self._scaling is None and asks:
            ranks = timeline.ranks
            step, number = self._trainers_training_step, len(batches)
            self._scaling = find_scaling(self.trainer, step, batches[0], items, number, ranks)
        return batches, items

    def _start(self, epoch_iterator: Iterator) -> None:
        trainer, timeline = self.trainer, losia_timeline(self.trainer.optimizer)
        calibrated = timeline.config.init_subnet == "calibrated"
        counted = timeline.config.output_init == "frequency"
        if self._begins() and (calibrated or counted):
            seen = max(calibrated * self.calibration_steps, counted * COUNTED_BATCHES)
            self._ahead.extend(islice(epoch_iterator, seen))
            if calibrated:
                batches = list(islice(self._ahead, self.calibration_steps))
                scale = _loss_scale(trainer.optimizer)
                show = self.show_progress and trainer.is_world_process_zero()
                calibrate_aside(trainer, self._trainers_training_step, batches, scale, show)
            if counted:
                self._check_labels()
                with same_random_state(trainer.args.device):
                    start_from_frequency(trainer.model, self._ahead)
        if not trainer.state.is_world_process_zero:
            return
        if self.history and trainer.state.global_step == 0:
            SubnetHistory.begin(self.history, timeline)
        if (self.history or self._reporters) and self._note not in timeline.listeners:
            timeline.listeners.append(self._note)

    def _check_labels(self) -> None:
        if not all(isinstance(batch, Mapping) and "labels" in batch for batch in self._ahead):
            raise ValueError(
                f"output_init='frequency' counts labels, and the batches of {type(self.trainer).__name__} have none: "
                f"set output_init='random'"
            )

    # how the loss is scaled -----------------------------------------------------------------------

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self._scale = _loss_scale(optimizer)  # once a step, which is as often as it changes

    def _training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None):
        self._set_divisor(inputs)
        return self._trainers_training_step(model, inputs, num_items_in_batch)

    def _compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any):
        """Here the micro-batch is known: trainers that generate, or that keep several in what the
        dataloader gives, have prepared it."""
        if model.training and "labels" in inputs:
            self._set_divisor(inputs, kwargs.get("num_items_in_batch"))
        return self._trainers_compute_loss(model, inputs, *args, **kwargs)

    def _set_divisor(self, inputs: Any, items: Any = None) -> None:
        divisor = self.loss_divisor
        if divisor is None:
            alone = self.trainer.current_gradient_accumulation_steps == 1
            scaling = None if alone else self._scaling
            divisor = (scaling or Scaling()).divisor(self.trainer, inputs, items)
        losia_timeline(self.trainer.optimizer).loss_divisor = divisor / self._scale

    # what it did ----------------------------------------------------------------------------------

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        timeline = losia_timeline(optimizer)
        self._rates = {}
        # LoSiAAdamW's groups first; attach numbers them
        for position, options in enumerate(optimizer.param_groups):
            group = options.get("layer_group", position)
            if group is not None and group < len(timeline.group_names):
                self._rates[f"losia/lr/{timeline.group_names[group]}"] = options[
                    "lr"
                ] * timeline.lr_factor(group)
        self._observing = min(timeline.observing, default=-1)

    def _note(self, layer: SubnetModule, subnet: Subnet) -> None:
        self._moved.append(Place.after(layer, subnet, self.trainer.state.global_step + 1))

    def on_step_end(self, args, state, control, **kwargs):
        if self.history:
            new = [place for place in self._moved if place.step == state.global_step]
            if new:  # of other processes nothing is
                append_log(self.history, [place.to_json() for place in new])
        if not self._reporters:
            self._moved.clear()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or not self._reporters:
            return
        values = {**self._rates, "losia/observing": self._observing}
        for name in ("overlap", "captured"):
            known = [
                getattr(place, name) for place in self._moved if getattr(place, name) is not None
            ]
            if known:
                values[f"losia/{name}"] = fmean(known)
        self._moved.clear()
        for reporter in self._reporters:
            reporter.on_log(args, state, control, logs=values, **kwargs)


def losia_timeline(optimizer: torch.optim.Optimizer) -> Timeline:
    """The timeline of the optimizer that a callback is handed; accelerate wraps it. ValueError for
    one without."""
    inner = getattr(optimizer, "optimizer", optimizer)
    timeline = getattr(inner, "timeline", None)
    if not isinstance(timeline, Timeline):
        raise ValueError(
            f"the Trainer's optimizer is {type(inner).__name__}, which does not know the subnets: before the optimizer "
            f"is made, trainer.add_callback(LoSiACallback(trainer)); of one made by hand, attach(optimizer, model)"
        )
    return timeline


def _loss_scale(optimizer: torch.optim.Optimizer) -> float:
    """What accelerate, whose wrapper ``optimizer`` is, multiplies losses with: 1, but in
    float16."""
    scaler = getattr(optimizer, "scaler", None)
    return 1.0 if scaler is None else scaler.get_scale()
