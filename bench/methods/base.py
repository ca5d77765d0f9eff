"""What every method gives the harness, and the errors it may raise instead."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from losia_kernels import LoSiALinear


@dataclass(frozen=True)
class Options:
    """Sizes that methods differ by; each reads its own."""

    rank_factor: float = 1 / 8
    output_dim_factor: float = 0.0
    rank: int = 64


@dataclass
class Prepared:
    """A model that one method trains. ``update`` is the optimizer's step and the clearing of the
    gradients."""

    module: nn.Module
    update: Callable[[], None]
    trained: int
    autocast: bool = False  # float32 adapters in a 16-bit model, as Trainer(bf16=True) runs them
    subnets: dict[str, LoSiALinear] = field(
        default_factory=dict
    )  # whose gradient the gate compares with autograd's


@dataclass(frozen=True)
class Method:
    """``prepare(model, options)`` changes a plain model in place into what the method trains."""

    name: str
    title: str
    configuration: str
    prepare: Callable[[nn.Module, Options], Prepared]
    options: tuple[str, ...] = ()  # the fields of Options that matter
    exact: bool = True  # starts as the plain model to the last bit, so dx must be autograd's


class MissingPeer(Exception):
    """The library is not installed, or says itself that it cannot run here."""


class UnknownMethod(ValueError):
    """No method of that name."""


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears of the decoder blocks: what every method here trains."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layers." in name
    }


def target_names(model: nn.Module) -> list[str]:
    """Last components of the names of the decoder's linears, as PEFT's target_modules wants
    them."""
    return sorted({name.rsplit(".", 1)[-1] for name in decoder_linears(model)})


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """torch's fastest AdamW, which also needs no temporaries."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)


def stepper(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return update


def count(parameters: Iterator[nn.Parameter] | list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
