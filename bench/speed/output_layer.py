"""The output layer's loss, forward and backward: ours, torch's linear and cross_entropy, Liger's, cut-cross-entropy's.

``p_o`` is the share of the vocabulary whose rows get a weight gradient: 0 is a frozen head, 1 a dense one; the peers
know no other. The gate compares the loss and every gradient with float64 on a part of the tokens."""

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from losia_kernels import losia_linear_cross_entropy

from ..harness.gates import gate_relative
from ..harness.jobs import Job, MissingPeer
from ..harness.live_bytes import peak_bytes
from ..harness.timing import measure
from .models import name_of

GATE_TOKENS = 256
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 0.02}  # relative, in Frobenius norms


@dataclass
class Inputs:
    """``hidden [t, d]``, ``weight [V, d]``, ``labels [t]`` and the rows that are trained."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    out_idx: Tensor
    subnet: Tensor

    @classmethod
    def make(cls, tokens: int, vocabulary: int, hidden: int, p_o: float, device, dtype) -> "Inputs":
        generator = torch.Generator(device).manual_seed(0)
        like = {"generator": generator, "device": device}
        weight = torch.randn(vocabulary, hidden, **like).mul_(hidden**-0.5).to(dtype)
        hidden = torch.randn(tokens, hidden, **like).to(dtype).requires_grad_()
        labels = torch.randint(vocabulary, (tokens,), **like)
        out_idx = torch.randperm(vocabulary, **like)[: int(p_o * vocabulary)].sort().values
        return cls(hidden, weight, labels, out_idx, weight[out_idx].float().requires_grad_())

    def first(self, tokens: int) -> "Inputs":
        hidden = self.hidden.detach()[:tokens].requires_grad_()
        subnet = self.subnet.detach().requires_grad_()
        return Inputs(hidden, self.weight, self.labels[:tokens], self.out_idx, subnet)

    @property
    def dense(self) -> bool:
        return len(self.out_idx) == len(self.weight)


Gradients = tuple[Tensor, Tensor, Tensor | None]  # loss, of the hidden state, of the trained rows


def losia(x: Inputs) -> Gradients:
    if len(x.out_idx) == 0:
        loss = losia_linear_cross_entropy(x.hidden, x.weight, x.labels)
        return loss, *torch.autograd.grad(loss, x.hidden), None
    rows = x.subnet, None if x.dense else x.out_idx
    loss = losia_linear_cross_entropy(x.hidden, x.weight, x.labels, *rows)
    return loss, *torch.autograd.grad(loss, (x.hidden, x.subnet))


def _peer(x: Inputs, loss_of: Callable[[Tensor], Any]) -> Gradients:
    """``loss_of(weight)``, whose weight gets a gradient if all rows do."""
    weight = x.weight.detach().requires_grad_(x.dense)
    loss = loss_of(weight)
    loss = loss[0] if isinstance(loss, tuple) else loss
    if not x.dense:
        return loss, *torch.autograd.grad(loss, x.hidden), None
    return loss, *torch.autograd.grad(loss, (x.hidden, weight))


def plain_torch(x: Inputs) -> Gradients:
    return _peer(x, lambda weight: F.cross_entropy(F.linear(x.hidden, weight).float(), x.labels))


def liger(x: Inputs) -> Gradients:
    function = _import("liger_kernel.ops", "LigerFusedLinearCrossEntropyFunction", x).apply
    return _peer(x, lambda weight: function(x.hidden, weight, x.labels))


def cut_cross_entropy(x: Inputs) -> Gradients:
    function = _import("cut_cross_entropy", "linear_cross_entropy", x)
    return _peer(x, lambda weight: function(x.hidden, weight, x.labels))


def _import(module: str, name: str, inputs: Inputs) -> Any:
    if not inputs.hidden.is_cuda:
        raise MissingPeer(f"{module} runs on a GPU only")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise MissingPeer(f"{module}: {error}") from None


METHODS = {"losia": losia, "torch": plain_torch, "liger": liger}
METHODS |= {"cut-cross-entropy": cut_cross_entropy}


def gate(method: Callable[[Inputs], Gradients], inputs: Inputs) -> list[dict[str, float]]:
    part = inputs.first(GATE_TOKENS)
    hidden = part.hidden.detach().double().requires_grad_()
    weight = part.weight.double().requires_grad_()
    loss = F.cross_entropy(hidden @ weight.T, part.labels)
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    truth = loss.detach(), d_hidden, d_weight[part.out_idx]
    names, allowed = ("loss", "d_hidden", "d_weight"), ALLOWED[inputs.hidden.dtype]
    found = [each for each in zip(names, method(part), truth, strict=True) if each[1] is not None]
    return [gate_relative(name, value.detach(), exact, allowed) for name, value, exact in found]


def run(method: Callable[[Inputs], Gradients], inputs: Inputs, device) -> dict[str, Any]:
    """Time of forward and backward, and the most bytes alive beyond the inputs."""
    passed = gate(method, inputs)
    timing = measure({"total": lambda number: method(inputs)}, device)["total"]
    extra = peak_bytes(lambda: method(inputs), device)
    return {"gate": passed, "total": timing.to_dict(), "extra_bytes": extra}


def run_size(name: str, device, dtype, **size) -> dict[str, Any]:
    return run(METHODS[name], Inputs.make(**size, device=device, dtype=dtype), device)


def jobs(device: torch.device, dtype: torch.dtype) -> Iterator[Job]:
    gpu = device.type == "cuda"
    sizes = [(32_000, 4096), (128_256, 4096), (256_000, 2048)] if gpu else [(49_152, 576)]
    for (vocabulary, width), p_o, name in itertools.product(sizes, (0, 1 / 64, 1 / 8, 1), METHODS):
        if name == "losia" or p_o in (0, 1):
            size = {"tokens": 8192 if gpu else 512, "vocabulary": vocabulary}
            size |= {"hidden": width, "p_o": p_o}
            run = functools.partial(run_size, name, device, dtype, **size)
            yield Job("output_layer", name, {**size, "dtype": name_of(dtype)}, run, 40)
