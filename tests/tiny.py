"""The models that the tests of the method train: small, fast, and with everything in them."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losia_kernels import LoSiAConfig, losia_layers

VOCAB, HIDDEN = 13, 8


# The paper's method but for the output layer, which is frozen, and the first subnets, which
# `calibrate` would place.
PAPER = {"shape": "square", "moves": "importance", "init_subnet": "calibrated"}


def paper(*values, **changes) -> LoSiAConfig:
    """A config of the paper's method with ``changes``."""
    size = {} if values else {"rank_factor": 1 / 8}
    return LoSiAConfig(*values, **size | PAPER | changes)


class Block(nn.Module):
    """A decoder block without attention: norm, a gated projection with and without bias,
    residual."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up_proj = nn.Linear(HIDDEN, 12, bias=False)
        self.down_proj = nn.Linear(12, HIDDEN)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down_proj(F.silu(self.up_proj(self.norm(x)))))


class TinyLM(nn.Module):
    """Causal LM with transformers' surface: ``model.layers``, ``lm_head``,
    ``get_output_embeddings``, ``.loss``."""

    def __init__(self, blocks: int = 2, tied: bool = False, dropout: float = 0.0):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.model.layers = nn.ModuleList(Block(dropout) for _ in range(blocks))
        self.model.norm = nn.LayerNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        x = self.model.embed_tokens(input_ids)  # [batch, t, hidden]
        for block in self.model.layers:
            x = block(x)
        logits = self.lm_head(self.model.norm(x))
        loss = (
            None
            if labels is None
            else F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())
        )
        return SimpleNamespace(loss=loss, logits=logits)


def tiny_lm(seed: int = 0, **options) -> TinyLM:
    """The same model for the same seed."""
    torch.manual_seed(seed)
    return TinyLM(**options)


def make_batches(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Keyword arguments of ``TinyLM.forward``: 3 sequences of 5 tokens each."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randint(VOCAB, (3, 6), generator=generator) for _ in range(count)]
    return [{"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]} for tokens in draws]


def take_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, *batches: dict[str, Tensor]
) -> float:
    """One optimizer step over the mean of the micro-batches' losses; returns the last one's."""
    for batch in batches:
        loss = model(**batch).loss
        (loss / len(batches)).backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer is given."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def places(model: nn.Module) -> dict[str, tuple[list[int], list[int]]]:
    """Where each layer's subnet is: its outputs and its inputs."""
    return {
        name: (layer.out_idx.tolist(), layer.in_idx.tolist()) for name, layer in losia_layers(model)
    }


def same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Same keys, same dtypes, same bits."""
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key])
        for key in first
    )


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {key: value.detach().clone() for key, value in module.state_dict().items()}
