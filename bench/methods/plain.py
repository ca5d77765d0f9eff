"""The two ends: nothing trained (no method that adapts every layer can be faster), and everything trained."""

from torch import nn

from .base import Method, Options, Prepared, adamw, count, trained_parameters


def prepare_frozen(model: nn.Module, options: Options) -> Prepared:
    model.requires_grad_(False)
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()  # the backward shall run through all blocks, as for every method
    return Prepared(model, None, 0, lambda: model)


def prepare_full(model: nn.Module, options: Options) -> Prepared:
    parameters = trained_parameters(model.requires_grad_(True))
    return Prepared(model, adamw(parameters, options.lr), count(parameters), lambda: model)


FROZEN = Method("frozen", "frozen weights (floor)", prepare_frozen)
FULL = Method("full", "full fine-tuning", prepare_full)
