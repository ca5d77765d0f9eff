"""The public surface with annotations, as a user writes them: mypy checks this file, pytest does
not run it."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from losia_kernels import (
    LoSiAAdamW,
    LoSiAConfig,
    LoSiALinear,
    Subnet,
    apply_losia,
    attach,
    calibrate,
    export_state_dict,
    losia_linear_cross_entropy,
    ops,
    remove_losia,
    select_subnet,
    start_from_frequency,
)
from losia_kernels.checkpoint.delta import apply_delta, make_delta, verify_delta
from losia_kernels.checkpoint.lora import export_lora
from losia_kernels.checkpoint.resumable import load_checkpoint, save_checkpoint
from losia_kernels.training.timeline import Timeline


def train(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    config = LoSiAConfig(
        rank_factor=1 / 8, period=100, target_modules=["q_proj"], rank_pattern={"down_proj": 1 / 4}
    )
    converted: nn.Module = apply_losia(model, config)
    calibrate(converted, batches, steps=4)
    start_from_frequency(converted, batches)
    optimizer = LoSiAAdamW(
        converted, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, total_steps=1000
    )
    timeline: Timeline = optimizer.timeline
    timeline.loss_divisor = 4
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_checkpoint("run/step-1", model, optimizer, extra={"step": timeline.step})
    load_checkpoint(Path("run/step-1"), model, optimizer)
    plain: dict[str, Tensor] = export_state_dict(model)
    remove_losia(model).eval()
    return plain


def any_optimizer(model: nn.Module) -> Timeline:
    return attach(torch.optim.AdamW(model.parameters(), lr=1e-4), model)


def one_layer(linear: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    layer: LoSiALinear = LoSiALinear.from_linear(linear, rank_factor=(1 / 8, 1 / 4))
    subnet: Subnet = layer.current_subnet
    layer.set_subnet_(subnet.out_idx, subnet.in_idx)
    layer.write_back_()
    layer.to_plain()
    y: Tensor = layer(x)
    return y + losia_linear_cross_entropy(x, layer.weight, labels, layer.subnet, layer.out_idx)


def functions(score: Tensor, x: Tensor, dy: Tensor) -> Subnet:
    subnet: Subnet = select_subnet(score, 4, 4)
    k_out, k_in = subnet.shape
    x_sub: Tensor = ops.gather_features(x, subnet.in_idx)
    grad: Tensor = ops.subnet_grad(dy, x_sub, subnet.out_idx)
    out_sums, in_sums = ops.importance_marginals(score, grad)
    ops.gather_features(x, "in_idx")  # type: ignore[arg-type]  # a mistake must be one to mypy
    return Subnet(out_sums[:k_out].long(), in_sums[:k_in].long())


def folders(base: Path, trained: Path) -> str:
    make_delta(base, trained, "delta")
    apply_delta(base, "delta", "again")
    export_lora(base, trained, "adapter", rank=16)
    return verify_delta(base, "delta")
