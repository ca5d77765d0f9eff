"""The launches that are compiled for every target: meta tensors of production shapes through the
real launchers.

A kernel file adds its launches here; ``test_machine_code.py`` fails for a kernel that no launch reaches.
Shapes are those of LLaMA-2 7B at p = 1/8 with 8,192 tokens.
"""

from collections.abc import Callable

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS, HIDDEN, INTERMEDIATE, VOCAB = 8192, 4096, 11008, 32000
CHUNK = 1024  # tokens, or outputs, whose logits exist at a time
K_HIDDEN, K_INTERMEDIATE, K_VOCAB = HIDDEN // 8, INTERMEDIATE // 8, VOCAB // 8


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def index(k: int) -> torch.Tensor:
    return meta(k, dtype=torch.int64)


def gather_features(dtype: torch.dtype, alignment: int = 1, k: int = K_HIDDEN) -> None:
    from losia_kernels.kernels.gather import launch_gather_features

    launch_gather_features(meta(4, TOKENS // 4, HIDDEN, dtype=dtype), index(k), alignment)


def subnet_grad(
    dtype: torch.dtype,
    gather_out: bool = True,
    gather_in: bool = False,
    alignment: int = 1,
    variant: str | None = None,
    shape: tuple[int, int] = (INTERMEDIATE, HIDDEN),
    p: float | tuple[float, float] = 1 / 8,
    **fields: int | str,
) -> None:
    """``fields`` of the ``LaunchConfig``, beside ``variant``."""
    from losia_kernels.kernels.launch import override_config, padded
    from losia_kernels.kernels.subnet_grad import launch_subnet_grad

    (out, inner), factors = shape, (p if isinstance(p, tuple) else (p, p))
    k_out, k_in = (int(factor * size) for factor, size in zip(factors, shape, strict=True))
    gathered = meta(TOKENS, padded(k_in), dtype=dtype)[:, :k_in]
    with override_config("subnet_grad", **fields, **({"variant": variant} if variant else {})):
        launch_subnet_grad(
            meta(TOKENS, out, dtype=dtype),
            meta(TOKENS, inner, dtype=dtype) if gather_in else gathered,
            index(k_out) if gather_out else None,
            index(k_in) if gather_in else None,
            alignment,
        )


def subnets_adamw(
    dtype: torch.dtype,
    moments: torch.dtype = torch.float32,
    master: str = "float32",
    k_in: int = K_HIDDEN,
    scalars: tuple[float, int, int | None] = (1e-4, 1, 3),  # lr, step, seed
) -> None:
    from losia_kernels.kernels.adamw import launch_subnets_adamw_
    from losia_kernels.ops.adamw import Update

    def update(size: tuple[int, int], k: tuple[int, int]) -> Update:
        subnet_dtype = torch.float32 if master == "float32" else dtype
        scales = [None, None]
        if moments == torch.uint8:
            scales = [meta(k[0], -(-k[1] // 256), dtype=torch.float32) for _ in range(2)]
        return Update(
            meta(*size, dtype=dtype),
            meta(*k, dtype=subnet_dtype),
            meta(*k, dtype=subnet_dtype),
            *(meta(*k, dtype=moments) for _ in range(2)),
            *map(index, k),
            *scalars,
            *scales,
            meta(*k, dtype=torch.int16) if master == "remainder" else None,
        )

    sizes = ((INTERMEDIATE, HIDDEN), (K_INTERMEDIATE, k_in)), ((HIDDEN, HIDDEN), (K_HIDDEN, k_in))
    launch_subnets_adamw_([update(*each) for each in sizes], 0.9, 0.999, 1e-8, 0.0)


def importance_update(
    dtype: torch.dtype, state_dtype: torch.dtype, kind: str = "sensitivity"
) -> None:
    from losia_kernels.kernels.importance import launch_importance_update_

    state = [meta(INTERMEDIATE, HIDDEN, dtype=state_dtype) for _ in range(2)]
    weight, grad = (meta(INTERMEDIATE, HIDDEN, dtype=dtype) for _ in range(2))
    launch_importance_update_(*state, weight, grad, 0.85, 0.85, kind, 1.0)


def importance_marginals(dtype: torch.dtype, kind: str = "sensitivity") -> None:
    from losia_kernels.kernels.importance import launch_importance_marginals

    launch_importance_marginals(
        *(meta(INTERMEDIATE, HIDDEN, dtype=dtype) for _ in range(2)), kind, 1.0
    )


def score_marginals(dtype: torch.dtype, restricted: bool) -> None:
    from losia_kernels.kernels.scores import launch_score_marginals

    state = [meta(INTERMEDIATE, HIDDEN, dtype=dtype) for _ in range(2)]
    idx = (index(K_INTERMEDIATE), index(K_HIDDEN)) if restricted else (None, None)
    launch_score_marginals(*state, *idx)


def cross_entropy_grad(dtype: torch.dtype, vocabulary: int = VOCAB, **options) -> None:
    from losia_kernels.kernels.cross_entropy import launch_cross_entropy_grad_

    settings = {
        "ignore_index": -100,
        "label_smoothing": 0.0,
        "softcap": None,
        "logit_scale": 1.0,
    }
    logits = meta(CHUNK, vocabulary, dtype=dtype)
    launch_cross_entropy_grad_(logits, index(CHUNK), **{**settings, "write_grad": True, **options})


def cross_entropy_block_grad(dtype: torch.dtype, softcap: float | None = None) -> None:
    from losia_kernels.kernels.cross_entropy import launch_cross_entropy_block_grad_

    logits, lse = meta(TOKENS, CHUNK, dtype=dtype), meta(TOKENS, dtype=torch.float32)
    launch_cross_entropy_block_grad_(
        logits, index(TOKENS), lse, CHUNK, VOCAB, -100, 0.0, softcap, 1.0
    )


CASES: dict[str, Callable[[], None]] = {}
for name, dtype in DTYPES.items():
    CASES[f"gather_features-{name}"] = lambda dtype=dtype: gather_features(dtype)
    CASES[f"subnet_grad-{name}"] = lambda dtype=dtype: subnet_grad(dtype)
    CASES[f"subnet_grad-gather_both-{name}"] = lambda dtype=dtype: subnet_grad(
        dtype, gather_in=True
    )
    CASES[f"subnet_grad-gather_none-{name}"] = lambda dtype=dtype: subnet_grad(
        dtype, gather_out=False
    )
    CASES[f"gather_features-aligned-{name}"] = lambda dtype=dtype: gather_features(
        dtype, alignment=16
    )
    for variant in ("fused", "fused_wide", "gathered"):
        CASES[f"subnet_grad-{variant}-{name}"] = lambda dtype=dtype, variant=variant: subnet_grad(
            dtype, variant=variant
        )
    CASES[f"subnet_grad-fused-gather_both-{name}"] = lambda dtype=dtype: subnet_grad(
        dtype, gather_in=True, variant="fused"
    )
    CASES[f"subnet_grad-aligned-{name}"] = lambda dtype=dtype: subnet_grad(
        dtype, gather_in=True, alignment=16
    )
    CASES[f"subnets_adamw-{name}"] = lambda dtype=dtype: subnets_adamw(dtype)
    CASES[f"importance_update-{name}"] = lambda dtype=dtype: importance_update(dtype, torch.float32)
    CASES[f"importance_marginals-{name}"] = lambda dtype=dtype: importance_marginals(dtype)
    CASES[f"cross_entropy_grad-{name}"] = lambda dtype=dtype: cross_entropy_grad(dtype)
    CASES[f"cross_entropy_block_grad-{name}"] = lambda dtype=dtype: cross_entropy_block_grad(dtype)
    if dtype != torch.float32:
        for way, seed in {"nearest": None, "stochastic": 3}.items():
            CASES[f"subnets_adamw-{way}-{name}"] = lambda dtype=dtype, seed=seed: subnets_adamw(
                dtype, master="none", scalars=(1e-4, 1, seed)
            )
for model, shape in {"13b": (13824, 5120), "70b": (28672, 8192), "70b-down": (8192, 28672)}.items():
    CASES[f"subnet_grad-{model}"] = lambda shape=shape: subnet_grad(torch.bfloat16, shape=shape)
    CASES[f"subnet_grad-aligned-{model}"] = lambda shape=shape: subnet_grad(
        torch.bfloat16, alignment=16, shape=shape
    )
# sizes that 16 does not divide: SmolLM2 at its default, LLaMA-2 7B at p = 0.1 and 1/6
ODD = {"smollm2": ((1536, 576), 1 / 8), "tenth": ((INTERMEDIATE, HIDDEN), 0.1)}
ODD |= {"sixth": ((INTERMEDIATE, HIDDEN), 1 / 6), "tenth-down": ((HIDDEN, INTERMEDIATE), 0.1)}
for name, (shape, p) in ODD.items():
    CASES[f"gather_features-{name}"] = lambda shape=shape, p=p: gather_features(
        torch.bfloat16, k=int(p * shape[1])
    )
    CASES[f"subnet_grad-{name}"] = lambda shape=shape, p=p: subnet_grad(
        torch.bfloat16, shape=shape, p=p
    )
# half of the residual stream and a thin other side, as the default config has it: layers that read
# an input which is kept whole, or gathered with a sibling's; layers that write the stream
WIDE = {
    "q": ((HIDDEN, HIDDEN), (0.045, 1 / 2), True),
    "up": ((INTERMEDIATE, HIDDEN), (0.045, 1 / 2), False),
    "o": ((HIDDEN, HIDDEN), (1 / 2, 0.045), False),
    "down": ((HIDDEN, INTERMEDIATE), (1 / 2, 0.045), False),
    "thin": ((2048, 1024), (1 / 2, 0.045), False),
}
for name, (shape, factors, whole) in WIDE.items():
    CASES[f"subnet_grad-wide-{name}"] = lambda shape=shape, factors=factors, whole=whole: (
        subnet_grad(torch.bfloat16, gather_in=whole, shape=shape, p=factors)
    )
for sums in ("dependent", "in_kernel"):
    for name, options in {
        "": {},
        "-wide": {"gather_in": True, "shape": (HIDDEN, HIDDEN), "p": (0.045, 1 / 2)},
        "-gathered": {"variant": "gathered"},
        "-aligned": {"gather_in": True, "alignment": 16},
    }.items():
        CASES[f"subnet_grad-{sums}{name}"] = lambda sums=sums, options=options: subnet_grad(
            torch.bfloat16, sums=sums, splits=4, **options
        )
for alignment in (32, 64):
    CASES[f"gather_features-aligned-{alignment}"] = lambda alignment=alignment: gather_features(
        torch.bfloat16, alignment
    )
    CASES[f"subnet_grad-aligned-{alignment}"] = lambda alignment=alignment: subnet_grad(
        torch.bfloat16, alignment=alignment
    )
for moments in (torch.float32, torch.bfloat16, torch.uint8):
    for master in ("float32", "remainder", "none"):
        CASES[f"subnets_adamw-{master}-{moments}"] = lambda moments=moments, master=master: (
            subnets_adamw(torch.bfloat16, moments, master)
        )
        CASES[f"subnets_adamw-unaligned-{master}-{moments}"] = (
            lambda moments=moments, master=master: subnets_adamw(
                torch.bfloat16, moments, master, K_HIDDEN + 1
            )
        )
CASES["importance_update-bf16-state"] = lambda: importance_update(torch.bfloat16, torch.bfloat16)
for kind in ("first_order", "second_order", "gradient"):
    CASES[f"importance_update-{kind}"] = lambda kind=kind: importance_update(
        torch.bfloat16, torch.float32, kind
    )
for name in ("bf16", "fp32"):
    CASES[f"score_marginals-{name}"] = lambda dtype=DTYPES[name]: score_marginals(
        dtype, restricted=False
    )
    CASES[f"score_marginals-restricted-{name}"] = lambda dtype=DTYPES[name]: score_marginals(
        dtype, restricted=True
    )
CASES["cross_entropy_grad-loss_only"] = lambda: cross_entropy_grad(torch.bfloat16, write_grad=False)
CASES["cross_entropy_grad-all_options"] = lambda: cross_entropy_grad(
    torch.bfloat16,
    vocabulary=256000,
    label_smoothing=0.1,
    softcap=30.0,
    logit_scale=0.5,
)
CASES["cross_entropy_block_grad-softcap"] = lambda: cross_entropy_block_grad(
    torch.bfloat16, softcap=30.0
)

# What stands for the rest where every kernel, not every dtype and option, is asked about.
ESSENTIAL = (
    *(name for name in CASES if name.endswith(("-bf16", "-smollm2", "-tenth", "-wide", "-wide-q"))),
    "subnets_adamw-float32-torch.uint8",
    "subnets_adamw-unaligned-float32-torch.float32",
    "subnet_grad-fp32",
)
