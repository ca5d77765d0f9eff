"""LoSiAAdamW, whose step() is the whole method: AdamW on the subnets, their values into the weights,
and the timeline."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ..config import LoSiAConfig
from ..layers.convert import trained_parameters
from ..layers.members import find_members
from ..layers.module import SubnetModule
from ..ops.adamw import Update, update_subnets_
from ..parallel.placement import local
from ..parallel.ranks import Ranks
from .adam_state import SUBNET_STATE, AdamState
from .checks import check_dtypes, only_makes_state
from .in_backward import InBackward, check_in_backward
from .selection import seed_of
from .state_dict import TimelineState
from .timeline import Timeline

Options = tuple[float, float, float, float]  # beta1, beta2, eps, weight_decay


class LoSiAAdamW(torch.optim.Optimizer):
    """AdamW on the subnets, written back into the weights in the same pass, with the timeline of
    Section 3.3.

    One parameter group per layer group, in order, then one for what is trained densely
    (``modules_to_save``, a dense output layer); any LR scheduler works on them, and the rewarm
    factor (Eq. 8) multiplies inside ``step()``. 16-bit dense parameters get a float32 master copy
    and float32 moments in the state. ``state_dict`` and the model's own resume a run
    bit-identically at any step. ``docs/memory.md`` has the bytes of every form.

    Args:
        model: one that ``apply_losia`` has converted, or with LoSiALinears placed by hand.
        lr: per step.
        betas, eps: as of torch's AdamW.
        weight_decay: decoupled, on the subnet's entries only.
        total_steps: of the run: settles ``period="auto"``, warns if a group gets no turn.
        process_group: the processes that train replicas of the model; the default is right but for
            several models.
        config: when layers that were placed by hand move; they take turns block by block, or, of a
            model without blocks, one after the other.
        moments: of the subnets in "float32", "bfloat16" or "int8" (blocks of 256 with a scale),
            both rounded stochastically.
        in_backward: update each subnet inside the backward, as soon as its gradient is whole, and
            free the gradient; ``step()`` updates the rest. The results are the same bits. It allows
            one backward a step, on one process: accumulation, ``loss_divisor`` and float16 are
            refused; ``clip_grad_norm_`` finds nothing to clip.

    Attributes:
        timeline: where the run stands.

    Raises:
        ValueError: hyperparameters are out of range, the model has no layers to train, or a form of
            the state is not for them; ``load_state_dict``: a state of another config or shape.
        NonFiniteScoreError: from ``step`` (see ``Timeline.advance``).
    """

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
        config: LoSiAConfig | None = None,
        moments: str = "float32",
        in_backward: bool = False,
    ):
        if not isinstance(lr, (float, int, Tensor)):
            raise TypeError(
                f"LoSiAAdamW: lr must be a number, got {type(lr).__name__}; a LoSiAConfig is given "
                f"as config="
            )
        two = isinstance(betas, (tuple, list)) and len(betas) == 2
        finite = "finite and at least 0"
        for name, value, good, expected in (
            ("lr", lr, 0 <= lr < math.inf, finite),
            ("betas", betas, two and all(0 <= b < 1 for b in betas), "two numbers in [0, 1)"),
            ("eps", eps, 0 <= eps < math.inf, finite),
            ("weight_decay", weight_decay, 0 <= weight_decay < math.inf, finite),
        ):
            if not good:
                raise ValueError(f"LoSiAAdamW: {name} must be {expected}, got {value!r}")
        members = find_members(model, config)
        split = all(member.config.master == "split" for member in members.values())
        self._form = AdamState(moments, split)
        self._form.check(list(members))
        if in_backward:
            check_in_backward(members, Ranks.of(model, process_group))
        self.timeline = Timeline(model, total_steps, process_group, config)
        # by the parameter group's number
        self._groups = [
            *self.timeline.groups,
            self.timeline.dense,
        ]
        groups = [{"params": [layer.subnet for layer in group]} for group in self.timeline.groups]
        dense = [layer.subnet for layer in self.timeline.dense]
        dense += [parameter for _, parameter in trained_parameters(model)]
        if dense:
            groups.append({"params": dense})
        options = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(groups, options)
        for group in self.param_groups:
            if isinstance(group["lr"], Tensor):  # schedulers fill it in place, once a group
                group["lr"] = group["lr"].clone()
        TimelineState(self.timeline, self)
        self.timeline.ranks.check_same({"LoSiAAdamW's state": str(self._form)})
        self.register_state_dict_pre_hook(_complete_state)
        self.in_backward = in_backward
        self._used_inside: dict[int, tuple[float, Options]] = {}  # by the parameter group's number
        self._in_backward = InBackward(self.timeline, self._update_inside) if in_backward else None

    @torch._disable_dynamo  # what it does differs from step to step
    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update every subnet and its weight, relocalize the groups whose slot ends, advance the
        clock."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if "timeline" not in self.__dict__:
            raise RuntimeError(
                "a copy of a LoSiAAdamW (deepcopy, pickle, torch.save of it whole) drives no "
                "model: make a new one for the model that it is to train, and load_state_dict"
            )
        timeline = self.timeline
        timeline.check_step(self)
        if timeline.idle:
            return loss
        self._form.check(timeline.layers)
        self._form.check_placement(timeline.placement)
        if only_makes_state(self):
            self._make_state()
            return loss
        timeline.forget_moved(self._forget, timeline.layers)
        timeline.check_first_step(self._in_backward.take_updated() if self._in_backward else ())
        self._warn_of_late_options()
        numbers = range(len(self._groups))
        timeline.observe()
        # of shards group by group: what travels together is in memory at once
        at_once = timeline.placement.all_at_once
        for together in [numbers] if at_once else [[number] for number in numbers]:
            self._update_subnets(together)
        for group, parameters in self._dense_parameters():
            self._update_dense(parameters, group)
        timeline.advance(self._forget)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of torch's optimizers. Without a step before it, what the backwards have shown is
        dropped too."""
        super().zero_grad(set_to_none)
        if "timeline" in self.__dict__:  # not of a copy
            self.timeline.drop_gradients()

    # subnets --------------------------------------------------------------------------------------

    def _update_subnets(self, numbers: Iterable[int]) -> None:
        """One call for all layers with the same options, whatever their learning rates and
        steps."""
        updated: list[SubnetModule] = []
        alike: dict[Options, list[Update]] = {}
        for number in numbers:
            layers = [
                layer for layer in self._groups[number] if layer.held("subnet").grad is not None
            ]
            if layers:
                lr, options = self._hyperparameters(number)
                for layer in layers:
                    layer.sync_(finish=True)
                for layer in layers:
                    if layer.held("subnet").grad is None:  # of a place that it has left
                        continue
                    update, mine = self._update_of(layer, lr, options)
                    alike.setdefault(mine, []).append(update)
                    updated.append(layer)
        for options, updates in alike.items():
            update_subnets_(updates, *options)
        self.timeline.placement.finish_(updated)

    def _update_inside(self, number: int, layer: SubnetModule) -> None:
        """One layer inside the backward."""
        check_dtypes(self, [layer], self.timeline.dtypes)
        self.timeline.forget_moved(self._forget, [layer])
        lr, options = self._used_inside[number] = self._hyperparameters(number)
        layer.sync_(finish=True)
        update, options = self._update_of(layer, lr, options)
        update_subnets_([update], *options)
        self.timeline.placement.finish_([layer])

    def _warn_of_late_options(self) -> None:
        """Of a step whose updates were made inside the backward, by other options than now."""
        used = self._used_inside.items()
        if any(options != self._hyperparameters(number) for number, options in used):
            warnings.warn(
                "LoSiA: the learning rate, or another option of a parameter group, was changed between "
                "backward and step(), but with in_backward=True the subnets were updated inside the "
                "backward, by what it was then: change it before the backward",
                stacklevel=3,
            )
        self._used_inside.clear()

    def _hyperparameters(self, number: int) -> tuple[float, Options]:
        """Of a group of layers: this step's learning rate, rewarmed (Eq. 8), and what AdamW takes
        beside it."""
        group = self.param_groups[number]
        in_turn = number < len(self.timeline.groups)
        factor = self.timeline.lr_factor(number) if in_turn else 1.0
        options = (*group["betas"], group["eps"], group["weight_decay"])
        return float(group["lr"]) * factor, options

    def _update_of(
        self, layer: SubnetModule, lr: float, options: Options
    ) -> tuple[Update, Options]:
        """With the layer's own rate; a value decays as fast as in full fine-tuning whatever that
        is."""
        scale = self.timeline.scale_of(layer)
        options = (*options[:3], options[3] / scale)
        subnet = layer.held("subnet")
        state, placement = self._subnet_state(subnet), self.timeline.placement
        step = int(state["step"]) + 1
        state["step"].fill_(step)  # on the CPU
        weight, out_idx, in_idx = placement.target(layer)
        here = placement.local
        update = Update(
            weight=weight,
            subnet=here(subnet),
            grad=here(subnet.grad).contiguous(),
            out_idx=out_idx,
            in_idx=in_idx,
            lr=lr * scale,
            step=step,
            seed=self._seed(layer) if self._form.stochastic(subnet) else None,
            alignment=layer.in_alignment,
            **{key: here(state[key]) for key in SUBNET_STATE[1:] if key in state},
        )
        return update, options

    def _seed(self, layer: SubnetModule) -> int:
        timeline = self.timeline
        seed = timeline.config.seed + timeline.placement.part
        return seed_of(seed, layer.name, timeline.step)

    def _subnet_state(self, subnet: Tensor) -> dict[str, Tensor]:
        state = self.state[subnet]
        if not state:
            state.update(self._form.make(subnet))
        return state

    def _forget(self, subnet: Tensor) -> None:
        """What is kept of a subnet that has moved: with ``reset_step`` all of it, else the moments,
        for which zeros stand in every form."""
        if self.timeline.config.reset_step:
            self.state.pop(subnet, None)
            return
        for key, value in self.state.get(subnet, {}).items():
            if key != "step" and value is not None:  # None: a name alone
                value.zero_()

    # what has no subnet ---------------------------------------------------------------------------

    def _dense_parameters(self) -> Iterator[tuple[dict, list[Tensor]]]:
        """Parameter groups with what has no subnet in them; ``add_param_group`` may have brought
        more."""
        skipped = len(self.timeline.dense)  # layers trained in full come first
        for group in self.param_groups[len(self.timeline.groups) :]:
            yield group, group["params"][skipped:]
            skipped = 0

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

    def _dense_values(self, parameter: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The master copy if there is one, read anew where something else has written the parameter
        since: also through ``.data``, which torch does not count."""
        master = state.get("master")
        if master is None:
            return parameter
        now, then = local(parameter), local(master)
        torch.where(then.to(now.dtype) == now, then, now, out=then)
        return master

    def _dense_state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state.update(AdamState().make(parameter))
            if parameter.dtype in (torch.bfloat16, torch.float16):
                state["master"] = parameter.to(state["exp_avg"].dtype, copy=True)
        return state

    # the state ------------------------------------------------------------------------------------

    def _make_state(self) -> None:
        for layer in self.timeline.layers:
            self._subnet_state(layer.subnet)
        for _, parameters in self._dense_parameters():
            for parameter in parameters:
                self._dense_state(parameter)

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore what ``state_dict`` saved. Raises ValueError, before anything changes, if it does
        not fit."""
        saved = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        held = list(chain.from_iterable(group["params"] for group in self.param_groups))
        layers = {layer.subnet: layer for layer in self.timeline.layers}
        for i, parameter in zip(saved, held, strict=False):  # torch says if their numbers differ
            if parameter in layers:
                self._form.check_loaded(layers[parameter], state_dict["state"].get(i, {}))
        super().load_state_dict(state_dict)
        if self._in_backward:
            self._in_backward.take_updated()  # of a step that is not taken any more
            self._used_inside.clear()
        # torch has cast the state to the parameter's dtype; ours keeps the one it was saved with
        for i, parameter in zip(saved, held, strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                if key in (*SUBNET_STATE, "master"):
                    # wherever the file was mapped to
                    device = "cpu" if key == "step" else parameter.device
                    self.state[parameter][key] = value.to(device, copy=True)


def _complete_state(optimizer: torch.optim.Optimizer) -> None:
    """torch.distributed.checkpoint wants the state of every parameter, also of one just moved."""
    assert isinstance(optimizer, LoSiAAdamW)
    if optimizer.state:
        optimizer._make_state()
