"""The timeline of a run (Section 3.3): a clock, who observes, and the relocalization after a slot's
last update."""

import warnings
import weakref
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from itertools import chain, product
from numbers import Integral
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import LoSiAConfig
from ..layers.linear import LoSiALinear, losia_layers
from ..layers.subnet import Subnet
from ..parallel.placement import check_shards, move_subnets_, uses_fully_shard
from ..parallel.ranks import (
    Ranks,
    RanksDifferError,
    Rows,
    fingerprint,
    is_sharded,
    refuse_engines,
    refuse_join,
)
from .checks import check_gradients
from .importance import ALL, Observer, make_observer, new_subnet
from .schedule import Schedule, auto_period
from .selection import NonFiniteScoreError

UNSETTLED = (
    "LoSiAConfig.period is 'auto', and nothing has said how many optimizer steps the run has: give LoSiAAdamW or "
    "attach total_steps=..., the Trainer a LoSiACallback, or call timeline.plan(total_steps)"
)

SELECTING = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "rank_pattern",
)  # fields of the config
_DRIVERS: "weakref.WeakKeyDictionary[LoSiALinear, Any]" = (
    weakref.WeakKeyDictionary()
)  # weak references to timelines


class Timeline:
    """Drives the LoSiALinears of one model beside an optimizer; ``LoSiAAdamW`` and ``attach`` each
    hold one.

    Attributes: step: optimizer steps taken; one step is one step of the clock, however many
        micro-batches it had. groups: the layers of each group, by group number, in model order;
        ``group_names`` names them. dense: layers that are trained in full, without a slot (an
        output layer with ``output_dim_factor=1``). loss_divisor: what each micro-batch's mean loss
        was divided by before its backward (accumulation steps; 1/scale
            under a GradScaler, whose overflows are then left out). The importance is not linear in
            the gradient and must know (Eq. 3).
        listeners: called with ``(layer, subnet)`` just before a layer is relocalized to that
        subnet. auto: whether the config said ``period="auto"``; ``config`` says what it has become.
        observers: of the layers that observe. ``handles``: hooks on the optimizer that ``detach``
        takes off. drives: until ``detach``, or until another optimizer is made for the model, which
        detaches this one.

    ``total_steps``: see ``plan``. ``process_group``: the processes that hold replicas of the model,
    by default its DistributedDataParallel's or all; RanksDifferError if they do not start alike.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int | None = None,
        process_group: "dist.ProcessGroup | None" = None,
    ):
        layers = [layer for _, layer in losia_layers(model) if hasattr(layer, "losia")]
        if not layers:
            raise ValueError(
                "the model has no layers to train: call apply_losia(model, config) first"
            )
        self.config: LoSiAConfig = layers[0].losia.config
        _check_alike(layers)
        self.dense = [layer for layer in layers if layer.losia.group is None]
        named = {
            layer.losia.group: layer.losia.group_name
            for layer in layers
            if layer.losia.group is not None
        }
        self.group_names = [named[number] for number in sorted(named)]
        self.groups = [
            [layer for layer in layers if layer.losia.group == number] for number in sorted(named)
        ]
        self.step = 0
        if total_steps is not None:
            check_steps(total_steps)
        self._model = model
        self._sharded: bool | None = None
        refuse_engines(model)
        self.ranks = Ranks.of(model, process_group)
        self._check_start(model)
        refuse_join(model)
        self.loss_divisor = 1.0
        self._first = True
        self.listeners: list[Callable[[LoSiALinear, Subnet], None]] = []
        self.observers: dict[LoSiALinear, Observer] = {}
        self.handles: list[Any] = []
        self.drives = True
        for layer in layers:
            before = _DRIVERS.get(layer, lambda: None)()
            if before is not None:
                before.detach()
            _DRIVERS[layer] = weakref.ref(self)
        self._schedule: Schedule | None = None
        self.auto = self.config.period == "auto"
        if self.config.period != "auto":
            self.settle_period(self.config.period)
        if total_steps is not None:
            self.plan(total_steps)

    def plan(self, total_steps: int) -> None:
        """Tell a run that begins how many optimizer steps it has: settles ``period="auto"``, and
        warns if the run ends before every group has had its turn.

        Raises ValueError if ``total_steps`` is no whole number of at least 1.
        """
        check_steps(total_steps)
        if self.auto and (self._schedule is None or self.step == 0):
            period = auto_period(int(total_steps), len(self.groups))
            self.ranks.check_same({"LoSiAConfig.period": period}, {})
            self.settle_period(period)
        problem = self.schedule.too_short(int(total_steps))
        if problem:
            warnings.warn(f"LoSiA: {problem}", stacklevel=4)

    def settle_period(self, period: int) -> None:
        """From here on ``config.period`` and ``schedule`` say it, and whose turn it is observes."""
        self.config, self._schedule = replace(self.config, period=period), self.schedule_of(period)
        self._observe()

    def schedule_of(self, period: int) -> Schedule:
        """The schedule with that T, whatever is settled."""
        return Schedule(
            groups=len(self.groups),
            period=period,
            update_type=self.config.update_type,
            warmup_steps=self.config.warmup_steps,
            rewarm=self.config.rewarm,
            last_step_only=self.config.importance == "gradient",
        )

    @property
    def schedule(self) -> Schedule:
        """Raises RuntimeError as long as ``period="auto"`` waits for the number of steps."""
        if self._schedule is None:
            raise RuntimeError(UNSETTLED)
        return self._schedule

    @property
    def observing(self) -> tuple[int, ...]:
        """Numbers of the groups that observe in the step now beginning."""
        return self.schedule.observing(self.step)

    def lr_factor(self, group: int) -> float:
        """What this step multiplies the group's learning rate with (Eq. 8)."""
        return self.schedule.lr_factor(group, self.step)

    def advance(self, optimizer: torch.optim.Optimizer) -> None:
        """End the step, after its update: relocalize the groups whose slot ends, then set up the
        next step.

        Raises NonFiniteScoreError naming the layer if a score is not finite: no layer has moved
        then, and the clock goes on, so that what is saved afterwards is whole.
        """
        moving = [
            layer for group in self.schedule.moving(self.step) for layer in self.groups[group]
        ]
        if moving and self.config.importance_sync == "slot":
            self._sum_importance(moving)
        self._warn_of_unobserved()
        try:
            found = [
                (layer, new_subnet(layer, self.observers[layer], self.rows_of(layer)))
                for layer in moving
            ]
        except NonFiniteScoreError:
            self._next_step(freed=moving)
            raise
        moves = [(layer, subnet) for layer, subnet in found if subnet is not None]
        for listener, move in product(self.listeners, moves):
            listener(*move)
        if self.sharded:
            move_subnets_(moves, self.ranks)
        for layer, subnet in moves:
            if not self.sharded:
                layer.move_subnet_(subnet)
            _reset_state(optimizer, layer.subnet, self.config.reset_step)
        if moving:
            self.check_position(moving)
        self._next_step(freed=moving)

    def _warn_of_unobserved(self) -> None:
        """Gradients without a backward that autograd has run show themselves by this alone: nothing
        would ever move."""
        for group in self.schedule.moving(self.step):
            layers = self.groups[group]
            if any(layer.subnet.grad is not None for layer in layers) and not any(
                self.observers[layer].tensors for layer in layers
            ):
                warnings.warn(
                    f"LoSiA: {self.group_names[group]} got gradients, but no backward has observed it in its slot, and "
                    f"its subnets stay where they are. A replayed CUDA graph observes what it did when it was "
                    f"captured: capture it anew whenever timeline.observing changes, and call step() outside of it",
                    stacklevel=4,
                )

    def _next_step(self, freed: list[LoSiALinear]) -> None:
        for layer in freed:
            self._stop(layer)
        self.step += 1
        self._observe()

    def _observe(self) -> None:
        """Let exactly the layers whose turn it is observe, once it is known; those that do already
        go on."""
        if self._schedule is None:
            return
        due = [
            layer for group in self.observing for layer in self.groups[group]
        ]  # in the same order on every rank
        for layer in [layer for layer in self.observers if layer not in due]:
            self._stop(layer)
        for layer in due:
            if layer not in self.observers:
                self._start(layer, make_observer(self.config))

    def _start(self, layer: LoSiALinear, observer: Observer) -> None:
        self.observers[layer] = observer
        layer.observe_(lambda grad, outputs=ALL: self._observed(layer, observer, grad, outputs))

    def _observed(
        self, layer: LoSiALinear, observer: Observer, grad: Tensor, outputs: slice
    ) -> None:
        rows, weight = self.rows_of(layer), layer.matrix
        if rows is not None:
            weight, grad = rows.of(weight), rows.scatter_mean(grad)
        elif self.config.importance_sync == "gradient":
            grad = self.ranks.mean_(grad)
        if rows is None and self.loss_divisor < 1 and not bool(torch.isfinite(grad).all()):
            return  # a GradScaler's overflow: it will skip this step, which is then taken anew
        observer.update(weight, grad, self.loss_divisor, rows, outputs)

    def _stop(self, layer: LoSiALinear) -> None:
        del self.observers[layer]
        layer.observe_(None)

    def resume_at(self, step: int) -> None:
        """Set the clock; whose turn it is begins to observe anew. Raises RuntimeError while
        ``period="auto"`` waits for the number of steps.

        To be called before ``optimizer.state_dict()`` is asked which tensors to load, as
        accelerate's and torch's loading of sharded checkpoints does: the layers that observe differ
        from step to step.
        """
        if step and self._schedule is None:
            raise RuntimeError(UNSETTLED)
        for layer in list(self.observers):
            self._stop(layer)
        self.step = step
        self._observe()

    def detach(self) -> None:
        """Take the hooks off the optimizer and stop observing; subnets and weights stay as they
        are."""
        self.drives = False
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        for layer in list(self.observers):
            self._stop(layer)

    # several processes ----------------------------------------------------------------------------

    @property
    def sharded(self) -> bool:
        """Whether the layers are in shards. Looked up anew until the first step: accelerate makes
        the optimizer first, asks for its state, and then makes the shards."""
        if self._sharded is not None:
            return self._sharded
        sharded = self.ranks.group is not None and uses_fully_shard(self._model)
        if sharded and self.config.importance_sync != "gradient":
            raise ValueError(
                "importance_sync='slot' needs whole weights on each rank: fully_shard needs 'gradient'"
            )
        if sharded or not self._first:
            self._sharded = sharded
        return sharded

    def check_parameters(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise RuntimeError if the timeline was detached, or the optimizer would step parameters
        that the model no longer has."""
        if not self.drives:
            raise RuntimeError(
                f"this {type(optimizer).__name__} no longer drives the subnets: another optimizer was "
                f"made for the model, or its timeline was detached; step the newest, or make a new one"
            )
        held, sharded = {id(parameter) for parameter in parameters_of(optimizer)}, self.sharded
        for layer in chain.from_iterable([*self.groups, self.dense]):
            if layer.subnet.grad is not None and not hasattr(layer, "losia"):
                raise RuntimeError(
                    f"{layer.name}: its subnet has a gradient, but its adapter is not in the weight: "
                    f"step before another adapter is activated, or this one disabled"
                )
            if id(layer.subnet) not in held:
                raise RuntimeError(
                    f"{layer.name}: the optimizer holds another subnet than the model; make the optimizer after "
                    f"fully_shard or whatever else exchanges parameters (DeepSpeed is not supported: use FSDP2 or DDP)"
                )
            if sharded:
                check_shards(layer, self.ranks)

    def check_gradients(self, updated: Collection[LoSiALinear] = ()) -> None:
        """In the first step alone: warn of subnets without a gradient, or RuntimeError
        (``first_step``).

        ``updated``: layers whose gradient was used and freed inside the backward.
        """
        if self._first:
            self._first = False
            check_gradients([*chain.from_iterable(self.groups), *self.dense], updated)

    def rows_of(self, layer: LoSiALinear) -> Rows | None:
        """This rank's part of a sharded layer's outputs; None of a whole layer."""
        return Rows(self.ranks, layer.out_features) if self.sharded else None

    def _sum_importance(self, moving: list[LoSiALinear]) -> None:
        observers = [self.observers[layer] for layer in moving]
        seen = self.ranks.any([bool(observer.tensors) for observer in observers])
        for layer, observer, anywhere in zip(moving, observers, seen, strict=True):
            if anywhere and not observer.tensors:  # used on other ranks only
                observer.update(layer.matrix, torch.zeros_like(layer.matrix), 1.0)
        self.ranks.sum_([tensor for observer in observers for tensor in observer.tensors.values()])

    def _check_start(self, model: nn.Module) -> None:
        if self.ranks.size == 1:
            return
        config = {f"LoSiAConfig.{name}": value for name, value in asdict(self.config).items()}
        weights = {name: fingerprint(parameter) for name, parameter in model.named_parameters()}
        converted = {f"{name}.weight": layer.fingerprint for name, layer in losia_layers(model)}
        sharded = {
            f"{name}.weight" for name, layer in losia_layers(model) if is_sharded(layer.weight)
        }
        self.ranks.check_same(config, weights | {name: converted[name] for name in sharded})
        try:
            self.ranks.check_same({}, converted)
        except RanksDifferError as error:
            warnings.warn(
                f"LoSiA: as apply_losia found them, {error}; now they are the same", stacklevel=4
            )
        self.check_position([layer for layers in [*self.groups, self.dense] for layer in layers])

    def check_position(self, layers: list[LoSiALinear]) -> None:
        """Every rank is at the same step with the same subnets."""
        if self.ranks.size > 1:
            subnets = {
                f"{layer.name}: {key}": fingerprint(getattr(layer, key))
                for layer in layers
                for key in ("out_idx", "in_idx")
            }
            self.ranks.check_same({"the step": self.step}, subnets)


def check_steps(total_steps: Any) -> None:
    if not isinstance(total_steps, Integral) or total_steps < 1:
        raise ValueError(
            f"total_steps must be a whole number of optimizer steps, at least 1, got {total_steps!r}"
        )


def _check_alike(layers: list[LoSiALinear]) -> None:
    """Raise ValueError for layers of several configs, which differ in more than which layers they
    select."""
    configs = [
        {k: v for k, v in asdict(layer.losia.config).items() if k not in SELECTING}
        for layer in layers
    ]
    names = {layer.losia.group: layer.losia.group_name for layer in layers}
    for layer, config in zip(layers, configs, strict=True):
        if config != configs[0] or layer.losia.group_name != names[layer.losia.group]:
            raise ValueError(
                f"{layers[0].name} and {layer.name} were converted apart, with configs or groups that do "
                f"not go together; one optimizer drives one config: convert the whole model at once"
            )


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """In the order of ``state_dict()["param_groups"]``."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _reset_state(optimizer: torch.optim.Optimizer, subnet: Tensor, reset_step: bool) -> None:
    """Forget the moments of the old subnet; with ``reset_step`` everything, so that the step count
    restarts too.

    Raises ValueError, naming the optimizer, for moments that zeros do not stand for: quantized
    ones.
    """
    if reset_step:
        optimizer.state.pop(subnet, None)
        return
    moments = {
        k: v
        for k, v in optimizer.state.get(subnet, {}).items()
        if k != "step" and isinstance(v, Tensor)
    }
    for key, value in moments.items():  # also those of another shape, as Adafactor's
        quantized = (
            type(value) is not Tensor and not is_sharded(value) or not value.is_floating_point()
        )
        if quantized and not getattr(optimizer, "zeros_forget", False):
            raise ValueError(
                f"{type(optimizer).__name__} keeps {key} quantized, which cannot be zeroed alone: "
                f"reset_step=False needs another optimizer"
            )
        value.zero_()
