"""Bytes, operations and launches by arithmetic: what each form of a kernel must move, before
anything is measured.

``python -m bench counts`` prints the tables for LLaMA-2 7B at 8,192 tokens. Nothing here is a
measurement; a GPU's rates only turn counts into the least time they can take.
"""

from dataclasses import dataclass

import torch

from losia_kernels.kernels.launch import LaunchConfig, choose_config

from .models import shape_of

SECTOR = 32  # bytes that memory hands out at least
BF16, FLOAT32 = 2, 4
COPY_GBS, MATMUL_TFLOPS = 4300.0, 790.0  # of an H200: what an earlier run measured


@dataclass(frozen=True)
class Counts:
    memory: float  # bytes between the device's memory and its cache
    to_cores: (
        float  # bytes from the cache to the multiprocessors: a tile that is read again counts again
    )
    flops: float
    launches: int

    @property
    def least_us(self) -> float:
        """No faster on an H200: the larger of bytes at copy bandwidth and operations at the matrix
        units' rate."""
        return max(self.memory / COPY_GBS / 1e3, self.flops / MATMUL_TFLOPS / 1e6)


def touched(p: float, alignment: int, itemsize: int = BF16) -> float:
    """Share of a row's sectors that a choice of a share ``p`` of its entries touches, on
    average."""
    runs_in_sector = max(1, SECTOR // (itemsize * alignment))
    return 1 - (1 - p) ** runs_in_sector


def subnet_grad(
    config: LaunchConfig,
    tokens: int,
    out: int,
    k_out: int,
    k_in: int,
    alignment: int = 1,
    itemsize: int = BF16,
) -> Counts:
    """``dy[:, out_idx].T @ x_sub`` in the form and tiles of ``config``; its partial sums are read
    by the update."""
    dy = itemsize * tokens * out * touched(k_out / out, alignment, itemsize)
    dy_sub, x = itemsize * tokens * k_out, itemsize * tokens * k_in
    partials = 2 * FLOAT32 * config.splits * k_out * k_in
    tiles_out, tiles_in = -(-k_out // config.block_out), -(-k_in // config.block_in)
    flops = 2 * tokens * k_out * k_in
    if config.variant.startswith("gathered"):
        return Counts(
            dy + 2 * dy_sub + x + partials, dy + dy_sub * tiles_in + x * tiles_out, flops, 2
        )
    return Counts(dy + x + partials, dy * tiles_in + x * tiles_out, flops, 1)


def gather_features(
    tokens: int, features: int, k: int, alignment: int = 1, itemsize: int = BF16
) -> Counts:
    read = itemsize * tokens * features * touched(k / features, alignment, itemsize)
    return Counts(read + itemsize * tokens * k, read, 0, 1)


def observing(tokens: int, out: int, inner: int, epilogue: bool, itemsize: int = BF16) -> Counts:
    """What an observing layer does on top of its dx and its subnet's gradient: dense gradient and
    importance.

    ``epilogue``: importance inside the gradient's product, so that the gradient is neither written
    nor read.
    """
    weights, flops = out * inner, 2 * tokens * out * inner
    inputs = itemsize * tokens * (out + inner)
    state = weights * (itemsize + 4 * FLOAT32)  # the weight, and both states read and written
    grad = 0 if epilogue else 2 * itemsize * weights
    return Counts(inputs + state + grad, inputs + state + grad, flops, 1 if epilogue else 2)


def floor_us(model: str, tokens: int) -> float:
    """Least time of the forward and dx of all of a model's linears."""
    shape = shape_of(model)
    return (
        shape.layers
        * sum(4 * tokens * out * inner for out, inner in shape.linears.values())
        / MATMUL_TFLOPS
        / 1e6
    )


def localization_share(model: str, tokens: int, epilogue: bool) -> float:
    """Least time that observing adds to a step, over that of the step's frozen floor: one block of
    L observes."""
    shape = shape_of(model)
    extra = 0.0
    for out, inner in shape.linears.values():
        counts = observing(tokens, out, inner, epilogue)
        product_us = counts.flops / MATMUL_TFLOPS / 1e6
        extra += (
            product_us + counts.memory / COPY_GBS / 1e3
        )  # the pass over the states is not hidden by the product
    return extra / floor_us(model, tokens)


def table_subnet_grad(arch: str = "sm_90", tokens: int = 8192, p: float = 1 / 8) -> str:
    """Every form for every linear of LLaMA-2 7B, single entries and runs of 16."""
    linears = {"q_proj": (4096, 4096), "up_proj": (11008, 4096), "down_proj": (4096, 11008)}
    lines = [
        "linear     alignment form              memory MB  to cores MB  GFLOP  launches  least us  over one dy"
    ]
    for name, (out, inner) in linears.items():
        k_out, k_in = int(p * out), int(p * inner)
        read_dy = BF16 * tokens * out / COPY_GBS / 1e3
        for alignment in (1, 16):
            for variant in ("fused", "fused_wide", "gathered"):
                config = choose_config(
                    "subnet_grad",
                    arch,
                    torch.bfloat16,
                    tokens,
                    k_out,
                    k_in,
                    alignment,
                    variant=variant,
                )
                counts = subnet_grad(config, tokens, out, k_out, k_in, alignment)
                lines.append(
                    f"{name:10} {alignment:9} {variant:16} {counts.memory / 1e6:11.1f} {counts.to_cores / 1e6:12.1f} "
                    f"{counts.flops / 1e9:6.1f} {counts.launches:9} {counts.least_us:9.1f} "
                    f"{counts.least_us / read_dy:12.2f}"
                )
    return "\n".join(lines)


def table_observing(model: str = "llama-2-7b", tokens: int = 8192) -> str:
    """The fused pass beside an epilogue: bytes a weight, and the share of a step at the model's
    number of layers."""
    shape = shape_of(model)
    lines = [
        f"observing, {model}, {tokens} tokens, L = {shape.layers}: share of the frozen floor of a step (linears)"
    ]
    for name, epilogue in (("gradient, then fused pass", False), ("importance as epilogue", True)):
        weights = BF16 + 4 * FLOAT32 + (0 if epilogue else 2 * BF16)
        lines.append(
            f"  {name:26} {weights} bytes a weight, {100 * localization_share(model, tokens, epilogue):.2f} %"
        )
    return "\n".join(lines)


def table_fusions(model: str = "llama-2-7b", tokens: int = 8192, p: float = 1 / 8) -> str:
    """What two fusions that the package does without could save at most, over the floor of a
    step."""
    shape = shape_of(model)
    floor = floor_us(model, tokens)
    read = (
        BF16 * tokens * shape.hidden * touched(p, 1) / COPY_GBS / 1e3
    )  # of the input that q, k, v share, once
    gathers = shape.layers * 3 * read  # two more reads for q, k, v, one for gate and up
    values = sum(int(p * out) * int(p * inner) for out, inner in shape.linears.values())
    sums = shape.layers * 2 * FLOAT32 * values / COPY_GBS / 1e3  # the gradient, written and read
    lines = [
        f"left out, {model}, {tokens} tokens, p = {p}: what it could save at most of the frozen floor (linears)"
    ]
    for name, saved, launches in (
        ("gathers of a shared input in one launch", gathers, 3),
        ("partial sums straight into AdamW", sums, 7),
    ):
        lines.append(
            f"  {name:40} {saved:7.0f} us a step, {100 * saved / floor:.2f} %, {launches} launches a block"
        )
    return "\n".join(lines)


def table_saved_inputs(model: str = "llama-2-7b", tokens: int = 8192) -> str:
    """What q, k, v (and gate, up), which share an input, keep of it: gathered pieces or the input
    itself."""
    shape = shape_of(model)
    lines = [f"kept of a shared input, {model}, {tokens} tokens, MB a block; the smaller is kept"]
    for p in (1 / 16, 1 / 8, 1 / 4, 1 / 3, 1 / 2):
        pieces = [BF16 * tokens * sharers * int(p * shape.hidden) / 1e6 for sharers in (3, 2)]
        whole = BF16 * tokens * shape.hidden / 1e6
        qkv, gate_up = (f"{size:6.1f} of {whole:.1f}" for size in pieces)
        lines.append(f"  p = {p:.4f}: q, k, v {qkv}; gate, up {gate_up}")
    return "\n".join(lines)


def report() -> str:
    """All tables."""
    return "\n\n".join(
        (table_subnet_grad(), table_observing(), table_saved_inputs(), table_fusions())
    )
