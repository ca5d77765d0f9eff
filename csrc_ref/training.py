"""A whole LoSiA training run in plain torch: untouched ``nn.Linear`` layers, dense gradients, every
step spelled out.

The package must follow it step by step: the same subnets, the same weights. float64 weights are
trained in float64; any other dtype gets float32 masters, moments and gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .importance import importance_ref, importance_update_ref
from .schedule import moving_ref, observing_ref, rewarm_ref
from .scores import score_ref
from .selection import select_marginal_ref, select_outputs_ref, select_ref
from .subnet_grad import cut


@dataclass(frozen=True)
class Config:
    period: int  # T
    update_type: str = "async"  # or "sync"
    importance: str = "sensitivity"  # or "gradient", "marginal"
    importance_beta1: float = 0.85
    importance_beta2: float = 0.85
    rewarm: bool = True
    reset_step: bool = True
    warmup_steps: int = 0
    alignment: int = 1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass
class Step:
    """What happened in one optimizer step; ``subnets`` are those that the *next* step trains."""

    losses: list[float]
    lr: dict[str, float]
    subnets: dict[str, tuple[Tensor, Tensor]]


class Matrix:
    """One trained weight: its subnet with master and moments, and what it has observed."""

    def __init__(self, linear: nn.Linear, out_idx: Tensor | None, in_idx: Tensor | None):
        self.linear = linear
        self.dtype = torch.float64 if linear.weight.dtype == torch.float64 else torch.float32
        # the output layer: only its outputs are selected (section 3.2)
        self.all_in = in_idx is None
        n_out, n_in = linear.weight.shape
        self.step = 0
        self.grad_now = self.zeros()  # dense gradient of this micro-batch's mean loss
        self.forget_importance()
        self.place(
            torch.arange(n_out) if out_idx is None else out_idx,
            torch.arange(n_in) if self.all_in else in_idx,
        )
        linear.register_forward_hook(self.record)

    def zeros(self) -> Tensor:
        return torch.zeros(self.linear.weight.shape, dtype=self.dtype)

    def place(self, out_idx: Tensor, in_idx: Tensor) -> None:
        self.out_idx, self.in_idx = out_idx, in_idx
        self.master = cut(self.linear.weight.detach().to(self.dtype), out_idx, in_idx)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.master), torch.zeros_like(self.master)

    def record(self, linear: nn.Linear, inputs: tuple[Tensor], y: Tensor) -> None:
        """Every use of the layer adds ``dy^T x``: this use of the weight only, so a tied embedding
        adds nothing."""
        x = inputs[0].detach().to(self.dtype).flatten(0, -2)  # [t, in]

        def add(dy: Tensor) -> None:
            self.grad_now += dy.to(self.dtype).flatten(0, -2).T @ x  # [out, in]

        if y.requires_grad:
            y.register_hook(add)

    def forget_importance(self) -> None:
        self.importance, self.uncertainty = self.zeros(), self.zeros()

    def observe(self, config: Config) -> None:
        """Eqs. 3-5 with W before the update."""
        beta1, beta2 = config.importance_beta1, config.importance_beta2
        self.importance, self.uncertainty = importance_update_ref(
            self.importance,
            self.uncertainty,
            self.linear.weight.detach(),
            self.grad_now,
            beta1,
            beta2,
        )

    def update(self, grad: Tensor, lr: float, config: Config) -> None:
        """AdamW (decoupled decay) on the subnet's entries, then their write into W in W's dtype."""
        g = cut(grad, self.out_idx, self.in_idx)
        beta1, beta2 = config.betas
        self.step += 1
        self.exp_avg = beta1 * self.exp_avg + (1 - beta1) * g
        self.exp_avg_sq = beta2 * self.exp_avg_sq + (1 - beta2) * g**2
        m_hat = self.exp_avg / (1 - beta1**self.step)
        v_hat = self.exp_avg_sq / (1 - beta2**self.step)
        decay = lr * config.weight_decay * self.master
        self.master = self.master - decay - lr * m_hat / (v_hat.sqrt() + config.eps)
        with torch.no_grad():
            weight = self.linear.weight
            weight[self.out_idx[:, None], self.in_idx] = self.master.to(weight.dtype)

    def relocalize(self, grad: Tensor, config: Config) -> None:
        """Algorithm 1 on this matrix's own score; new master, zero moments, and the Adam step from
        0 again."""
        k_out, k_in = len(self.out_idx), len(self.in_idx)
        if config.importance == "marginal":  # row sums of an EMA are the EMA of the row sums
            sums = self.importance.sum(dim=1), self.importance.sum(dim=0)
            out_idx, in_idx = select_marginal_ref(*sums, k_out, k_in, config.alignment)
        else:
            if config.importance == "gradient":  # ablation GL: |g| of the slot's last step
                score = importance_ref(self.linear.weight.detach(), grad, "gradient")
            else:
                score = score_ref(self.importance, self.uncertainty)  # Eq. 6
            if self.all_in:
                out_idx, in_idx = (
                    select_outputs_ref(score, k_out, config.alignment),
                    list(range(k_in)),
                )
            else:
                out_idx, in_idx = select_ref(score.numpy(), k_out, k_in, config.alignment)
        self.place(torch.tensor(out_idx), torch.tensor(in_idx))
        self.forget_importance()
        if config.reset_step:
            self.step = 0


class Training:
    """``groups``: per layer group, in model order, name -> layer; an output layer with a subnet is
    group 0.

    ``initial``: name -> ``(out_idx, in_idx)``, whose lengths are the sizes of the subnet;
    ``in_idx`` None marks the output layer. ``dense``: layers trained whole, outside the timeline
    (an output layer with p_o = 1). ``loss_fn(model, batch)`` is the mean loss of a micro-batch.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, nn.Linear]],
        initial: dict[str, tuple[Tensor, Tensor | None]],
        config: Config,
        loss_fn: Callable[[nn.Module, object], Tensor],
        dense: dict[str, nn.Linear] | None = None,
    ):
        self.model, self.config, self.loss_fn = model, config, loss_fn
        self.groups = [
            {name: Matrix(linear, *initial[name]) for name, linear in group.items()}
            for group in groups
        ]
        self.dense = {name: Matrix(linear, None, None) for name, linear in (dense or {}).items()}
        self.moved = {name: matrix for group in self.groups for name, matrix in group.items()}
        self.history: list[Step] = []

    def step(self, micro_batches: list, lr: float) -> Step:
        """One optimizer step: one tick of the timeline, however many micro-batches are
        accumulated."""
        config, s = self.config, len(self.history)
        clock = (len(self.groups), config.period, config.update_type)
        matrices = self.moved | self.dense
        total = {name: matrix.zeros() for name, matrix in matrices.items()}
        losses = []
        for batch in micro_batches:
            for matrix in matrices.values():
                matrix.grad_now = matrix.zeros()
            loss = self.loss_fn(self.model, batch)
            loss.backward()
            self.model.zero_grad()  # the hooks have all that is needed
            losses.append(loss.item())
            for group in observing_ref(s, *clock):
                for matrix in self.groups[group].values():
                    matrix.observe(config)
            for name, matrix in matrices.items():
                total[name] += matrix.grad_now / len(micro_batches)

        rates = {name: lr for name in self.dense}
        for index, group in enumerate(self.groups):
            factor = rewarm_ref(s, index, *clock, config.warmup_steps) if config.rewarm else 1.0
            rates |= {name: lr * factor for name in group}
        for name, matrix in matrices.items():
            matrix.update(total[name], rates[name], config)
        for group in moving_ref(s, *clock):
            for name, matrix in self.groups[group].items():
                matrix.relocalize(total[name], config)

        subnets = {name: (matrix.out_idx, matrix.in_idx) for name, matrix in self.moved.items()}
        self.history.append(Step(losses, rates, subnets))
        return self.history[-1]
