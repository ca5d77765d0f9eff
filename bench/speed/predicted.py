"""What LoSiA should add to a decoder layer on a GPU: a prediction from machine code and counts, never a measurement.

``python -m bench predicted``. Bytes and operations are counted from the shapes and the tiles that the package chooses.
The machine code of each product, compiled here, says whether its copies and its products overlap. Rates are of the data
sheets and of earlier runs; the one between L2 and the cores is a guess, and binds several kernels. What a GPU measures
replaces all of it: ``python -m bench layer``."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from losia_kernels.kernels.launch import LaunchConfig, choose_config, padded

from .counts import BF16, FLOAT32, SECTOR, touched
from .models import shape_of

LAUNCH_US = 2.0  # to fill the device and to drain it
REACHED = 0.92  # of a rate, by a kernel that is bound by it
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
UPDATE_BYTES = 16 + 12  # a value: weight, gradient and moments read; weight and moments written


@dataclass(frozen=True)
class Rates:
    """GB/s of memory and from L2 to the cores, TFLOP/s of dense bfloat16."""

    copy: float
    to_cores: float
    matmul: float


GPUS = {"H200": Rates(4300, 6000, 790), "H100": Rates(3000, 6000, 790)}


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


def gradient(
    tokens: int, shape: tuple[int, int], p: float, alignment: int, overlaps: bool, fields: dict
) -> list[Piece]:
    (out, _), (k_out, k_in) = shape, (int(p * size) // alignment * alignment for size in shape)
    size = tokens, k_out, k_in, alignment
    config = choose_config("subnet_grad", "sm_90", torch.bfloat16, *size)
    config = LaunchConfig(**{**vars(config), **fields.get(config.variant, {})})
    dy_sub, x = BF16 * tokens * padded(k_out), BF16 * tokens * padded(k_in)
    tiles_out, tiles_in = -(-k_out // config.block_out), -(-k_in // config.block_in)
    partials = FLOAT32 * config.splits * k_out * k_in
    pieces = []
    if config.variant.startswith("gathered"):
        pieces.append(gather(tokens, out, [k_out], alignment, "gathers of dy"))
        dy = to_cores = dy_sub
    else:
        dy = to_cores = BF16 * tokens * out * touched(k_out / out, alignment)
    moved = to_cores * tiles_in + x * tiles_out
    flops = 2.0 * tokens * k_out * k_in
    pieces.append(Piece("subnet gradients", dy + x + partials, moved, flops, overlaps=overlaps))
    if config.splits > 1:
        pieces.append(Piece("sums of splits", partials + FLOAT32 * k_out * k_in, partials))
    return pieces


def update(shapes: list[tuple[int, int]], p: float, alignment: int) -> Piece:
    """A 2-byte store into a sector reads and writes it."""
    values = sum(int(p * out) * int(p * size) for out, size in shapes)
    sectors = sum(
        int(p * out) * size * BF16 / SECTOR * touched(p, alignment) for out, size in shapes
    )
    fill = 1 if alignment * BF16 >= SECTOR else 2  # a whole sector is not read before
    moved = UPDATE_BYTES * values + fill * SECTOR * sectors
    return Piece("AdamW and scatter", moved, moved)


def additions(tokens: int, shape: Any) -> list[Piece]:
    """Autograd's sums of what layers that read one input give back."""
    size = BF16 * tokens * shape.hidden
    count = sum(len(names) - 1 for names in SHARED_INPUTS)
    return [Piece("additions of dx", 3 * size, 3 * size)] * count


def added(
    model: str, tokens: int, p: float, alignment: int, overlaps: dict, fields: dict
) -> list[Piece]:
    """All that a layer outside of its slot does beside its two products a linear. Its dx are summed in the products,
    which read what is there already."""
    shape = shape_of(model)
    linears, pieces = shape.linears, []
    alone = [name for name in linears if not any(name in names for names in SHARED_INPUTS)]
    for names in (*SHARED_INPUTS, *((name,) for name in alone)):
        inner = linears[names[0]][1]
        ks = [int(p * inner) // alignment * alignment] * len(names)
        pieces.append(gather(tokens, inner, ks, alignment, "gathers of x"))
        read = BF16 * tokens * inner
        pieces += [Piece("dx read in products", read, read, launches=0)] * (len(names) - 1)
    for name, size in linears.items():
        pieces += gradient(tokens, size, p, alignment, overlaps[name], fields)
    return [*pieces, update(list(linears.values()), p, alignment)]


def layer_us(pieces: list[Piece], rates: Rates) -> dict[str, float]:
    found: dict[str, float] = {}
    for piece in pieces:
        found[piece.name] = found.get(piece.name, 0.0) + piece.us(rates)
    return found


def over_floor(model: str, tokens: int, pieces: list[Piece], rates: Rates) -> float:
    """Of the linears with their frozen weights: two products each, and autograd's additions."""
    shape = shape_of(model)
    products = 4 * tokens * shape.block_weights / rates.matmul / 1e6
    floor = products + sum(piece.us(rates) for piece in additions(tokens, shape))
    return (products + sum(layer_us(pieces, rates).values())) / floor


@functools.cache
def machine_code(shape: tuple[int, int], p: float, tokens: int, alignment: int) -> bool:
    """Whether copies and products overlap in the code of this gradient, compiled for sm_90: no product waits for the
    one before, and copies are on their way beside it."""
    from losia_kernels.kernels.subnet_grad import launch_subnet_grad

    from ..harness.machine_code import facts, launches

    meta = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
    k_out, k_in = (int(p * size) // alignment * alignment for size in shape)

    def case() -> None:
        x, index = meta(tokens, padded(k_in))[:, :k_in], meta(k_out, dtype=torch.int64)
        launch_subnet_grad(meta(tokens, shape[0]), x, index, None, alignment)

    code = facts(launches("sm_90", case)[-1])
    return not code["serialized"] and bool(code["copies_ahead"])


def overlaps_of(model: str, p: float, tokens: int, alignment: int) -> dict[str, bool]:
    linears = shape_of(model).linears.items()
    return {name: machine_code(size, p, tokens, alignment) for name, size in linears}


def _lines(model: str, tokens: int, p: float, alignment: int, fields: dict) -> Iterator[str]:
    pieces = added(model, tokens, p, alignment, overlaps_of(model, p, tokens, alignment), fields)
    launches = sum(piece.launches for piece in pieces)
    chosen = "single neurons" if alignment == 1 else f"runs of {alignment}"
    yield f"{model}, {tokens} tokens, p = {p:.3f}, {chosen}: {launches} launches"
    columns = {gpu: layer_us(pieces, rates) for gpu, rates in GPUS.items()}
    for name in columns["H200"]:
        yield f"  {name:22}" + "".join(f"{column[name]:8.0f}" for column in columns.values())
    floor = [
        sum(piece.us(r) for piece in additions(tokens, shape_of(model))) for r in GPUS.values()
    ]
    yield f"  {'without: additions':22}" + "".join(f"{-us:8.0f}" for us in floor)
    ratios = (over_floor(model, tokens, pieces, rates) for rates in GPUS.values())
    yield f"  {'over the frozen floor':22}" + "".join(f"{ratio:8.3f}" for ratio in ratios)


def report(fields: dict | None = None) -> str:
    """The table; ``fields`` of the tiles by form, to ask what another tile would do."""
    lines = [
        "PREDICTED from machine code and counts, not measured: microseconds that a layer's linears take beside their",
        "products, outside of its slot. Columns: " + ", ".join(GPUS),
    ]
    for p, alignment in ((1 / 8, 1), (1 / 8, 16), (1 / 8, 64), (1 / 4, 1), (1 / 4, 16)):
        lines += ["", *_lines("llama-2-7b", 8192, p, alignment, fields or {})]
    return "\n".join(lines)
