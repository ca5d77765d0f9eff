"""The figures of arXiv 2507.04487 that ours stand beside: LLaMA-2 7B, 4 x 2048 tokens, on an A800."""

# Table 15, microseconds a token, forward / backward / total; GaLore's with its SVDs; the paper's
# LoRA is in float32
CHECKPOINTED = {
    "lora-fp32": "74.0 / 264.0 / 338.0",
    "dora": "104.2 / 552.2 / 656.4",
    "galore, with its SVD": "70.1 / 227.5 / 437.7",
    "losia-dense": "70.0 / 220.4 / 290.4",
    "losia-pro": "71.4 / 173.4 / 244.8",
}
NOT_CHECKPOINTED = {"lora-fp32": "out of memory", "losia-dense": "216.5", "losia-pro": "173.8"}

# Table 14, GB
LOSIA_GB = {
    (1 / 16, 1 / 8): 21.84,
    (1 / 8, 1 / 8): 21.87,
    (1 / 4, 1 / 8): 22.73,
    (1 / 2, 1 / 8): 28.73,
    (1 / 16, 1.0): 22.24,
    (1 / 8, 1.0): 22.84,
    (1 / 4, 1.0): 23.37,
    (1 / 2, 1.0): 28.98,
}
LORA_GB = {16: 22.33, 64: 23.72, 256: 28.42, 1024: 63.90}
