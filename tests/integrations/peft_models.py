"""Tiny random stand-ins for the hub's models that PEFT's tests name, in folders of those names."""

from pathlib import Path

import torch
import transformers

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA = {"num_key_value_heads": 2}
OPT = {"word_embed_proj_dim": 16, "ffn_dim": 32}
GPTJ = {"n_embd": 16, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4} | {
    "decoder_start_token_id": 0
}
BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "decoder_start_token_id": 2,
}
OURS, TRL, THEIRS = "peft-internal-testing", "trl-internal-testing", "hf-internal-testing"
MODELS = {  # name: class, what its config has beside SIZES
    f"{OURS}/tiny-random-OPTForCausalLM": ("OPTForCausalLM", OPT),
    f"{OURS}/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", {}),
    f"{OURS}/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", GPTJ),
    f"{TRL}/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", LLAMA),
    f"{OURS}/tiny-dummy-qwen2": ("Qwen2ForCausalLM", LLAMA),
    f"{THEIRS}/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", LLAMA | {"head_dim": 4}),
    f"{OURS}/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        T5,
    ),
    f"{OURS}/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", BART),
    f"{OURS}/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", {}),
    f"{OURS}/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        {},
    ),
    f"{TRL}/tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", LLAMA),
}


def make_models(folder: Path) -> None:
    """``from_pretrained(name)`` finds them where ``folder`` is the working directory."""
    for name, (kind, options) in MODELS.items():
        kind = getattr(transformers, kind)
        torch.manual_seed(0)
        model = kind(kind.config_class(**{**SIZES, **options}))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder / name)
