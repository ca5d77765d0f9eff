"""LoSiAAdamW, whose step() is the whole method, and attach(), which gives the same to any torch
optimizer."""

import functools
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ..layers.convert import trained_parameters
from ..layers.linear import LoSiALinear, losia_layers
from ..ops.adamw import Update, update_subnets_
from ..parallel.placement import own, write_back_
from ..parallel.ranks import is_sharded
from .adam_state import SUBNET_STATE, SubnetState
from .in_backward import InBackward
from .state_dict import TimelineState
from .timeline import Timeline

Options = tuple[float, float, float, float]  # beta1, beta2, eps, weight_decay


class LoSiAAdamW(torch.optim.Optimizer):
    """AdamW on the subnets, written back into the weights in the same pass, with the timeline of
    Section 3.3.

    ``model`` has been through ``apply_losia``. One parameter group per layer group, in order, then
    one for what is trained densely (``modules_to_save``, a dense output layer); any LR scheduler
    works on them, and the rewarm factor (Eq. 8) multiplies inside ``step()``. ``lr`` per step;
    ``weight_decay`` is decoupled and touches the subnet's entries only. 16-bit dense parameters get
    a float32 master copy and float32 moments in the state. ``total_steps`` of the run: settles
    ``period="auto"``, warns if a group gets no turn. ``timeline`` tells where the run stands.
    ``process_group``: the processes that train replicas of the model; the default is right but for
    several models.

    Less memory (``docs/memory.md`` has the bytes): ``moments`` of the subnets in "float32",
    "bfloat16" or "int8" (blocks of 256 with a scale), both rounded stochastically. ``remainder``:
    with ``LoSiAConfig(master_weights=False)`` on a bfloat16 model the state keeps the 16 bits that
    each subnet lacks, so that updates are of float32 values; gradients are bfloat16.
    ``in_backward``: each subnet is updated inside the backward, as soon as its gradient is whole,
    and the gradient is freed; ``step()`` updates the rest. The results are the same bits. It allows
    one backward a step, on one process: accumulation, ``loss_divisor`` and float16 are refused;
    ``clip_grad_norm_`` finds nothing to clip.

    ``state_dict`` and the model's own resume a run bit-identically at any step. Errors: ValueError
    for hyperparameters out of range, a model without LoSiALinears, or a state of another config or
    shape; NonFiniteScoreError from ``step`` (see ``Timeline.advance``).
    """

    zeros_forget = True  # all state but the step may be zeroed, quantized or not (``Timeline``)

    def __init__(
        self,
        model: nn.Module,
        lr: float = 6e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        total_steps: int | None = None,
        process_group: "dist.ProcessGroup | None" = None,
        *,
        moments: str = "float32",
        remainder: bool = False,
        in_backward: bool = False,
    ):
        for name, value, good in (
            ("lr", lr, lr >= 0),
            ("betas", betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas)),
            ("eps", eps, eps >= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
        ):
            if not good:
                raise ValueError(f"LoSiAAdamW: {name} is out of range: {value!r}")
        self._form = SubnetState(moments, remainder)
        self._form.check([layer for _, layer in losia_layers(model) if hasattr(layer, "losia")])
        self.timeline = Timeline(model, total_steps, process_group)
        self._groups = [
            *self.timeline.groups,
            self.timeline.dense,
        ]  # by the number of the parameter group
        self._layers = [*chain.from_iterable(self._groups)]
        groups = [{"params": [layer.subnet for layer in layers]} for layers in self.timeline.groups]
        dense = [layer.subnet for layer in self.timeline.dense] + [
            p for _, p in trained_parameters(model)
        ]
        if dense:
            groups.append({"params": dense})
        super().__init__(
            groups, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        )
        TimelineState(self.timeline, self)
        self.timeline.ranks.check_same({"LoSiAAdamW's state": str(self._form)}, {})
        self.register_state_dict_pre_hook(_complete_state)
        self._dense_writes: dict[Tensor, int] = {}  # torch's count after our last write
        self.in_backward = in_backward
        self._in_backward = None
        if in_backward:
            self._in_backward = InBackward(self.timeline, self._update_subnet)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update every subnet and its weight, relocalize the groups whose slot ends, advance the
        clock."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        timeline = self.timeline
        timeline.check_parameters(self)
        if timeline.sharded:
            self._form.check_sharded()
        if self._only_makes_state():
            return loss
        timeline.check_gradients(self._in_backward.take_updated() if self._in_backward else ())
        numbers = range(len(self._groups))
        # of shards group by group: what travels together is in memory at once
        for together in [[number] for number in numbers] if timeline.sharded else [numbers]:
            self._update_subnets(together)
        for group, parameters in self._dense_parameters():
            self._update_dense(parameters, group)
        timeline.advance(self)
        return loss

    def _only_makes_state(self) -> bool:
        """torch.distributed.checkpoint makes a new optimizer's state by a step at lr 0 with zero
        gradients, which is no step of the clock."""
        if self.state or any(float(group["lr"]) for group in self.param_groups):
            return False
        parameters = [
            p for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        if any(bool((own(p.grad) if is_sharded(p.grad) else p.grad).any()) for p in parameters):
            return False
        self._make_state()
        return True

    def _make_state(self) -> None:
        for layer in self._layers:
            self._subnet_state(layer.subnet)
        for _, parameters in self._dense_parameters():
            for parameter in parameters:
                self._dense_state(parameter)

    def _dense_parameters(self) -> Iterator[tuple[dict, list[Tensor]]]:
        """Parameter groups with what has no subnet in them; ``add_param_group`` may have brought
        more."""
        skipped = len(self.timeline.dense)  # layers trained in full come first
        for group in self.param_groups[len(self.timeline.groups) :]:
            yield group, group["params"][skipped:]
            skipped = 0

    def _update_subnets(self, numbers: Iterable[int]) -> None:
        """One call for all layers with the same options, whatever their learning rates and
        steps."""
        updated: list[LoSiALinear] = []
        alike: dict[Options, list[Update]] = {}
        for number in numbers:
            layers = [layer for layer in self._groups[number] if layer.subnet.grad is not None]
            if layers:
                lr, options = self._hyperparameters(number)
                for layer in layers:
                    layer.settle_(finish=True)
                alike.setdefault(options, []).extend(
                    [self._operands(layer, lr) for layer in layers]
                )
                updated += layers
        for options, updates in alike.items():
            update_subnets_(updates, *options)
        if self.timeline.sharded:
            write_back_(updated, self.timeline.ranks)
        else:
            for layer in updated:
                layer.note_agreement_()

    def _update_subnet(self, number: int, layer: LoSiALinear) -> None:
        """One layer inside the backward."""
        lr, options = self._hyperparameters(number)
        layer.settle_(finish=True)
        update_subnets_([self._operands(layer, lr)], *options)
        layer.note_agreement_()

    def _hyperparameters(self, number: int) -> tuple[float, Options]:
        """Of a group of layers: this step's learning rate, rewarmed (Eq. 8), and what AdamW takes
        beside it."""
        group = self.param_groups[number]
        factor = self.timeline.lr_factor(number) if number < len(self.timeline.groups) else 1.0
        return float(group["lr"]) * factor, (*group["betas"], group["eps"], group["weight_decay"])

    def _operands(self, layer: LoSiALinear, lr: float) -> Update:
        """This step's update of a layer.

        Of shards the new values go nowhere yet: the subnet's own rows alone (maybe none) are here,
        and where they belong in the weight is mostly on other ranks.
        """
        weight, subnet, out_idx, in_idx = layer.matrix, layer.subnet, layer.out_idx, layer.in_idx
        state = self._subnet_state(subnet)
        step = int(state["step"]) + 1
        state["step"].fill_(step)  # on the CPU
        seed = self._seed(layer) if self._form.stochastic(subnet) else None
        values: list[Any] = [subnet, subnet.grad, *map(state.get, SUBNET_STATE[1:])]
        if self.timeline.sharded:
            values = [
                own(value) if value is not None and is_sharded(value) else value for value in values
            ]
            weight = values[0].to(weight.dtype, copy=True)
            out_idx, in_idx = (torch.arange(size, device=weight.device) for size in weight.shape)
        subnet, grad, exp_avg, exp_avg_sq, *extra = values
        return Update(
            weight,
            subnet,
            grad.contiguous(),
            exp_avg,
            exp_avg_sq,
            out_idx,
            in_idx,
            lr,
            step,
            seed,
            *extra,
        )

    def _seed(self, layer: LoSiALinear) -> int:
        part = self.timeline.ranks.rank if self.timeline.sharded else 0
        return _rounding_seed(self.timeline.config.seed + part, layer.name, self.timeline.step)

    def _update_dense(self, parameters: list[Tensor], group: dict) -> None:
        """torch's AdamW on the float32 values of parameters that have no subnet."""
        used = [p for p in parameters if p.grad is not None]
        grads = [p.grad for p in used if p.grad is not None]
        states = [self._dense_state(p) for p in used]
        values = [self._dense_values(p, state) for p, state in zip(used, states, strict=True)]
        adamw(
            values,
            [grad.to(value.dtype) for grad, value in zip(grads, values, strict=True)],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for parameter, value in zip(used, values, strict=True):
            parameter.copy_(value)
            self._dense_writes[parameter] = parameter._version

    def _dense_values(self, parameter: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The master copy if there is one, read anew where something else has written the parameter
        since."""
        master = state.get("master")
        if master is None:
            return parameter
        if self._dense_writes.get(parameter, parameter._version) != parameter._version:
            now, then = (
                own(value) if is_sharded(value) else value for value in (parameter, master)
            )
            if not torch.equal(now, then.to(now.dtype)):
                master.copy_(parameter)
        return master

    def _subnet_state(self, subnet: Tensor) -> dict[str, Tensor]:
        state = self.state[subnet]
        if not state:
            state.update(self._form.make(subnet))
        return state

    def _dense_state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state.update(SubnetState().make(parameter))
            if parameter.dtype in (torch.bfloat16, torch.float16):
                state["master"] = parameter.to(state["exp_avg"].dtype, copy=True)
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore what ``state_dict`` saved. Raises ValueError, before anything changes, if it does
        not fit."""
        saved = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        held = list(chain.from_iterable(group["params"] for group in self.param_groups))
        layers = {layer.subnet: layer for layer in self._layers}
        for i, parameter in zip(saved, held, strict=False):  # torch says if their numbers differ
            if parameter in layers:
                self._form.check_loaded(layers[parameter], state_dict["state"].get(i, {}))
        super().load_state_dict(state_dict)
        # torch has cast the state to the parameter's dtype; ours keeps the one it was saved with
        for i, parameter in zip(saved, held, strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                if key in (*SUBNET_STATE, "master"):
                    device = (
                        "cpu" if key == "step" else parameter.device
                    )  # wherever the file was mapped to
                    self.state[parameter][key] = value.to(device, copy=True)


def _complete_state(optimizer: torch.optim.Optimizer) -> None:
    """Of shards, torch.distributed.checkpoint wants the state of every parameter, also of one just
    relocalized."""
    if isinstance(optimizer, LoSiAAdamW) and optimizer.timeline.sharded:
        optimizer._make_state()


@functools.cache
def _named_seed(seed: int, layer_name: str) -> int:
    return functools.reduce(_fnv, layer_name.encode(), seed)


def _rounding_seed(seed: int, layer_name: str, step: int) -> int:
    """31 bits that differ between layers and steps, the same in every process."""
    return _fnv(_named_seed(seed, layer_name), step)


def _fnv(value: int, part: int) -> int:
    return (value * 0x01000193 ^ part) & 0x7FFFFFFF


def attach(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    total_steps: int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
) -> Timeline:
    """Give any torch optimizer that holds the model's subnets the behaviour of LoSiAAdamW's step.

    Each of its steps then writes the subnets back into the weights, relocalizes and rewarms. Its
    parameter groups are split by layer group (same options), so call this before making a
    learning-rate scheduler. A relocalized subnet's state is dropped, and the optimizer makes it
    anew. ``total_steps`` and ``process_group`` are as for LoSiAAdamW. Returns the timeline, which
    is also ``optimizer.timeline``; ``timeline.detach()`` undoes the hooks. A step that GradScaler
    makes a fused optimizer skip is none of the clock's.

    Raises ValueError, having changed nothing, if the optimizer lacks a subnet, drives the subnets
    already (LoSiAAdamW, a second attach), has a scheduler, has stepped, or sets its own learning
    rate, which cannot be rewarmed; TypeError if it is no torch optimizer.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"attach: expected the optimizer, then the model; got {type(optimizer).__name__} first"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, layer in losia_layers(model):
        if hasattr(layer, "losia") and id(layer.subnet) not in held:
            raise ValueError(
                f"attach: the optimizer does not hold the subnet of {name}; call apply_losia first"
            )
    if isinstance(optimizer, LoSiAAdamW) or any(
        "layer_group" in group for group in optimizer.param_groups
    ):
        raise ValueError("attach: the optimizer drives the subnets already")
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise ValueError(
            "attach: the optimizer has a learning-rate scheduler already; attach first, then make it"
        )
    if optimizer.state:
        raise ValueError(
            "attach: the optimizer has taken steps already; attach before the first one"
        )
    if any(group["lr"] is None for group in optimizer.param_groups):
        raise ValueError(
            f"attach: {type(optimizer).__name__} sets its own learning rate, which cannot be rewarmed; "
            f"give it one (transformers' Adafactor: relative_step=False, lr=...)"
        )
    timeline = Timeline(model, total_steps, process_group)
    optimizer.timeline = timeline  # type: ignore[attr-defined]
    number_of = {
        id(layer.subnet): number
        for number, layers in enumerate(timeline.groups)
        for layer in layers
    }
    optimizer.param_groups[:] = [
        {
            **group,
            "params": [p for p in group["params"] if number_of.get(id(p)) == number],
            "layer_group": number,
        }
        for group in optimizer.param_groups
        for number in [*range(len(timeline.groups)), None]
        if any(number_of.get(id(p)) == number for p in group["params"])
    ]
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's: schedulers fill it in place
            group["lr"] = group["lr"].clone()

    def rewarm(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        timeline.check_parameters(optimizer)
        if not timeline.sharded:
            for layer in chain(*timeline.groups, timeline.dense):
                layer.settle_(finish=True)
        for group in optimizer.param_groups:
            group["lr"] = group.pop(
                "scheduled_lr", group["lr"]
            )  # a step that raised has left it rewarmed
            group["scheduled_lr"] = group["lr"]
            if group.get("layer_group") is not None:  # one added later has none
                group["lr"] = group["lr"] * timeline.lr_factor(group["layer_group"])

    def write_back(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group.pop("scheduled_lr")
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return  # there for the time of a GradScaler's step: the optimizer has changed nothing
        timeline.check_gradients()
        for layers in [*timeline.groups, timeline.dense]:
            if timeline.sharded:
                write_back_(layers, timeline.ranks)
            else:
                for layer in layers:
                    layer.write_back_()
        with torch.no_grad():
            timeline.advance(optimizer)

    def forget_groups() -> None:
        for group in optimizer.param_groups:
            group.pop("layer_group", None)

    state = TimelineState(timeline, optimizer)
    if type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict:
        state.load_around(optimizer)
    timeline.handles += [
        optimizer.register_step_pre_hook(rewarm),
        optimizer.register_step_post_hook(write_back),
    ]
    timeline.handles.append(SimpleNamespace(remove=forget_groups))
    return timeline
