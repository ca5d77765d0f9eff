"""What other code has done to a model since its layers were made: told by name, with what to do."""

from collections.abc import Iterable, Iterator

from torch import nn

from .agreement import computed
from .foreign import is_offloaded
from .module import SubnetModule
from .targets import named_modules

_CONVERTED = "_losia_converted"  # on a model that apply_losia has converted: names of its layers
AGAIN = "change the model first and convert it then (remove_losia, the change, apply_losia)"


def note_converted_(model: nn.Module, names: Iterable[str]) -> None:
    """``model`` has its subnets in the layers of these names."""
    setattr(model, _CONVERTED, list(names))


def forget_converted_(model: nn.Module) -> None:
    """Undo ``note_converted_``, also inside a wrapper such as DistributedDataParallel."""
    for module in model.modules():
        module.__dict__.pop(_CONVERTED, None)


def check_unchanged(model: nn.Module, layers: Iterable[SubnetModule]) -> None:
    """Raise ValueError, naming it, for a layer that cannot be trained as it was made: another
    module has taken its place, its weight is computed, offloaded or shared now, or has another
    shape."""
    layers = list(layers)
    for problem in (
        *_replaced(model),
        *_missing(model, layers),
        *_copied(layers),
        *_shared(layers),
        *_unlike(layers),
    ):
        raise ValueError(problem)


def _replaced(model: nn.Module) -> Iterator[str]:
    for part in list(model.modules()):
        if _CONVERTED not in part.__dict__:
            continue
        now = named_modules(part)
        for name in part.__dict__[_CONVERTED]:
            found = now.get(name)  # none: a model may have lost blocks
            if found is not None and not any(isinstance(m, SubnetModule) for m in found.modules()):
                yield (
                    f"{name}: apply_losia gave it a subnet, but a plain {type(found).__name__} has "
                    f"taken its place since, as resize_token_embeddings and the like put one there, "
                    f"and would stay frozen: {AGAIN}"
                )


def _missing(model: nn.Module, layers: list[SubnetModule]) -> Iterator[str]:
    here = set(model.modules())
    for layer in layers:
        if layer not in here:
            yield (
                f"{layer.name}: the optimizer was made for it, but it is not in the model any more: "
                f"{AGAIN}, and make the optimizer last"
            )


def _copied(layers: list[SubnetModule]) -> Iterator[str]:
    names = [layer.name for layer in layers]
    for name in names:
        if names.count(name) > 1:
            yield (
                f"{name}: {names.count(name)} layers of the model go by that name, as after copying "
                f"a block or converting parts of the model apart: {AGAIN}"
            )


def _shared(layers: list[SubnetModule]) -> Iterator[str]:
    owner: dict[int, SubnetModule] = {}
    for layer in layers:
        first = owner.setdefault(id(layer.weight), layer)
        if first is not layer:
            yield (
                f"{first.name!r} and {layer.name!r} share one weight, which the subnets of both would "
                f"be written into: share the module, or {AGAIN} with one in exclude_modules"
            )


def _unlike(layers: list[SubnetModule]) -> Iterator[str]:
    for layer in layers:
        weight = layer.weight
        if not isinstance(weight, nn.Parameter):
            yield computed(layer.name)
        elif tuple(layer.matrix.shape) != layer.made_for:
            yield (
                f"{layer.name}: its weight is {tuple(layer.matrix.shape)}, but its subnet was made "
                f"for {layer.made_for}, as before resize_token_embeddings: {AGAIN}"
            )
        elif weight.is_meta and is_offloaded(layer):
            yield (
                f"{layer.name}: its weight is offloaded (on 'meta' until it is used), but a subnet "
                f"is written into a weight that stays: train without offloading"
            )
