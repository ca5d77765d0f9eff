"""What LoSiA should add to a decoder layer on a GPU: a prediction from machine code and counts, never a measurement.

``python -m bench predicted``. Bytes and operations are counted from the shapes and the tiles that the package chooses.
The machine code of each product, compiled here, says whether its copies and its products overlap. Rates are of the data
sheets and of earlier runs; the one between L2 and the cores is a guess, and binds several kernels. What a GPU measures
replaces all of it: ``python -m bench layer``."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from losia_kernels import LoSiAConfig
from losia_kernels.finetune.estimate import LoSiA
from losia_kernels.kernels.launch import LaunchConfig, choose_config, padded

from .counts import BF16, FLOAT32, LAUNCH_US, REACHED, UPDATE_BYTES, scattered, touched
from .models import shape_of

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


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


@dataclass(frozen=True)
class Layer:
    """A decoder layer outside of its slot; the first two fields say where, the others are LoSiAConfig's."""

    model: str = "llama-2-7b"
    tokens: int = 8192
    rank_factor: float = 1 / 8
    shape: str = "square"
    alignment: int = 1

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        return shape_of(self.model).linears

    @property
    def subnets(self) -> dict[str, tuple[int, int]]:
        """``(k_out, k_in)`` of each linear."""
        chosen = LoSiA(rank_factor=self.rank_factor, shape=self.shape)
        runs = self.alignment
        sizes = chosen.sizes(shape_of(self.model)).items()
        return {name: (out // runs * runs, inner // runs * runs) for name, (out, inner) in sizes}

    @property
    def sharers(self) -> list[tuple[str, ...]]:
        """The linears that read one input, for each input."""
        alone = [name for name in self.linears if not any(name in each for each in SHARED_INPUTS)]
        return [*SHARED_INPUTS, *((name,) for name in alone)]

    def keeps_input(self, name: str) -> bool:
        """Whether it is kept whole, the parts that would be gathered of it being no smaller."""
        names = next(each for each in self.sharers if name in each)
        parts = sum(self.subnets[each][1] for each in names)
        return len(names) > 1 and parts >= self.linears[name][1]

    def turned(self, name: str) -> bool:
        """Whether the kernel works on the transposed gradient: both sides are gathered in the backward, and the longer
        one in the product."""
        k_out, k_in = self.subnets[name]
        return self.keeps_input(name) and k_in > k_out

    def __str__(self) -> str:
        chosen = "single neurons" if self.alignment == 1 else f"runs of {self.alignment}"
        return f"{self.model}, {self.tokens} tokens, p = {self.rank_factor:.3f}, {self.shape}, {chosen}"


PAPER = Layer()
DEFAULT = replace(PAPER, rank_factor=LoSiAConfig().rank_factor, shape=LoSiAConfig().shape)
QUARTER = replace(PAPER, rank_factor=1 / 4)
LAYERS = (
    *(replace(layer, alignment=a) for layer in (DEFAULT, PAPER, QUARTER) for a in (1, 16)),
    *(replace(PAPER, alignment=a) for a in (32, 64)),
)


def gradient(layer: Layer, name: str, overlaps: bool, fields: dict) -> list[Piece]:
    """What is gathered in the product is "dy", as of most layers, what comes in rows "x"."""
    (out, inner), (k_out, k_in) = layer.linears[name], layer.subnets[name]
    whole = layer.keeps_input(name)
    what = "gathers of x", "gathers of dy"
    if layer.turned(name):
        out, inner, k_out, k_in, what = inner, out, k_in, k_out, what[::-1]
    tokens, alignment, pieces = layer.tokens, layer.alignment, []
    size = tokens, k_out, k_in, alignment
    config = choose_config("subnet_grad", "sm_90", torch.bfloat16, *size, chosen_from=out)
    config = LaunchConfig(**{**vars(config), **fields.get(config.variant, {})})
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
    count = sum(len(names) - 1 for names in SHARED_INPUTS)
    return [Piece("additions of dx", 3 * size, 3 * size)] * count


def added(layer: Layer, overlaps: dict, fields: dict) -> list[Piece]:
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
        pieces += gradient(layer, name, overlaps[name], fields)
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
def machine_code(layer: Layer, name: str) -> bool:
    """Whether copies and products overlap in the code of this gradient, compiled for sm_90: no product waits for the
    one before, and copies are on their way beside it."""
    from losia_kernels.kernels.subnet_grad import launch_subnet_grad

    from ..harness.machine_code import facts, launches

    meta = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
    (out, inner), (k_out, k_in) = layer.linears[name], layer.subnets[name]

    def index(k: int) -> torch.Tensor:
        return meta(k, dtype=torch.int64)

    def case() -> None:
        whole = layer.keeps_input(name)
        x = meta(layer.tokens, inner if whole else padded(k_in))
        x, in_idx = (x, index(k_in)) if whole else (x[:, :k_in], None)
        dy = meta(layer.tokens, out)
        launch_subnet_grad(dy, x, index(k_out), in_idx, layer.alignment)

    (code,) = (each for kernel in launches("sm_90", case) if (each := facts(kernel))["product_of"])
    return not code["serialized"] and bool(code["copies_ahead"])


def overlaps_of(layer: Layer) -> dict[str, bool]:
    return {name: machine_code(layer, name) for name in layer.linears}


def _lines(layer: Layer, fields: dict) -> Iterator[str]:
    pieces = added(layer, overlaps_of(layer), fields)
    yield f"{layer}: {sum(piece.launches for piece in pieces)} launches"
    columns = {gpu: layer_us(pieces, rates) for gpu, rates in GPUS.items()}
    for name in columns["H200"]:
        yield f"  {name:22}" + "".join(f"{column[name]:8.0f}" for column in columns.values())
    floor = [sum(piece.us(rates) for piece in additions(layer)) for rates in GPUS.values()]
    yield f"  {'without: additions':22}" + "".join(f"{-us:8.0f}" for us in floor)
    ratios = (over_floor(layer, pieces, rates) for rates in GPUS.values())
    yield f"  {'over the frozen floor':22}" + "".join(f"{ratio:8.3f}" for ratio in ratios)


def report(fields: dict | None = None) -> str:
    """The table; ``fields`` of the tiles by form, to ask what another tile would do."""
    lines = [
        "PREDICTED from machine code and counts, not measured: microseconds that a layer's linears take beside their",
        "products, outside of its slot. Columns: " + ", ".join(GPUS),
    ]
    for layer in LAYERS:
        lines += ["", *_lines(layer, fields or {})]
    return "\n".join(lines)
