"""The two ends: nothing trained (no method that adapts every layer can be faster), and everything
trained."""

from torch import nn

from .base import Method, Options, Prepared, adamw, count, stepper, trained_parameters


def _prepare_frozen(model: nn.Module, options: Options) -> Prepared:
    model.requires_grad_(False)
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()  # so that the backward runs through all blocks, as for every method
    return Prepared(model, update=lambda: None, trained=0)


def _prepare_full(model: nn.Module, options: Options) -> Prepared:
    model.requires_grad_(True)
    parameters = trained_parameters(model)
    return Prepared(model, stepper(adamw(parameters, lr=1e-5)), count(parameters))


FROZEN = Method(
    "frozen",
    "frozen weights (floor)",
    "all weights frozen: forward and dx, no update",
    _prepare_frozen,
)
FULL = Method(
    "full",
    "full fine-tuning",
    "all parameters, torch.optim.AdamW(fused), weights and moments in the model's dtype",
    _prepare_full,
)
