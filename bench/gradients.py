"""The gate of layers and models: a method's gradients against dense autograd on the plain model."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from losia_kernels import LoSiALinear

from .harness import RedGate, gate_relative, gate_rule
from .methods import Method, Prepared

PEER_LIMIT = 0.05  # dx of a peer that starts as the plain model up to rounding (DoRA, PiSSA, float32 adapters)


def _cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Not ``model.to``: rotary frequencies are buffers in float32 and would come back rounded to
    the model's dtype."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


class Reference:
    """Dense gradients of a plain model, in its own dtype and in float64, before a method changes
    it.

    ``backward(model)`` runs forward and backward and returns dx; it may not need the model's dtype.
    """

    def __init__(self, model: nn.Module, backward: Callable[[nn.Module], Tensor]):
        self._backward = backward
        model.requires_grad_(True)
        self.eager_dx, self.eager = self._run(model)
        dtype = next(model.parameters()).dtype
        _cast_parameters(model, torch.float64)
        self.true_dx, self.truth = self._run(model)
        _cast_parameters(model, dtype)

    def _run(self, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        dx = self._backward(model)
        named = model.named_parameters(
            remove_duplicate=False
        )  # a tied output layer is under both names
        grads = {name: p.grad for name, p in named if p.grad is not None}
        model.zero_grad()
        return dx, grads

    def check(self, method: Method, prepared: Prepared) -> dict[str, dict[str, float]]:
        """Gate dx, every subnet's gradient, and that all gradients are finite. Leaves no gradients.
        Raises RedGate."""
        with torch.autocast(self.eager_dx.device.type, torch.bfloat16, enabled=prepared.autocast):
            dx = self._backward(prepared.module)
        if method.exact:
            passed = {"dx": gate_rule("dx", dx, self.eager_dx, self.true_dx)}
        else:
            passed = {"dx": gate_relative("dx", dx, self.true_dx, PEER_LIMIT)}
        worst = 0.0
        for name, layer in prepared.subnets.items():
            found = self._check_subnet(name, layer)
            if found["error"] / found["allowed"] >= worst:
                worst = found["error"] / found["allowed"]
                passed["subnet gradient"] = found
        for name, parameter in prepared.module.named_parameters():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                raise RedGate(f"the gradient of {name} is not finite")
        prepared.module.zero_grad()
        return passed

    def _check_subnet(self, name: str, layer: LoSiALinear) -> dict[str, float]:
        if layer.subnet.grad is None:
            raise RedGate(f"{name}: the subnet got no gradient")
        eager, truth = (
            layer.current_subnet.gather(grads[f"{name}.weight"])
            for grads in (self.eager, self.truth)
        )
        return gate_rule(f"{name}: subnet gradient", layer.subnet.grad, eager, truth)
