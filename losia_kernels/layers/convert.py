"""Turn a model's linears into LoSiALinears, in place, and back."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..config import LoSiAConfig
from ..parallel.placement import fingerprint
from ..parallel.ranks import several_processes
from .foreign import check_no_adapters
from .fused_loss import fuse_loss, unfuse_loss
from .idle import (
    warn_of_frozen,
    warn_of_outside,
    warn_of_unmatched,
    warn_of_unused,
)
from .inputs import SharedInput
from .linear import LoSiALinear
from .module import SubnetModule, as_they_are, losia_layers
from .targets import (
    Target,
    find_targets,
    kind_of,
    plain_name,
)
from .unchanged import forget_converted_, note_converted_

SUBNET_KEYS = ("subnet", "out_idx", "in_idx")
SHARED_INPUTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
# on a converted model, by name: whether a parameter required a gradient before, and after
_FOUND = "_losia_found_trained"


def apply_losia(
    model: nn.Module, config: LoSiAConfig | None = None, output_layer: str | None = None
) -> nn.Module:
    """Replace the target linears of ``model`` by LoSiALinears, in place, and freeze all that is not
    trained.

    A target is an nn.Linear or GPT-2's Conv1D. Other weights in the blocks (a mixture's fused
    experts) stay frozen, as a warning says. Groups follow the model's blocks in order (Section
    3.3); an output layer that is trained (``config.output_dim_factor``) comes first. Initial
    subnets are drawn from ``config.seed``, the same in every process. Warns of patterns in
    ``exclude_modules`` and ``rank_pattern`` that match nothing.

    Args:
        config: None is ``LoSiAConfig()``.
        output_layer: names the vocabulary projection of a model without ``get_output_embeddings``.

    Returns:
        The model.

    Raises:
        ValueError: nothing matches, a name or the output layer cannot be found, a target is
            quantized, is no plain linear or shares its weight with another target, the model holds
            PEFT adapters or LoSiALinears, or a rank factor selects no neuron; the model is then as
            it was.
        TypeError: ``config`` is no LoSiAConfig.
    """
    config = LoSiAConfig() if config is None else config
    if not isinstance(config, LoSiAConfig):
        raise TypeError(f"apply_losia: config must be a LoSiAConfig, got {type(config).__name__}")
    _check_plain(model)
    check_no_adapters(model)
    plan = find_targets(model, config, output_layer)
    found = {
        plain_name(name): parameter.requires_grad for name, parameter in model.named_parameters()
    }
    layers = _make_layers(plan.targets, config)
    _share_inputs({layer.name: layer for layer in layers.values()})
    model.requires_grad_(False)
    for module in plan.saved:
        module.requires_grad_(True)
    _replace(model, layers)
    note_converted_(model, [layer.name for layer in layers.values()])
    now = {plain_name(name): p.requires_grad for name, p in model.named_parameters()}
    setattr(model, _FOUND, {name: (found[name], now[name]) for name in found.keys() & now.keys()})
    warn_of_unmatched(model, plan, config)
    warn_of_unused(plan, config)
    if config.target_modules == "all-linear":
        warn_of_frozen(model, plan, config)
        warn_of_outside(plan)
    if config.fused_loss and plan.output_layer is not None:
        fuse_loss(model, plan.output_layer)
    return model


def _check_plain(model: nn.Module) -> None:
    for name, layer in losia_layers(model):
        if layer.membership is not None and not layer.membership.by_hand:
            raise ValueError(
                "apply_losia: the model has LoSiALinears already; call remove_losia first"
            )
        raise ValueError(
            f"apply_losia: {name} is a {type(layer).__name__} that was placed by hand; such layers "
            f"need no apply_losia, the optimizer takes their config: LoSiAAdamW(model, "
            f"config=config)"
        )


def _make_layers(targets: list[Target], config: LoSiAConfig) -> dict[nn.Module, LoSiALinear]:
    """A layer for each target's module; nothing has changed if one cannot be made."""
    generator = torch.Generator().manual_seed(config.seed)
    layers: dict[nn.Module, LoSiALinear] = {}
    try:
        for target in targets:
            kind = kind_of(target.module)
            assert kind is not None  # of a target
            layer = kind.from_linear(
                target.module,
                target.factors,
                master=config.master == "float32",
                generator=generator,
                name=target.name,
                alignment=config.alignment,
            )
            layer.membership = target.membership
            layer.fingerprint = fingerprint(layer.weight) if several_processes() else None
            layers[target.module] = layer
    except ValueError:
        for layer in reversed(layers.values()):  # two may share a bias
            _give_back_flags(layer)
        raise
    return layers


def remove_losia(model: nn.Module) -> nn.Module:
    """Turn every LoSiALinear back into an nn.Linear, in place: the original architecture with the
    trained weights, which require gradients where they did before.

    Returns:
        The model; the nn.Linear of a model that is one LoSiALinear.
    """
    unfuse_loss(model)
    forget_converted_(model)
    layers = [layer for _, layer in losia_layers(model)]
    _finish_steps(layers)
    plain: dict[nn.Module, nn.Module] = {layer: layer.to_plain() for layer in layers}
    _replace(model, plain)
    for layer in reversed(layers):  # two may share a tensor: the first one found it as it was
        _give_back_flags(layer)
    for module in model.modules():  # the model may have been wrapped since
        found = module.__dict__.pop(_FOUND, {})
        for name, parameter in module.named_parameters():
            before, since = found.get(plain_name(name), (None, None))
            if parameter.requires_grad == since:  # else somebody else has set it
                parameter.requires_grad_(before)
    return plain.get(model, model)  # a model may be one layer


def export_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """``model.state_dict()`` with the original model's keys and nothing else (DDP and compile
    prefixes dropped). Changes nothing in the model: where a subnet was written whose values its
    weight does not have yet, the weight is a copy that has them."""
    named = model.named_modules(remove_duplicate=False)
    layers = {name: module for name, module in named if isinstance(module, SubnetModule)}
    extra = {f"{name}.{key}".removeprefix(".") for name in layers for key in SUBNET_KEYS}
    inner = getattr(model, "_orig_mod", model)  # torch.compile around DDP, or the other way round
    prefix = "module." if isinstance(inner, nn.parallel.DistributedDataParallel) else ""
    with as_they_are():
        state_dict = model.state_dict(keep_vars=True)
    # by the weight's identity: it may be tied, and stand under other keys too
    current = {id(layer.weight): layer.current_weight() for layer in set(layers.values())}
    return {
        key.replace("_orig_mod.", "").removeprefix(prefix): current.get(id(value), value.detach())
        if isinstance(value, Tensor)
        else value
        for key, value in state_dict.items()
        if key not in extra
    }


def _finish_steps(layers: Iterable[SubnetModule]) -> None:
    """Write back what an optimizer that knows nothing of the weight has stepped."""
    for layer in layers:
        layer.sync_(finish=True)


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that are trained but are no subnet (``modules_to_save``)."""
    subnets = {id(layer.subnet) for _, layer in losia_layers(model)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in subnets:
            yield name, parameter


def _share_inputs(layers: dict[str, LoSiALinear]) -> None:
    """Let layers that read one input gather from it together, or keep it whole, once, where the
    parts that they would gather are no smaller.

    Which do is known from their names: a guess that is wrong keeps what plain linears would have
    kept, and no more.
    """
    for parent in {name.rpartition(".")[0] for name in layers}:
        for names in SHARED_INPUTS:
            sharers = [
                layers[full]
                for name in names
                if (full := f"{parent}.{name}".removeprefix(".")) in layers
            ]
            if len(sharers) > 1 and len({layer.in_features for layer in sharers}) == 1:
                keeps = sum(layer.subnet.shape[1] for layer in sharers) >= sharers[0].in_features
                shared = SharedInput(sharers)
                for layer in sharers:
                    layer.keeps_input, layer.shared_input = keeps, shared


def _give_back_flags(layer: SubnetModule) -> None:
    for key, required in layer.found_trained.items():
        getattr(layer, key).requires_grad_(required)


def _replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put ``new[module]`` wherever ``module`` is: it may be registered under several names."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new:
                setattr(parent, name, new[child])
                if name == "_orig_mod":  # torch.compile's module holds the call of its own, too
                    parent._initialize()  # type: ignore[operator]
