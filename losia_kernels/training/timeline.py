"""The timeline of a run (Section 3.3): who observes, and the relocalization after a slot's last
update."""

import math
import warnings
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from numbers import Integral
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import LoSiAConfig
from ..layers.cross_entropy import WeightGradient
from ..layers.idle import warn_of_idle_fields
from ..layers.members import find_members, join_
from ..layers.module import SubnetModule
from ..layers.subnet import Subnet
from ..layers.unchanged import check_unchanged
from ..parallel.engines import add_join_check
from ..parallel.placement import Placement, find_placement
from ..parallel.ranks import Ranks
from .checks import (
    check_alike,
    check_dtypes,
    check_flags,
    check_gradients,
    check_held,
    warn_of_frozen_since,
    warn_of_not_finite,
    warn_of_rates,
    warn_of_unobserved,
    warn_of_unplaced,
)
from .importance import OBSERVERS, Observer, make_observer, new_subnet
from .pending import Pending
from .ranks_alike import check_same_position, check_same_start
from .schedule import Clock, Schedule, check_steps
from .selection import NonFiniteScoreError, random_subnet

_DRIVERS: "weakref.WeakKeyDictionary[SubnetModule, Any]" = weakref.WeakKeyDictionary()


def driver_of(layer: SubnetModule) -> "Timeline | None":
    """The timeline that was last made for ``layer``, as long as its optimizer lives."""
    return _DRIVERS.get(layer, lambda: None)()


class Timeline:
    """Drives the layers of one model beside an optimizer; ``LoSiAAdamW`` and ``attach`` each hold
    one.

    Args:
        model: one that ``apply_losia`` has converted, or whose layers were placed by hand.
        total_steps: see ``plan``.
        process_group: the processes that hold replicas of the model; by default its
            DistributedDataParallel's or all.
        config: of layers that were placed by hand.

    Attributes:
        model: the one that was given.
        clock: the steps taken and whose turn it is; one optimizer step is one step of the clock,
            however many micro-batches it had.
        groups: the layers of each group, by group number, in model order; ``group_names`` names
            them.
        dense: layers that are trained in full, without a slot (an output layer with
            ``output_dim_factor=1``).
        layers: all of them, group after group.
        loss_divisor: what each micro-batch's mean loss was divided by before its backward
            (accumulation steps; 1/scale under a GradScaler, whose overflows are then left out). The
            importance is not linear in the gradient and must know (Eq. 3).
        listeners: called with ``(layer, subnet)`` just before a layer is relocalized to that
            subnet.
        observers: of the layers that observe.
        handles: hooks on the optimizer that ``detach`` takes off.
        drives: until ``detach``, or until another optimizer is made for the model, which detaches
            this one.

    Raises:
        ValueError: the model has no layers to train, its layers do not go together, or an engine
            has split it in a way that LoSiA cannot train in.
        RanksDifferError: the processes do not start alike.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int | None = None,
        process_group: "dist.ProcessGroup | None" = None,
        config: LoSiAConfig | None = None,
    ):
        members = find_members(model, config)
        if config is not None and any(member.by_hand for member in members.values()):
            warn_of_idle_fields(config, members)
        check_alike(members)
        check_flags(list(members))
        self._trained = [layer for layer in members if layer.subnet.requires_grad]
        if total_steps is not None:
            check_steps(total_steps)
        names = {m.group: m.group_name for m in members.values() if m.group is not None}
        numbers = sorted(names)
        self.group_names = [names[number] for number in numbers]
        self.groups = [[x for x, m in members.items() if m.group == n] for n in numbers]
        self.dense = [layer for layer, member in members.items() if member.group is None]
        self.layers = [layer for layers in [*self.groups, self.dense] for layer in layers]
        first = next(iter(members.values())).config
        self.clock = Clock(first, len(numbers), OBSERVERS[first.importance].last_step_only)
        self._loss_divisor = 1.0
        self.listeners: list[Callable[[SubnetModule, Subnet], None]] = []
        self.observers: dict[SubnetModule, Observer] = {}
        self._pending = Pending(self.observers)
        self.handles: list[Any] = []
        self.drives = True

        self.model = model
        self._placement: Placement | None = None
        self._before_first_step = True
        self._problem: str | None = None
        self._places: dict[SubnetModule, tuple[tuple, list[Tensor]]] = {}  # at the last step
        self.unplaced: set[SubnetModule] = set()  # loaded state is of places that they moved to
        self.dtypes: dict[SubnetModule, torch.dtype] = {}  # of the subnets at the last step
        self.ranks = Ranks.of(model, process_group)
        check_same_start(self.ranks, self.config, model)
        self.check_position(self.layers)
        add_join_check(model)
        join_(members)
        for layer in self.layers:
            before = driver_of(layer)
            if before is not None:
                before.detach()
            _DRIVERS[layer] = weakref.ref(self)
        self._observe()
        if total_steps is not None:
            self.plan(total_steps)

    @property
    def loss_divisor(self) -> float:
        """What each micro-batch's loss was divided by; ValueError unless positive and finite."""
        return self._loss_divisor

    @loss_divisor.setter
    def loss_divisor(self, divisor: float) -> None:
        if not 0 < divisor < math.inf:
            raise ValueError(f"loss_divisor must be a positive number, got {divisor!r}")
        self._loss_divisor = divisor

    # the clock ------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.clock.step

    @property
    def config(self) -> LoSiAConfig:
        """With the period that "auto" has become."""
        return self.clock.config

    @property
    def schedule(self) -> Schedule:
        """Raises RuntimeError as long as ``period="auto"`` waits for the number of steps."""
        return self.clock.schedule

    @property
    def observing(self) -> tuple[int, ...]:
        """Numbers of the groups that observe in the step now beginning."""
        return self.clock.observing

    def lr_factor(self, group: int) -> float:
        """What this step multiplies the group's learning rate with (Eq. 8)."""
        return self.clock.lr_factor(group)

    @property
    def idle(self) -> bool:
        """Whether no layer is in use, as of an inactive PEFT adapter: no step then counts."""
        return all(layer.membership is None for layer in self.layers)

    def scale_of(self, layer: SubnetModule) -> float:
        """What the rate of ``layer`` is multiplied with where it is full fine-tuning's: places at
        random hold ``k_out * k_in / (out * in)`` of the sum of |g|, by which a step gets on."""
        if not self.config.scales_lr:
            return 1.0
        return layer.out_features * layer.in_features / layer.held("subnet").numel()

    def plan(self, total_steps: int) -> None:
        """Say how many optimizer steps a run that begins has: settles ``period="auto"``, and warns
        if the run ends before every group has had its turn.

        Args:
            total_steps: a whole number, at least 1.

        Raises:
            ValueError: it is none.
        """
        check_steps(total_steps)
        if self.clock.settle_auto(int(total_steps)):
            self.ranks.check_same({"LoSiAConfig.period": self.config.period})
            self._observe()
        problem = self.schedule.too_short(int(total_steps))
        said = problem == self._problem  # a command, a Trainer and its callback may all plan
        self._problem = problem
        if problem and not said:
            warnings.warn(f"LoSiA: {problem}", stacklevel=4)

    def settle_period(self, period: int) -> None:
        """From here on that is T, and whose turn it is observes."""
        self.clock.settle(period)
        self._observe()

    def resume_at(self, step: int) -> None:
        """Set the clock; whose turn it is begins to observe anew.

        To be called before ``optimizer.state_dict()`` is asked which tensors to load, as
        accelerate's and torch's loading of sharded checkpoints does: the layers that observe differ
        from step to step.

        Raises:
            ValueError: ``step`` is no whole number of at least 0.
            RuntimeError: ``period="auto"`` waits for the number of steps.
        """
        if not isinstance(step, Integral) or step < 0:
            raise ValueError(f"resume_at: step must be a whole number, at least 0, got {step!r}")
        if step:
            self.clock.check_settled()
        for layer in list(self.observers):
            self._stop(layer)
        self.clock.step = step
        self._places.clear()  # the state that is loaded beside it belongs to the places of then
        self._observe()

    # one step -------------------------------------------------------------------------------------

    def observe(self) -> None:
        """At the start of the step, by the weights before its update: what the backwards since the
        last one have shown counts."""
        self._pending.commit(self.loss_divisor, self.placement)

    def drop_gradients(self) -> None:
        """Gradients were dropped without a step: so is what came with them."""
        self._pending.drop()

    def advance(self, forget: Callable[[Tensor], None]) -> None:
        """End the step, after its update: relocalize the groups whose slot ends, then set up the
        next step.

        Args:
            forget: drops what an optimizer keeps of a subnet that has moved.

        Raises:
            NonFiniteScoreError: naming the layer whose score is not finite: no layer has moved
                then, and the clock goes on, so that what is saved afterwards is whole.
        """
        moving = [layer for group in self.clock.moving for layer in self.groups[group]]
        self._warn_of_unobserved()
        try:
            found = [(layer, self._select(layer)) for layer in moving]
        except NonFiniteScoreError:
            self._next_step(freed=moving)
            raise
        moves = [(layer, subnet) for layer, subnet in found if subnet is not None]
        warn_of_not_finite([layer for layer, subnet in found if subnet is None])
        for listener, move in product(self.listeners, moves):
            listener(*move)
        self.placement.move_(moves)
        for layer, _ in moves:
            forget(layer.subnet)
            self._places.pop(layer, None)
        if moving:
            self.check_position(moving)
        self._next_step(freed=moving)

    def forget_moved(
        self, forget: Callable[[Tensor], None], layers: Iterable[SubnetModule]
    ) -> None:
        """Before an update of ``layers``: what an optimizer keeps of a subnet belongs to a place.
        Forget it where somebody else has moved the subnet since the last one: a loaded state dict,
        a ``set_subnet_``, a ``calibrate``.

        Values are compared, and the GPU waited for, only after a move or a load: that DDP sends
        buffers round at every forward is neither.
        """
        if self.unplaced:
            self._forget_unplaced(forget)
        for layer in layers:
            here = layer.indices
            count = layer.moves, *map(id, here)  # loading may exchange the tensors
            known = self._places.get(layer)
            if known is not None and known[0] == count or here[0].is_meta:
                continue
            if known is not None and not all(map(_same, known[1], here)):
                forget(layer.subnet)
            self._places[layer] = count, [idx.clone() for idx in here]

    def _forget_unplaced(self, forget: Callable[[Tensor], None]) -> None:
        """The model's state was not loaded beside the optimizer's, or only its weights."""
        strangers = [layer for layer in self.unplaced if not layer.was_placed]
        self.unplaced.clear()
        warn_of_unplaced(strangers)
        for layer in strangers:
            forget(layer.subnet)

    def _select(self, layer: SubnetModule) -> Subnet | None:
        if self.config.moves == "random":
            return random_subnet(layer, self.config.seed, self.step)
        return new_subnet(layer, self.observers[layer], self.placement.rows(layer))

    def _warn_of_unobserved(self) -> None:
        for group in self.clock.moving:
            name, layers = self.group_names[group], self.groups[group]
            warn_of_unobserved(self.model, name, layers, self.observers, self._trained)

    def _next_step(self, freed: list[SubnetModule]) -> None:
        for layer in freed:
            if layer in self.observers:
                self._stop(layer)
        self.clock.step += 1
        self._observe()

    # who observes ---------------------------------------------------------------------------------

    def _observe(self) -> None:
        """Let exactly the layers whose turn it is observe, once it is known."""
        if not self.clock.settled:
            return
        due = [layer for group in self.observing for layer in self.groups[group]]  # on every rank
        for layer in [layer for layer in self.observers if layer not in due]:
            self._stop(layer)
        for layer in due:
            if layer not in self.observers:
                self.observers[layer] = make_observer(self.config)
                layer.observe_(partial(self._observed, layer))
                self._pending.watch(layer)

    def _observed(self, layer: SubnetModule, gradient: Tensor | WeightGradient) -> None:
        self._pending.add(layer, gradient, self.loss_divisor, self.placement)

    def _stop(self, layer: SubnetModule) -> None:
        del self.observers[layer]
        layer.observe_(None)
        self._pending.unwatch(layer)

    def detach(self) -> None:
        """Take the hooks off the optimizer and stop observing; subnets and weights stay as they
        are."""
        self.drives = False
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        for layer in list(self.observers):
            self._stop(layer)

    # where weights live ---------------------------------------------------------------------------

    @property
    def placement(self) -> Placement:
        """Where the layers' weights are. Looked up anew until the first step: accelerate makes the
        optimizer first, asks for its state, and then makes the shards."""
        if self._placement is None or self._before_first_step:
            self._placement = find_placement(self.model, self.layers, self.ranks)
        return self._placement

    def check_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Before a step: raise RuntimeError if the timeline was detached, or the optimizer would
        step parameters that the model no longer has."""
        if not self.drives:
            raise RuntimeError(
                f"this {type(optimizer).__name__} no longer drives the subnets: another optimizer "
                f"was made for the model, or its timeline was detached; step the newest, or make a "
                f"new one"
            )
        check_held(optimizer, self.layers)
        check_dtypes(optimizer, self.layers, self.dtypes)
        for layer in self.layers:
            self.placement.check(layer)

    def check_first_step(self, updated: "set[SubnetModule] | tuple[()]" = ()) -> None:
        """In the first step alone: ``check_unchanged`` and ``check_gradients``.

        Args:
            updated: layers whose gradient was used and freed inside the backward.
        """
        if self._before_first_step:
            self._before_first_step = False
            check_unchanged(self.model, self.layers)
            warn_of_frozen_since([layer for layer in self._trained if layer not in updated])
            warn_of_rates(self.config, self.layers, self.step)
            check_gradients(self.layers, updated)

    def check_position(self, layers: list[SubnetModule]) -> None:
        """Raise RanksDifferError unless every rank is at the same step with the same subnets."""
        check_same_position(self.ranks, self.step, layers)


def _same(then: Tensor, now: Tensor) -> bool:
    return torch.equal(then, now.to(then.device))
