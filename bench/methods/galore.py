"""GaLore: dense gradients, AdamW on their projection; the authors' galore-torch."""

import torch
from torch import Tensor, nn

from .base import Method, Options, Prepared, count, decoder_linears, import_peer

RANK, GAP, SCALE = 512, 200, 2.0  # the LoSiA paper's A.3


def optimizer_of(
    weights: list[nn.Parameter], rank: int, lr: float, others=()
) -> torch.optim.Optimizer:
    group = {"params": weights, "rank": rank, "update_proj_gap": GAP, "scale": SCALE}
    groups = [{"params": list(others)}] * bool(others) + [{**group, "proj_type": "std"}]
    peer = import_peer("galore_torch")
    return peer.GaLoreAdamW(groups, lr=lr, weight_decay=0.0, no_deprecation_warning=True)


def prepare(model: nn.Module, options: Options) -> Prepared:
    model.requires_grad_(False)
    weights = [linear.weight.requires_grad_() for linear in decoder_linears(model).values()]
    optimizer = optimizer_of(weights, RANK, options.lr)
    for weight in weights:
        _give_projection(optimizer, weight)
    return Prepared(model, optimizer, count(weights))


def prepare_per_layer(model: nn.Module, options: Options) -> Prepared:
    model.requires_grad_(False)
    weights = [linear.weight.requires_grad_() for linear in decoder_linears(model).values()]
    for weight in weights:
        optimizer = optimizer_of([weight], RANK, options.lr)
        _give_projection(optimizer, weight)
        update = Prepared(model, optimizer, 0).update
        weight.register_post_accumulate_grad_hook(lambda weight, update=update: update())
    return Prepared(model, None, count(weights))


def prepare_whole(model: nn.Module, options: Options) -> Prepared:
    """As its README: the projection for the decoder's linears, plain AdamW for all other parameters."""
    model.requires_grad_(True)
    projected = [linear.weight for linear in decoder_linears(model).values()]
    of_linears = set(map(id, projected))
    others = [p for p in model.parameters() if id(p) not in of_linears]
    rank = max(1, model.config.hidden_size // 8)  # the paper's 512 for a hidden size of 4096
    optimizer = optimizer_of(projected, rank, options.lr, others)
    return Prepared(model, optimizer, count(model.parameters()), lambda: model)


def _projector(**more):
    return import_peer("galore_torch.galore_projector").GaLoreProjector(RANK, **more)


def _give_projection(optimizer: torch.optim.Optimizer, weight: Tensor) -> None:
    """A random projection that is never renewed: the cost of the SVD that would renew it is a row of its own."""
    projector = _projector(update_proj_gap=10**9, scale=SCALE, proj_type="std")
    rank, short = min(RANK, *weight.shape), min(weight.shape)
    projection = torch.randn(short, rank, device=weight.device).mul_(short**-0.5).to(weight.dtype)
    tall = weight.shape[0] >= weight.shape[1]
    projector.ortho_matrix = projection.T.contiguous() if tall else projection
    optimizer.state[weight].update(projector=projector, step=1)


def project_once(gradient: Tensor) -> Tensor:
    """What GaLore does to one matrix every 200 steps: the SVD of ``[short, long]``, cut to ``[short, rank]``."""
    return _projector().get_orthogonal_matrix(gradient, RANK, type="left")


GALORE = Method("galore", "GaLore", prepare)
GALORE_PER_LAYER = Method("galore-per-layer", "GaLore, layer by layer", prepare_per_layer)
