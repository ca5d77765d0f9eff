"""The figures of arXiv 2507.04487 that ours stand beside: LLaMA-2 7B, 4 x 2048 tokens, on an A800."""

# Table 15, microseconds a token, forward + backward + other
CHECKPOINTED = {"lora-fp32": 338.0, "dora": 656.4, "galore": 437.7, "losia-dense": 290.4, "losia-pro": 244.8}
NOT_CHECKPOINTED = {"lora-fp32": "out of memory", "losia-dense": 216.5, "losia-pro": 173.8}

# Table 14, GB
LOSIA_GB = {
    (1 / 16, 1 / 8): 21.84, (1 / 8, 1 / 8): 21.87, (1 / 4, 1 / 8): 22.73, (1 / 2, 1 / 8): 28.73,
    (1 / 16, 1.0): 22.24, (1 / 8, 1.0): 22.84, (1 / 4, 1.0): 23.37, (1 / 2, 1.0): 28.98,
}  # fmt: skip
LORA_GB = {16: 22.33, 64: 23.72, 256: 28.42, 1024: 63.90}
