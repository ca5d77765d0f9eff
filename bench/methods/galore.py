"""GaLore: dense gradients, AdamW on their projection to rank 512; the authors' galore-torch."""

import torch
from torch import Tensor, nn

from .base import Method, Options, Prepared, count, decoder_linears, stepper
from .imports import import_peer

RANK, GAP, SCALE = 512, 200, 2.0  # the LoSiA paper's A.3


def _prepare(model: nn.Module, options: Options) -> Prepared:
    peer = import_peer("galore_torch")
    model.requires_grad_(False)
    weights = [linear.weight.requires_grad_() for linear in decoder_linears(model).values()]
    groups = [
        {
            "params": weights,
            "rank": RANK,
            "update_proj_gap": GAP,
            "scale": SCALE,
            "proj_type": "std",
        }
    ]
    optimizer = peer.GaLoreAdamW(groups, lr=1e-4, no_deprecation_warning=True)
    for weight in weights:
        _give_projection(optimizer, weight)
    return Prepared(model, stepper(optimizer), count(weights))


def _prepare_per_layer(model: nn.Module, options: Options) -> Prepared:
    peer = import_peer("galore_torch")
    model.requires_grad_(False)
    weights = [linear.weight.requires_grad_() for linear in decoder_linears(model).values()]
    for weight in weights:
        group = {
            "params": [weight],
            "rank": RANK,
            "update_proj_gap": GAP,
            "scale": SCALE,
            "proj_type": "std",
        }
        optimizer = peer.GaLoreAdamW([group], lr=1e-4, no_deprecation_warning=True)
        _give_projection(optimizer, weight)
        update = stepper(optimizer)
        weight.register_post_accumulate_grad_hook(lambda weight, update=update: update())
    return Prepared(model, update=lambda: None, trained=count(weights))


def _give_projection(optimizer: torch.optim.Optimizer, weight: Tensor) -> None:
    """A random projection that is never renewed: the cost of the SVD that would renew it is a row
    of its own."""
    projector_class = import_peer("galore_torch.galore_projector").GaLoreProjector
    projector = projector_class(RANK, update_proj_gap=10**9, scale=SCALE, proj_type="std")
    rank = min(RANK, *weight.shape)
    short = min(weight.shape)
    projection = torch.randn(short, rank, device=weight.device).mul_(short**-0.5).to(weight.dtype)
    tall = weight.shape[0] >= weight.shape[1]
    projector.ortho_matrix = projection.T.contiguous() if tall else projection
    optimizer.state[weight].update(projector=projector, step=1)


def project_once(gradient: Tensor) -> Tensor:
    """What GaLore does to one matrix every 200 steps: the SVD of ``[short, long]``, cut to
    ``[short, rank]``."""
    projector_class = import_peer("galore_torch.galore_projector").GaLoreProjector
    return projector_class(RANK).get_orthogonal_matrix(gradient, RANK, type="left")


GALORE = Method(
    "galore",
    "GaLore",
    "galore-torch GaLoreAdamW, rank 512, scale 2, gap 200, moments in the gradient's dtype; "
    "without the SVD",
    _prepare,
)
GALORE_PER_LAYER = Method(
    "galore-per-layer",
    "GaLore, layer by layer",
    "as galore, each weight updated in the backward as soon as its "
    "gradient is there, which is then freed; without the SVD",
    _prepare_per_layer,
)
