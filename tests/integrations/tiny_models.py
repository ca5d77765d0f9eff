"""Tiny random models of the architectures that people fine-tune, each with a batch and the blocks
it should have."""

from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Family:
    """``linears``: names of a block's LoSiALinears, ``decoder_linears`` those of the second
    stack's; ``blocks``: names of the groups, without the output layer; ``frozen``: what the warning
    names."""

    model: str
    config: str
    linears: set[str]
    blocks: tuple[str, ...] = ("model.layers.0", "model.layers.1")
    options: dict = field(default_factory=dict)
    output_dim_factor: float = 0.25
    kind: str = "causal"
    decoder_linears: frozenset[str] | set[str] = frozenset()
    frozen: tuple[str, ...] = ()

    def make(self, seed: int = 0, **options) -> nn.Module:
        config = getattr(transformers, self.config)(**{**SIZES, **self.options, **options})
        torch.manual_seed(seed)
        model = getattr(transformers, self.model)(config)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.2)
        return model.train()

    def batch(self, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "image":
            return {
                "pixel_values": torch.randn(2, 3, 8, 8, generator=generator),
                "labels": torch.tensor([0, 2]),
            }
        ids = torch.randint(3, VOCABULARY, (2, 6), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
GATED = ATTENTION | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
BERT = {f"attention.self.{name}" for name in ("query", "key", "value")} | {
    f"{name}.dense" for name in ("attention.output", "intermediate", "output")
}
VIT = {f"attention.{name}_proj" for name in "qkvo"} | {"mlp.fc1", "mlp.fc2"}
T5_ATTENTION = {f"layer.0.SelfAttention.{name}" for name in "qkvo"}
T5_ENCODER = T5_ATTENTION | {f"layer.1.DenseReluDense.{name}" for name in ("wi", "wo")}
T5_DECODER = (
    T5_ATTENTION
    | {f"layer.1.EncDecAttention.{name}" for name in "qkvo"}
    | {f"layer.2.DenseReluDense.{name}" for name in ("wi", "wo")}
)

FAMILIES = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", GATED),
    "mistral": Family("MistralForCausalLM", "MistralConfig", GATED),
    "qwen2": Family(
        "Qwen2ForCausalLM", "Qwen2Config", GATED, options={"tie_word_embeddings": True}
    ),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", GATED, options={"attention_bias": True}),
    "gemma2": Family(
        "Gemma2ForCausalLM", "Gemma2Config", GATED, options={"final_logit_softcapping": 5.0}
    ),
    "gemma3": Family("Gemma3ForCausalLM", "Gemma3TextConfig", GATED),
    "phi3": Family(
        "Phi3ForCausalLM",
        "Phi3Config",
        {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"},
    ),
    "phi": Family(
        "PhiForCausalLM",
        "PhiConfig",
        {"self_attn.dense", "mlp.fc1", "mlp.fc2"} | {f"self_attn.{name}_proj" for name in "qkv"},
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
        ("transformer.h.0", "transformer.h.1"),
        {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
        ("gpt_neox.layers.0", "gpt_neox.layers.1"),
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        "MixtralConfig",
        ATTENTION,
        options=MOE,
        frozen=(
            "model.layers.*.mlp.gate (MixtralTopKRouter: weight)",
            "model.layers.*.mlp.experts (MixtralExperts: gate_up_proj, down_proj)",
        ),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        ATTENTION,
        options=MOE,
        frozen=(
            "model.layers.*.mlp.gate (Qwen3MoeTopKRouter: weight)",
            "model.layers.*.mlp.experts (Qwen3MoeExperts: gate_up_proj, down_proj)",
        ),
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        T5_ENCODER,
        ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"),
        {
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        },
        kind="seq2seq",
        decoder_linears=T5_DECODER,
    ),
    "bert": Family(
        "BertForMaskedLM",
        "BertConfig",
        BERT,
        ("bert.encoder.layer.0", "bert.encoder.layer.1"),
        NO_DROPOUT,
        kind="masked",
    ),
    "vit": Family(
        "ViTForImageClassification",
        "ViTConfig",
        VIT,
        ("vit.layers.0", "vit.layers.1"),
        NO_DROPOUT | {"image_size": 8, "patch_size": 4, "num_labels": 3},
        0.0,
        "image",
    ),
}
