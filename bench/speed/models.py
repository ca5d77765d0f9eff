"""The models that are timed: their public configs, with random weights, which time like trained ones; and which subnets
a layer of them trains."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from losia_kernels import LoSiAConfig
from losia_kernels.finetune.estimate import LoSiA, ModelShape
from losia_kernels.layers.convert import SHARED_INPUTS

from ..harness.jobs import MissingPeer

GPU_BATCH, GPU_CONTEXT = 4, 2048  # the paper's Table 15


def _config(kind: str, hidden: int, wide: int, layers: int, heads: tuple, words: int, **more):
    attention = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    sizes = {"hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": layers}
    words = {"vocab_size": words, "max_position_embeddings": 8192}
    return {"model_type": kind, **sizes, **attention, **words, **more}


TIED = {"tie_word_embeddings": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-2-7b": _config("llama", 4096, 11008, 32, (32, 32), 32000),
    "llama-2-13b": _config("llama", 5120, 13824, 40, (40, 40), 32000),
    "llama-2-70b": _config("llama", 8192, 28672, 80, (64, 8), 32000),
    "llama-3-8b": _config("llama", 4096, 14336, 32, (32, 8), 128256),
    "gemma-2b": _config("gemma", 2048, 16384, 18, (8, 1), 256000, head_dim=256, **TIED),
    "qwen2.5-7b": _config("qwen2", 3584, 18944, 28, (28, 4), 152064),
    "smollm2-135m": _config("llama", 576, 1536, 30, (9, 3), 49152, **TIED),
}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_of(name: str) -> ModelShape:
    return ModelShape.from_config(CONFIGS[name])


@dataclass(frozen=True)
class Layer:
    """A decoder layer outside of its slot; the first two fields say where, the others are LoSiAConfig's."""

    model: str = "llama-2-7b"
    tokens: int = 8192
    rank_factor: float = 1 / 8
    shape: str = "square"
    alignment: int = 1

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        return shape_of(self.model).linears

    @property
    def subnets(self) -> dict[str, tuple[int, int]]:
        """``(k_out, k_in)`` of each linear."""
        chosen = LoSiA(rank_factor=self.rank_factor, shape=self.shape)
        runs = self.alignment
        sizes = chosen.sizes(shape_of(self.model)).items()
        return {name: (out // runs * runs, inner // runs * runs) for name, (out, inner) in sizes}

    @property
    def sharers(self) -> list[tuple[str, ...]]:
        """The linears that read one input, for each input."""
        shared = [names for names in SHARED_INPUTS if self.linears.keys() >= set(names)]
        alone = [name for name in self.linears if not any(name in names for names in shared)]
        return [*shared, *((name,) for name in alone)]

    def keeps_input(self, name: str) -> bool:
        """Whether it is kept whole, the parts that would be gathered of it being no smaller."""
        names = next(each for each in self.sharers if name in each)
        parts = sum(self.subnets[each][1] for each in names)
        return len(names) > 1 and parts >= self.linears[name][1]

    def turned(self, name: str) -> bool:
        """Whether the kernel works on the transposed gradient: both sides are gathered in the backward, and the longer
        one in the product."""
        k_out, k_in = self.subnets[name]
        return self.keeps_input(name) and k_in > k_out

    def __str__(self) -> str:
        chosen = "single neurons" if self.alignment == 1 else f"runs of {self.alignment}"
        return f"{self.model}, {self.tokens} tokens, p = {self.rank_factor:.3f}, {self.shape}, {chosen}"


PAPER = Layer()
DEFAULT = replace(PAPER, rank_factor=LoSiAConfig().rank_factor, shape=LoSiAConfig().shape)
QUARTER = replace(PAPER, rank_factor=1 / 4)


def build_model(name: str, device: torch.device, dtype: torch.dtype, **changes: Any) -> nn.Module:
    """The causal LM of ``name`` with random weights and SDPA attention; ``changes`` to its config, say fewer layers."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise MissingPeer(f"transformers cannot be imported: {error}") from None

    config = AutoConfig.for_model(**{**CONFIGS[name], **changes})
    config.use_cache = False
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


class Block(nn.Module):
    """One decoder layer of a model, under the name that it has in the model; ``[b, t, d]`` -> ``[b, t, d]``."""

    def __init__(self, causal_lm: nn.Module):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([causal_lm.model.layers[0]])
        self.model.rotary_emb = causal_lm.model.rotary_emb
        self.width = causal_lm.config.hidden_size

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        rotary = self.model.rotary_emb(hidden, positions)
        result = self.model.layers[0](
            hidden, position_embeddings=rotary, attention_mask=None, position_ids=positions
        )
        return result[0] if isinstance(result, tuple) else result


class Linears(nn.Module):
    """The seven linears of a decoder layer and nothing between them, under the names that they have in the model.

    q, k, v share one input, gate and up the same one here; o_proj reads q's output, down_proj gate's. Returns what is
    left over, ``(o, k, v, down, up)``."""

    def __init__(self, causal_lm: nn.Module):
        super().__init__()
        layer = causal_lm.model.layers[0]
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([nn.Module()])
        self.model.layers[0].self_attn, self.model.layers[0].mlp = nn.Module(), nn.Module()
        for part, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
            for name in names:
                linear = getattr(getattr(layer, part), f"{name}_proj")
                setattr(getattr(self.model.layers[0], part), f"{name}_proj", linear)
        self.width = causal_lm.config.hidden_size

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        attention, mlp = self.model.layers[0].self_attn, self.model.layers[0].mlp
        o = attention.o_proj(attention.q_proj(hidden))
        down = mlp.down_proj(mlp.gate_proj(hidden))
        return o, attention.k_proj(hidden), attention.v_proj(hidden), down, mlp.up_proj(hidden)


STACKS = {"linears": Linears, "block": Block}


def build_stack(name: str, stack: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    return STACKS[stack](build_model(name, device, dtype, num_hidden_layers=1, vocab_size=64))
