"""Disjoint blocks of every linear's weight, in plain torch: after DiaBlo (arXiv 2506.03230), whose diagonal blocks are
here at random places, and after PaCA (arXiv 2503.01905). Neither comes as a library."""

import torch
from torch import Tensor, nn

from .base import Method, Options, Prepared, adamw, count, decoder_linears, trained_parameters


class BlocksLinear(nn.Module):
    """A frozen linear and what is added to disjoint blocks of its weight, from zero, which is to train them in place:
    block b is ``weight[out_idx[b]][:, in_idx[b]]``."""

    def __init__(self, linear: nn.Linear, out_idx: Tensor, in_idx: Tensor):
        super().__init__()
        self.linear = linear
        self.register_buffer("out_idx", out_idx)  # [blocks, k_out]
        self.register_buffer("in_idx", in_idx)  # [blocks, k_in]
        blocks, k_out = out_idx.shape
        self.values = nn.Parameter(linear.weight.new_zeros(blocks, k_out, in_idx.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        added = torch.einsum("...bi,boi->...bo", x[..., self.in_idx], self.values)
        return self.linear(x).index_add(-1, self.out_idx.flatten(), added.flatten(-2))

    @torch.no_grad()
    def to_plain(self) -> nn.Linear:
        places = self.out_idx[:, :, None], self.in_idx[:, None, :]
        self.linear.weight[places] += self.values
        return self.linear


def random_blocks(linear: nn.Linear, blocks: int, generator: torch.Generator) -> BlocksLinear:
    """Disjoint blocks over all outputs and all inputs: ``1 / blocks`` of the weight.

    Raises ValueError if ``blocks`` does not divide both sides."""
    sides = linear.out_features, linear.in_features
    if any(side % blocks for side in sides):
        raise ValueError(f"{blocks} equal blocks do not cover a linear of {sides} (out, in)")
    idx = (torch.randperm(side, generator=generator).view(blocks, -1) for side in sides)
    return BlocksLinear(linear, *(each.to(linear.weight.device) for each in idx))


def random_columns(linear: nn.Linear, columns: int, generator: torch.Generator) -> BlocksLinear:
    """All weights from ``columns`` inputs, the fewer where a linear has no more."""
    in_idx = torch.randperm(linear.in_features, generator=generator)[:columns]
    idx = torch.arange(linear.out_features)[None], in_idx[None]
    return BlocksLinear(linear, *(each.to(linear.weight.device) for each in idx))


def prepare(model: nn.Module, options: Options, make, size: int) -> Prepared:
    """Every linear of the decoder blocks made one of blocks by ``make``, at places drawn from the run's seed."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(options.seed)
    names = list(decoder_linears(model))
    for name in names:
        model.set_submodule(name, make(model.get_submodule(name), size, generator))
    parameters = trained_parameters(model)

    def finish() -> nn.Module:
        for name in names:
            model.set_submodule(name, model.get_submodule(name).to_plain())
        return model

    return Prepared(model, adamw(parameters, options.lr), count(parameters), finish)


def method(name: str, title: str, make, size: int, settings: str, lrs: tuple) -> Method:
    def start(model: nn.Module, options: Options) -> Prepared:
        return prepare(model, options, make, size)

    return Method(name, title, start, settings=f"plain torch; {settings}", lrs=lrs)
