"""The gates without which there is no figure: of a kernel against float64, of a model against dense autograd."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

SLACK = 1e-6
PEER_LIMIT = 0.05  # dx of a peer that starts as the plain model up to rounding (DoRA, PiSSA, float32 adapters)


class RedGate(Exception):
    """A result is wrong; its time is not reported."""


def _difference(what: str, value: Tensor, truth: Tensor) -> Tensor:
    """In float64. Raises RedGate for another shape, which a subtraction would spread over the truth's."""
    if value.shape != truth.shape:
        raise RedGate(f"{what}: a result of {tuple(value.shape)}, expected {tuple(truth.shape)}")
    return value.double() - truth.double()


def _max_error(what: str, value: Tensor, truth: Tensor) -> float:
    error = _difference(what, value, truth).abs().max().item() if truth.numel() else 0.0
    return error if error == error else float("inf")


def gate_rule(what: str, value: Tensor, eager: Tensor, truth: Tensor) -> dict[str, float]:
    """The kernels' rule: at most twice the error of plain torch in the same dtype, plus 1e-6. Raises RedGate."""
    error = _max_error(what, value, truth)
    allowed = 2 * _max_error(f"{what}, eager", eager, truth) + SLACK
    if not error <= allowed < float("inf"):  # of a broken eager form nothing follows
        raise RedGate(f"{what}: error {error:.3e}, allowed {allowed:.3e}")
    return {"error": error, "allowed": allowed}


def gate_relative(what: str, value: Tensor, truth: Tensor, allowed: float) -> dict[str, float]:
    """``|value - truth| / |truth|``, Frobenius norms: for a peer, that may round where it likes. Raises RedGate."""
    norm = truth.double().norm().item()
    error = _difference(what, value, truth).norm().item() / max(norm, 1e-30)
    if not error <= allowed:
        raise RedGate(f"{what}: relative error {error:.3e}, allowed {allowed:.3e}")
    return {"error": error, "allowed": allowed}


class Reference:
    """Dense gradients of a plain model, in its own dtype and in float64, before a method changes it.

    ``backward(model)`` runs forward and backward and returns dx; it may not need the model's dtype."""

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
        named = model.named_parameters(remove_duplicate=False)  # a tied output layer has two names
        grads = {name: p.grad for name, p in named if p.grad is not None}
        model.zero_grad()
        return dx, grads

    def check(self, prepared, exact: bool) -> dict[str, dict[str, float]]:
        """Gate dx, every subnet's gradient, and that all gradients are finite, of a method's ``Prepared``; ``exact``:
        it starts as the plain model to the last bit. Leaves no gradients. Raises RedGate."""
        with torch.autocast(self.eager_dx.device.type, torch.bfloat16, enabled=prepared.autocast):
            dx = self._backward(prepared.module)
        if exact:
            passed = {"dx": gate_rule("dx", dx, self.eager_dx, self.true_dx)}
        else:
            passed = {"dx": gate_relative("dx", dx, self.true_dx, PEER_LIMIT)}
        found = [self._check_subnet(name, layer) for name, layer in prepared.subnets.items()]
        if found:
            passed["subnet gradient"] = max(found, key=lambda one: one["error"] / one["allowed"])
        for name, parameter in prepared.module.named_parameters():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                raise RedGate(f"the gradient of {name} is not finite")
        prepared.module.zero_grad()
        return passed

    def _check_subnet(self, name: str, layer) -> dict[str, float]:
        if layer.subnet.grad is None:
            raise RedGate(f"{name}: the subnet got no gradient")
        take, key = layer.current_subnet.gather, f"{name}.weight"
        eager, truth = take(self.eager[key]), take(self.truth[key])
        return gate_rule(f"{name}: subnet gradient", layer.subnet.grad, eager, truth)


def _cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Not ``model.to``: rotary frequencies are buffers in float32 and would come back rounded to the model's dtype."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
