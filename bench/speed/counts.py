"""Bytes, operations and launches by arithmetic: what each form of a kernel must move, before anything is measured.

``python -m bench counts`` prints the tables for LLaMA-2 7B at 8,192 tokens. Nothing here is a measurement; a GPU's
rates only turn counts into the least time they can take."""

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from losia_kernels.kernels.launch import LaunchConfig, choose_config

from .models import shape_of
from .sectors import BF16, FLOAT32, UPDATE_BYTES, scattered, touched

# of the tables
MODEL, TOKENS, P, LINEARS = "llama-2-7b", 8192, 1 / 8, ("q_proj", "up_proj", "down_proj")
LLAMA = shape_of(MODEL)
CORE_GBS = 112.0  # from L2 to one multiprocessor: 64 bytes a clock at 1.75 GHz
REACHED = 0.92  # of a rate, by a kernel that is bound by it
LAUNCH_US = 2.0  # to fill the device and to drain it
AWAIT_US = 1.0  # until what one program has written is seen by another that waits for it


@dataclass(frozen=True)
class Rates:
    """GB/s of memory and from L2 to the cores, TFLOP/s of dense bfloat16."""

    copy: float
    to_cores: float
    matmul: float


H200 = Rates(4300, 6000, 790)  # memory and products: what an earlier run measured; from L2: a guess


class Counts(NamedTuple):
    """Bytes between the device's memory and its cache, and from there to the multiprocessors (a tile that is read again
    counts again); operations; launches."""

    memory: float
    to_cores: float
    flops: float
    launches: int

    @property
    def least_us(self) -> float:
        """No faster on an H200: the larger of bytes at copy bandwidth and operations at the matrix units' rate."""
        return max(copy_us(self.memory), self.flops / H200.matmul / 1e6)


def copy_us(size: float) -> float:
    return size / H200.copy / 1e3


def choose(k_out: int, k_in: int, alignment: int = 1, **more: Any) -> LaunchConfig:
    """What the package would launch for a gradient on an H200."""
    size = TOKENS, k_out, k_in, alignment
    return choose_config("subnet_grad", "sm_90", torch.bfloat16, *size, **more)


def subnet_grad(
    config: LaunchConfig, tokens: int, out: int, k_out: int, k_in: int, alignment: int = 1
) -> Counts:
    """``dy[:, out_idx].T @ x_sub`` in the form and tiles of ``config``; its partial sums are read once more."""
    dy = BF16 * tokens * out * touched(k_out / out, alignment)
    dy_sub, x = BF16 * tokens * k_out, BF16 * tokens * k_in
    partials = 2 * FLOAT32 * config.splits * k_out * k_in
    tiles_out, tiles_in = -(-k_out // config.block_out), -(-k_in // config.block_in)
    flops, x_read = 2 * tokens * k_out * k_in, x * tiles_out
    if config.variant.startswith("gathered"):
        moved = dy + 2 * dy_sub + x + partials
        return Counts(moved, dy + dy_sub * tiles_in + x_read, flops, 2)
    return Counts(dy + x + partials, dy * tiles_in + x_read, flops, 1)


def sums_us(config: LaunchConfig, k_out: int, k_in: int) -> dict[str, float]:
    """What it takes to add the splits' partial sums, once they are written: each is in L2, and a program holds a whole
    tile. The last two forms are not built."""
    tile = FLOAT32 * config.block_out * config.block_in
    moved = FLOAT32 * (config.splits + 1) * k_out * k_in
    shared, alone = moved / H200.to_cores / REACHED / 1e3, tile / CORE_GBS / REACHED / 1e3
    levels = (config.splits - 1).bit_length()
    return {
        "launch": LAUNCH_US + shared,
        "dependent": AWAIT_US + shared,
        # zeros for the counters are a launch; a single multiprocessor reads all splits of a tile
        "in_kernel": LAUNCH_US + AWAIT_US + config.splits * alone,
        # pairs: one reads what the other has written, adds, and writes for the next level
        "tree": LAUNCH_US + levels * (AWAIT_US + 2 * alone),
        # a barrier of all programs, which must be there at once; then each adds its share of a tile
        "cooperative": LAUNCH_US + 2 * AWAIT_US + shared,
    }


def weight_bytes(epilogue: bool) -> int:
    """Of an observing weight: itself, both states read and written; the gradient, unless it stays in its product."""
    return BF16 + 4 * FLOAT32 + (0 if epilogue else 2 * BF16)


def observing(tokens: int, out: int, inner: int, epilogue: bool) -> Counts:
    """What an observing layer does on top of its dx and its subnet's gradient: dense gradient and importance, which an
    ``epilogue`` computes inside the gradient's product."""
    moved = BF16 * tokens * (out + inner) + weight_bytes(epilogue) * out * inner
    return Counts(moved, moved, 2 * tokens * out * inner, 1 if epilogue else 2)


def floor_us() -> float:
    """Of a step's linears with frozen weights: two products each."""
    return 4 * TOKENS * LLAMA.layers * LLAMA.block_weights / H200.matmul / 1e6


def localization_share(epilogue: bool) -> float:
    """Least time that observing adds to a step, over that of the step's frozen floor: one block of L observes. The pass
    over the states is not hidden by the product."""
    each = [observing(TOKENS, *size, epilogue) for size in LLAMA.linears.values()]
    return (
        sum(found.flops / H200.matmul / 1e6 + copy_us(found.memory) for found in each) / floor_us()
    )


def table_subnet_grad() -> str:
    lines = [
        "linear     alignment form              memory MB  to cores MB  GFLOP  launches  least us  over one dy"
    ]
    forms = ("fused", "fused_wide", "gathered")
    for name, alignment, variant in itertools.product(LINEARS, (1, 16), forms):
        out, inner = LLAMA.linears[name]
        size = int(P * out), int(P * inner), alignment
        config = choose(*size, variant=variant, chosen_from=out)
        counts = subnet_grad(config, TOKENS, out, *size)
        over = counts.least_us / copy_us(BF16 * TOKENS * out)
        lines.append(
            f"{name:10} {alignment:9} {variant:16} {counts.memory / 1e6:11.1f} {counts.to_cores / 1e6:12.1f} "
            f"{counts.flops / 1e9:6.1f} {counts.launches:9} {counts.least_us:9.1f} {over:12.2f}"
        )
    return "\n".join(lines)


def table_sums() -> str:
    """The paper's subnets at p = 1/8 and 1/4, and the wide ones of the default."""
    lines = ["who adds the splits: us of a gradient's sum   splits  MB"]
    lines[0] += "".join(f"{name:>12}" for name in sums_us(LaunchConfig(splits=2), 1, 1))
    chosen = [
        (f"{name}, p = {p}", LLAMA.linears[name][0], *(int(p * n) for n in LLAMA.linears[name]))
        for p in (1 / 8, 1 / 4)
        for name in LINEARS
    ]
    chosen += [("q_proj and o_proj, default", 4096, 2048, 184)]
    chosen += [("up_proj and down_proj, default", 4096, 2048, 495)]
    for name, out, k_out, k_in in chosen:
        config = choose(k_out, k_in, chosen_from=out)
        if config.splits > 1:
            times = "".join(f"{us:12.1f}" for us in sums_us(config, k_out, k_in).values())
            size = FLOAT32 * config.splits * k_out * k_in / 1e6
            lines.append(f"  {name:44} {config.splits:5} {size:4.0f}{times}")
    return "\n".join(lines)


def table_update() -> str:
    """AdamW's bytes a value: the state, and the sectors of the weight that its new values lie in."""
    lines = [f"AdamW, {MODEL}: bytes a value, {UPDATE_BYTES} of them state"]
    inner, names = LLAMA.hidden, ("single", "in runs of 4", "of 16")
    for name, k_in in (("p = 1/8", 512), ("half", 2048), ("thin", 184), ("all inputs", inner)):
        each = (UPDATE_BYTES + scattered(1, inner, k_in, a) / k_in for a in (1, 4, 16))
        said = ", ".join(f"{b:5.1f} {w}" for b, w in zip(each, names, strict=True))
        lines.append(f"  {name:10} of {inner} inputs: {said}")
    return "\n".join(lines)


def table_observing() -> str:
    """The fused pass beside an epilogue: bytes a weight, and the share of a step at the model's number of layers."""
    where = f"observing, {MODEL}, {TOKENS} tokens, L = {LLAMA.layers}"
    lines = [f"{where}: share of the frozen floor of a step (linears)"]
    for name, epilogue in (("gradient, then fused pass", False), ("importance as epilogue", True)):
        share = 100 * localization_share(epilogue)
        lines.append(f"  {name:26} {weight_bytes(epilogue)} bytes a weight, {share:.2f} %")
    return "\n".join(lines)


def table_fusions() -> str:
    """What a fusion that the package does without could save at most, over the floor of a step: the gradient, written
    and read."""
    values = sum(int(P * out) * int(P * inner) for out, inner in LLAMA.linears.values())
    us, launches = LLAMA.layers * copy_us(2 * FLOAT32 * values), len(LLAMA.linears)
    return (
        f"left out, {MODEL}, {TOKENS} tokens, p = {P}: what it could save at most of the frozen floor (linears)\n"
        f"  {'partial sums straight into AdamW':40} {us:7.0f} us a step, {100 * us / floor_us():.2f} %, "
        f"{launches} launches a block"
    )


def table_saved_inputs() -> str:
    """What q, k, v (and gate, up), which share an input, keep of it: gathered pieces or the input itself."""
    whole = BF16 * TOKENS * LLAMA.hidden / 1e6
    lines = [f"kept of a shared input, {MODEL}, {TOKENS} tokens, MB a block; the smaller is kept"]
    for p in (1 / 16, 1 / 8, 1 / 4, 1 / 3, 1 / 2):
        pieces = (BF16 * TOKENS * sharers * int(p * LLAMA.hidden) / 1e6 for sharers in (3, 2))
        qkv, gate_up = (f"{size:6.1f} of {whole:.1f}" for size in pieces)
        lines.append(f"  p = {p:.4f}: q, k, v {qkv}; gate, up {gate_up}")
    return "\n".join(lines)


def report() -> str:
    tables = table_subnet_grad, table_sums, table_update, table_observing
    tables += table_saved_inputs, table_fusions
    said = "Counted, not measured. Bytes of an average random choice; times are the least at an H200's rates."
    return "\n\n".join([said, *(table() for table in tables)])
