"""The launches that are compiled for every target: meta tensors of production shapes through the real launchers.

A kernel file adds its launches here; ``test_compile.py`` fails for a kernel that no launch reaches. Shapes are those
of LLaMA-2 7B at p = 1/8 with 8,192 tokens.
"""

from collections.abc import Callable

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS, HIDDEN, INTERMEDIATE, VOCAB = 8192, 4096, 11008, 32000
K_HIDDEN, K_INTERMEDIATE, K_VOCAB = HIDDEN // 8, INTERMEDIATE // 8, VOCAB // 8


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def index(k: int) -> torch.Tensor:
    return meta(k, dtype=torch.int64)


def gather_features(dtype: torch.dtype) -> None:
    from losia_kernels.kernels.gather import launch_gather_features

    launch_gather_features(meta(4, TOKENS // 4, HIDDEN, dtype=dtype), index(K_HIDDEN))


def subnet_grad(dtype: torch.dtype, gather_out: bool = True, gather_in: bool = False) -> None:
    from losia_kernels.kernels.subnet_grad import launch_subnet_grad

    launch_subnet_grad(
        meta(TOKENS, INTERMEDIATE, dtype=dtype),
        meta(TOKENS, HIDDEN if gather_in else K_HIDDEN, dtype=dtype),
        index(K_INTERMEDIATE) if gather_out else None,
        index(K_HIDDEN) if gather_in else None,
    )


CASES: dict[str, Callable[[], None]] = {}
for name, dtype in DTYPES.items():
    CASES[f"gather_features-{name}"] = lambda dtype=dtype: gather_features(dtype)
    CASES[f"subnet_grad-{name}"] = lambda dtype=dtype: subnet_grad(dtype)
    CASES[f"subnet_grad-gather_both-{name}"] = lambda dtype=dtype: subnet_grad(dtype, gather_in=True)
    CASES[f"subnet_grad-gather_none-{name}"] = lambda dtype=dtype: subnet_grad(dtype, gather_out=False)
