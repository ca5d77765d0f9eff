"""LoSiA in transformers' Trainer and TRL's SFTTrainer: an optimizer factory and a callback; the
Trainer stays as it is.

    model = apply_losia(model, config)
    trainer = Trainer(
        model,
        args,
        train_dataset=...,
        optimizer_cls_and_kwargs=(LoSiAOptimizerFactory, {"lr": args.learning_rate}),
    )
    trainer.add_callback(LoSiACallback(trainer))

Checkpoints and ``resume_from_checkpoint`` are the Trainer's own: the subnets and their places are
in the model's state dict, everything else in the optimizer's.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch
from torch import nn
from torch.utils.data import IterableDataset
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK

from ..layers.module import SubnetModule
from ..layers.subnet import Subnet
from ..training.calibrate import calibrate, start_from_frequency
from ..training.optimizer import LoSiAAdamW
from ..training.selection import NonFiniteScoreError
from ..training.timeline import Timeline
from .history import Place, SubnetHistory, append_log, rewind_log

CALIBRATION_STEPS = 4
COUNTED_BATCHES = 64


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
    """Places the first subnets, tells the timeline the number of steps (``period="auto"``) and how
    ``trainer`` scales each loss, and reports what the subnets do.

    Calibration is on the Trainer's own loss, if the config's ``init_subnet`` is "calibrated"; with
    ``output_init="frequency"`` the labels of the first 64 batches are counted. Neither moves
    torch's random state. A resumed run, and one that a second ``train()`` continues, is left where
    it was. A run that ends before every group has moved once is warned about.

    Whatever ``args.report_to`` names (TensorBoard, ...) gets, with each of the Trainer's logs:
    ``losia/lr/<group>``, the group's learning rate with its rewarming; ``losia/observing``, the
    number of the group that observes (-1: none; with ``update_type="sync"`` 0 stands for all); and
    of the layers that have moved since the last log, averaged, ``losia/overlap`` and
    ``losia/captured`` (see ``history.Place``).

    Args:
        trainer: the one that the callback is added to.
        calibration_steps: batches before the first step.
        history: a file that gets every place of every subnet, for ``losia-kernels plot``.
        show_progress: a bar on stderr while it calibrates, which takes as long as that many steps
            that all observe.

    Raises:
        ValueError: when training begins with an optimizer that is neither LoSiAAdamW nor one
            ``attach`` was given, with gradients to clip that ``in_backward=True`` has spent, or
            with several GPUs in one process (DataParallel).
    """

    def __init__(
        self,
        trainer: Trainer,
        calibration_steps: int = CALIBRATION_STEPS,
        history: str | Path | None = None,
        show_progress: bool = False,
    ):
        self.trainer, self.calibration_steps = trainer, calibration_steps
        self.show_progress = show_progress
        self.history = None if history is None else Path(history)
        self._training_step = trainer.training_step
        trainer.training_step = self._set_divisor_and_train

    # before the first step ------------------------------------------------------------------------

    def on_train_begin(
        self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs
    ):
        timeline = losia_timeline(optimizer)
        if args.n_gpu > 1:
            raise ValueError(
                f"the Trainer would spread the batch over {args.n_gpu} GPUs by DataParallel, in which layers cannot "
                f"observe: start a process for each (torchrun, accelerate launch), or set CUDA_VISIBLE_DEVICES to one"
            )
        if (
            getattr(getattr(optimizer, "optimizer", optimizer), "in_backward", False)
            and args.max_grad_norm
        ):
            raise ValueError(
                f"max_grad_norm={args.max_grad_norm} would find nothing to clip: with in_backward=True the gradients "
                f"are spent before the step; set max_grad_norm=0"
            )
        # not so in a second train(), which keeps the optimizer
        begins = state.global_step == timeline.step == 0
        # a checkpoint without the optimizer's state has no period
        if begins or timeline.config.period == "auto":
            timeline.plan(state.max_steps)
        if begins and timeline.config.init_subnet == "calibrated":
            with _same_random_state(args.device):
                batches = _first_batches(train_dataloader, self.calibration_steps, args.device)
                # training checkpoints gradients
                self._calibrate(model.train(), batches, _loss_scale(optimizer))
        if begins and timeline.config.output_init == "frequency":
            with _same_random_state(args.device):
                start_from_frequency(
                    model, _first_batches(train_dataloader, COUNTED_BATCHES, args.device)
                )
        kinds = tuple(INTEGRATION_TO_CALLBACK.values())
        self._reporters = [
            each for each in self.trainer.callback_handler.callbacks if isinstance(each, kinds)
        ]
        self._moved: list[Place] = []
        if not state.is_world_process_zero:
            return
        if self.history and state.global_step == 0:
            SubnetHistory.begin(self.history, timeline)
        elif self.history:
            rewind_log(self.history, state.global_step)
        if (self.history or self._reporters) and self._note not in timeline.listeners:
            timeline.listeners.append(self._note)

    def _calibrate(self, model: nn.Module, batches: list[dict], scale: float) -> None:
        """``calibrate`` on the Trainer's loss with the largest scale, from ``scale`` down, that
        does not overflow."""

        def loss_fn(model: nn.Module, batch: dict) -> torch.Tensor:
            with self.trainer.compute_loss_context_manager():
                # which may take labels out
                return scale * self.trainer.compute_loss(model, dict(batch))

        show = self.show_progress and self.trainer.is_world_process_zero()
        shown = _with_bar(batches, "placing the first subnets", show)
        try:
            calibrate(model, shown, len(batches), loss_fn, loss_divisor=1 / scale)
        except NonFiniteScoreError:
            if scale <= 1:
                raise
            self._calibrate(model, batches, max(1.0, scale / 16))

    # how the loss is scaled -----------------------------------------------------------------------

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self._scale = _loss_scale(optimizer)  # once a step, which is as often as it changes

    def _set_divisor_and_train(self, model, inputs, num_items_in_batch=None):
        timeline = losia_timeline(self.trainer.optimizer)
        timeline.loss_divisor = self._divisor(inputs, num_items_in_batch, timeline) / self._scale
        return self._training_step(model, inputs, num_items_in_batch)

    def _divisor(self, inputs: dict, items: torch.Tensor | None, timeline: Timeline) -> float:
        """What the Trainer divides the mean loss of this micro-batch by.

        Its loss is a sum over the micro-batch divided by ``items``, the learned tokens of the whole
        accumulated batch, and so is its mean over the processes, of whose micro-batches both then
        count all tokens; for models that do not take ``num_items_in_batch`` it is the mean divided
        by the number of micro-batches.
        """
        if self.trainer.args.gradient_accumulation_steps == 1:
            return 1.0
        if items is None:
            return float(self.trainer.current_gradient_accumulation_steps)
        labels = inputs.get("shift_labels")
        if labels is None:
            shifts = getattr(self.trainer, "_loss_shifts_labels", True)
            labels = inputs["labels"][..., 1:] if shifts else inputs["labels"]
        return float(items) / max(1, timeline.ranks.total((labels != -100).sum()))

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
            f"the Trainer's optimizer is {type(inner).__name__}, which does not know the subnets: give the Trainer "
            f"optimizer_cls_and_kwargs=(LoSiAOptimizerFactory, {{'lr': ...}}), or attach(optimizer, model) and "
            f"optimizers=(optimizer, None)"
        )
    return timeline


def _loss_scale(optimizer: torch.optim.Optimizer) -> float:
    """What accelerate, whose wrapper ``optimizer`` is, multiplies losses with: 1, but in
    float16."""
    scaler = getattr(optimizer, "scaler", None)
    return 1.0 if scaler is None else scaler.get_scale()


def _same_random_state(device: torch.device) -> AbstractContextManager:
    """What is drawn inside is not missed outside: a resumed run, which does not look ahead, sees
    the same order."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _with_bar(batches: list[dict], doing: str, show: bool) -> Iterator[dict]:
    """The batches, each counted when it is done with, the last one too if no more is asked for."""
    with tqdm(total=len(batches), desc=doing, unit="batch", disable=not show) as bar:
        for batch in batches:
            try:
                yield batch
            finally:
                bar.update()


def _first_batches(dataloader, count: int, device: torch.device) -> list[dict]:
    """The first batches of an epoch, made beside the dataloader, whose own iteration is left for
    the training."""
    if isinstance(dataloader.dataset, IterableDataset):
        raise ValueError(
            "cannot calibrate from an iterable dataset: call losia_kernels.calibrate before the Trainer, and set "
            "init_subnet='random'"
        )
    batches = []
    for indices in islice(dataloader.batch_sampler, count):
        batch = dataloader.collate_fn([dataloader.dataset[i] for i in indices])
        batches.append(
            {
                key: value.to(device) if torch.is_tensor(value) else value
                for key, value in batch.items()
            }
        )
    return batches
