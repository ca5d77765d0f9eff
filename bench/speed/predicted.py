"""What LoSiA should add to a decoder layer on a GPU: a prediction from machine code and counts, never a measurement.

``python -m bench predicted``. Bytes and operations are counted from the shapes and the tiles that the package chooses.
The machine code of each product, compiled here, says whether its copies and its products overlap. Rates are of the data
sheets and of earlier runs; the one between L2 and the cores is a guess, and binds several kernels. What a GPU measures
replaces all of it: ``python -m bench layer``."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from losia_kernels.kernels.launch import choose_config, padded

from ..harness.machine_code import facts
from .compiled import compile_gradient
from .counts import H200, LAUNCH_US, REACHED, Rates
from .models import DEFAULT, PAPER, QUARTER, Layer, shape_of
from .sectors import BF16, FLOAT32, UPDATE_BYTES, scattered, touched

GPUS = {"H200": H200, "H100": replace(H200, copy=3000)}
LAYERS = (
    *(replace(layer, alignment=a) for layer in (DEFAULT, PAPER, QUARTER) for a in (1, 16)),
    *(replace(PAPER, alignment=a) for a in (32, 64)),
)


class Piece(NamedTuple):
    """A kernel, or several alike: bytes of memory and to the cores, operations, launches; whether products overlap
    with the copies (None: no product)."""

    name: str
    memory: float
    to_cores: float
    flops: float = 0.0
    launches: int = 1
    overlaps: bool | None = None

    def us(self, rates: Rates) -> float:
        moved = max(self.memory / rates.copy, self.to_cores / rates.to_cores) / 1e3
        product = self.flops / rates.matmul / 1e6
        bound = max(moved, product) if self.overlaps else moved + product
        return LAUNCH_US * self.launches + bound / REACHED


def gather(tokens: int, size: int, ks: list[int], alignment: int, name: str) -> Piece:
    """One launch for all ``ks``: memory hands out each sector once, the cache once for each."""
    row, rows = BF16 * size, sum(BF16 * padded(k) for k in ks)
    none = 1.0
    for k in ks:
        none *= 1 - touched(k / size, alignment)
    read = [row * touched(k / size, alignment) for k in ks]
    return Piece(name, tokens * (row * (1 - none) + rows), tokens * (sum(read) + rows))


def gradient(layer: Layer, name: str, overlaps: bool) -> list[Piece]:
    """What is gathered in the product is "dy", as of most layers, what comes in rows "x"."""
    (out, inner), (k_out, k_in) = layer.linears[name], layer.subnets[name]
    whole = layer.keeps_input(name)
    what = "gathers of x", "gathers of dy"
    if layer.turned(name):
        out, inner, k_out, k_in, what = inner, out, k_in, k_out, what[::-1]
    tokens, alignment, pieces = layer.tokens, layer.alignment, []
    size = tokens, k_out, k_in, alignment
    config = choose_config("subnet_grad", "sm_90", torch.bfloat16, *size, chosen_from=out)
    tiles_out, tiles_in = -(-k_out // config.block_out), -(-k_in // config.block_in)
    partials = FLOAT32 * config.splits * k_out * k_in
    dy, x = BF16 * tokens * padded(k_out), BF16 * tokens * padded(k_in)
    if whole and config.variant == "fused":
        x = BF16 * tokens * inner * touched(k_in / inner, alignment)
    elif whole:
        pieces.append(gather(tokens, inner, [k_in], alignment, what[0]))
    if config.variant.startswith("gathered"):
        pieces.append(gather(tokens, out, [k_out], alignment, what[1]))
    else:
        dy = BF16 * tokens * out * touched(k_out / out, alignment)
    moved = dy * tiles_in + x * tiles_out
    flops = 2.0 * tokens * k_out * k_in
    pieces.append(Piece("subnet gradients", dy + x + partials, moved, flops, overlaps=overlaps))
    if config.splits > 1:
        pieces.append(Piece("sums of splits", partials + FLOAT32 * k_out * k_in, partials))
    return pieces


def update(layer: Layer) -> Piece:
    moved = 0.0
    for name, (_, inner) in layer.linears.items():
        k_out, k_in = layer.subnets[name]
        moved += UPDATE_BYTES * k_out * k_in + scattered(k_out, inner, k_in, layer.alignment)
    return Piece("AdamW and scatter", moved, moved)


def additions(layer: Layer) -> list[Piece]:
    """Autograd's sums of what layers that read one input give back."""
    size = BF16 * layer.tokens * shape_of(layer.model).hidden
    count = sum(len(names) - 1 for names in layer.sharers)
    return [Piece("additions of dx", 3 * size, 3 * size)] * count


def added(layer: Layer, overlaps: dict[str, bool]) -> list[Piece]:
    """All that it does beside its two products a linear. Its dx are summed in the products, which read what is there
    already."""
    pieces = []
    for names in layer.sharers:
        inner = layer.linears[names[0]][1]
        if not layer.keeps_input(names[0]):
            ks = [layer.subnets[name][1] for name in names]
            pieces.append(gather(layer.tokens, inner, ks, layer.alignment, "gathers of x"))
        read = BF16 * layer.tokens * inner
        pieces += [Piece("dx read in products", read, read, launches=0)] * (len(names) - 1)
    for name in layer.linears:
        pieces += gradient(layer, name, overlaps[name])
    return [*pieces, update(layer)]


def layer_us(pieces: list[Piece], rates: Rates) -> dict[str, float]:
    found: dict[str, float] = {}
    for piece in pieces:
        found[piece.name] = found.get(piece.name, 0.0) + piece.us(rates)
    return found


def over_floor(layer: Layer, pieces: list[Piece], rates: Rates) -> float:
    """Of the linears with their frozen weights: two products each, and autograd's additions."""
    products = 4 * layer.tokens * shape_of(layer.model).block_weights / rates.matmul / 1e6
    floor = products + sum(piece.us(rates) for piece in additions(layer))
    return (products + sum(layer_us(pieces, rates).values())) / floor


@functools.cache
def code_overlaps(layer: Layer, name: str) -> bool:
    """Whether copies and products overlap in the code of this gradient, compiled for sm_90: no product waits for the
    one before, and copies are on their way beside it."""
    found = map(facts, compile_gradient(layer, name, "sm_90"))
    (code,) = (each for each in found if each["product_of"])
    return not code["serialized"] and bool(code["copies_ahead"])


def overlaps_of(layer: Layer) -> dict[str, bool]:
    return {name: code_overlaps(layer, name) for name in layer.linears}


def _lines(layer: Layer) -> Iterator[str]:
    pieces = added(layer, overlaps_of(layer))
    yield f"{layer}: {sum(piece.launches for piece in pieces)} launches"
    columns = {gpu: layer_us(pieces, rates) for gpu, rates in GPUS.items()}
    for name in columns["H200"]:
        yield f"  {name:22}" + "".join(f"{column[name]:8.0f}" for column in columns.values())
    floor = [sum(piece.us(rates) for piece in additions(layer)) for rates in GPUS.values()]
    yield f"  {'without: additions':22}" + "".join(f"{-us:8.0f}" for us in floor)
    ratios = (over_floor(layer, pieces, rates) for rates in GPUS.values())
    yield f"  {'over the frozen floor':22}" + "".join(f"{ratio:8.3f}" for ratio in ratios)


def report() -> str:
    lines = [
        "PREDICTED from machine code and counts, not measured: microseconds that a layer's linears take beside their",
        "products, outside of its slot. Columns: " + ", ".join(GPUS),
    ]
    for layer in LAYERS:
        lines += ["", *_lines(layer)]
    return "\n".join(lines)
