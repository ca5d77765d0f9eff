"""Plan to scale: step time, memory and traffic of LoSiA on many GPUs, from one GPU's figures and the links' speeds.

    python -m bench.cluster [FOLDER]     writes cluster.md and cluster.svg (default: bench/results)

A model, not a measurement: compute runs at the given rate of dense matmuls, links at their stated rates, a collective
takes the ring's share of its bytes at the slowest link it crosses plus a latency for each doubling of the ranks. Its
byte counts and its memory are held to real processes by tests/parallel/test_cluster.py."""

import functools
import itertools
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .harness.markdown import table
from .harness.pictures import draw
from .speed.counts import H200
from .speed.models import shape_of

GIB = 2**30


@dataclass(frozen=True)
class Model:
    """Groups of a decoder: the shapes (out, in) of one block's linears, ``blocks`` times."""

    name: str
    blocks: int
    linears: tuple[tuple[int, int], ...]
    frozen: int = 0  # values outside the blocks: embedding and output layer

    @classmethod
    def of(cls, name: str) -> "Model":
        shape = shape_of(name.lower().replace(" ", "-"))
        outside = 2 * shape.vocabulary * shape.hidden
        return cls(name, shape.layers, tuple(shape.linears.values()), outside)

    @property
    def block(self) -> int:
        return sum(out * in_ for out, in_ in self.linears)

    @property
    def weights(self) -> int:
        return self.blocks * self.block

    def subnet(self, p: float) -> int:
        """Trained values of one block."""
        return sum(int(p * out) * int(p * in_) for out, in_ in self.linears)


MODELS = tuple(Model.of(name) for name in ("LLaMA-2 7B", "LLaMA-2 13B", "LLaMA-2 70B"))
ENGINES = ("ddp", "fsdp")


@dataclass(frozen=True)
class Setting:
    """One GPU's figures and the links. The GPU's were measured on an H200; the links' are their makers'."""

    p: float = 1 / 8
    period: int = 100
    tokens: int = 8192  # of one GPU's micro-batch
    weight_bytes: int = 2  # bfloat16
    matmul: float = 1e12 * H200.matmul  # dense bf16 FLOP/s of one GPU
    copy: float = 1e9 * H200.copy  # bytes/s read and written
    inside: float = 450e9  # bytes/s of one GPU to its neighbours in a machine of 8 (NVLink)
    outside: float = 50e9  # bytes/s of one GPU to other machines (400 Gbit/s each)
    latency: float = 10e-6  # seconds for each doubling of the ranks
    machine: int = 8


def ddp_bytes(model: Model, p: float, weight_bytes: int) -> dict[str, float]:
    """What one rank hands to collectives in a step of one micro-batch. ``subnets``: float32 gradients, all-reduced.
    ``importance``: the observing group's dense gradients, and a byte a layer that says whether it was used."""
    importance = weight_bytes * model.block + len(model.linears)
    return {"subnets": 4 * model.blocks * model.subnet(p), "importance": importance}


def fsdp_bytes(model: Model, p: float, period: int, weight_bytes: int) -> dict[str, float]:
    """``gather``: weights and subnets of all blocks, for the forward and again for the backward. ``subnets``,
    ``importance``: as with DDP, reduce-scattered. ``write_back``: new values in the weight's dtype, all-gathered.
    ``moves``: new subnets, and the marginals twice."""
    trained = model.blocks * model.subnet(p)
    sums = sum(2 * 4 * (out + in_) for out, in_ in model.linears)
    return {
        **ddp_bytes(model, p, weight_bytes),
        "importance": weight_bytes * model.block,
        "gather": 2 * (weight_bytes * model.weights + 4 * trained),
        "write_back": weight_bytes * trained,
        "moves": (4 * model.subnet(p) + sums) / period,
    }


def held_bytes(model: Model, p: float, weight_bytes: int, shards: int) -> float:
    """Of one rank between two steps: weights, and of each trained value the master and two moments, all float32."""
    trained = 12 * model.blocks * model.subnet(p)
    return (weight_bytes * (model.weights + model.frozen) + trained) / shards


def peak_bytes(
    model: Model, p: float, weight_bytes: int, shards: int, scratch: int = 0, period: int = 100
) -> float:
    """What an observing step needs on top, without activations.

    In the backward the dense gradients that one block has kept, in shards; one of them whole, and once more as it is
    cut; and, in shards, two whole blocks: the one that computes and the next. In the update importance and uncertainty
    of the block beside what it has kept; in a slot of several steps they are there in the backward too. Always the
    gradients of the subnets. ``scratch``: float32 temporaries of a weight's shard, which plain torch has four of and
    the kernels none."""
    largest = max(out * in_ for out, in_ in model.linears)
    whole = 2 * (weight_bytes * model.block + 4 * model.subnet(p)) if shards > 1 else 0
    lasting = (weight_bytes * model.block + 4 * model.blocks * model.subnet(p)) / shards
    scores = 8 * model.block / shards
    backward = whole + (2 if shards > 1 else 1) * weight_bytes * largest + (period > 1) * scores
    return lasting + max(backward, scores + 4 * scratch * largest / shards)


def activation_bytes(model: Model, tokens: int) -> float:
    """With gradient checkpointing: every block's input, and what one block keeps while it is computed again."""
    hidden, wide = model.linears[0][1], model.linears[-1][1]
    return 2 * tokens * (model.blocks * hidden + 16 * hidden + 3 * wide)


def ring_seconds(data: float, ranks: int, setting: Setting, passes: int = 1) -> float:
    """``passes`` 1: all-gather or reduce-scatter of ``data`` bytes; 2: all-reduce."""
    if ranks == 1:
        return 0.0
    link = setting.inside if ranks <= setting.machine else setting.outside
    return passes * ((ranks - 1) / ranks * data / link + setting.latency * math.log2(ranks))


def plan(model: Model, ranks: int, engine: str, setting: Setting) -> dict:
    """Seconds, bytes and memory of one step. Overlap: DDP's buckets and FSDP's gathers hide behind the computation of
    the blocks; the importance's collective, the write-back and the moves do not."""
    p, width = setting.p, setting.weight_bytes
    shards = ranks if engine == "fsdp" else 1
    multiplied = model.weights + model.frozen / 2  # an embedding is looked up
    products = 3 * multiplied + model.blocks * model.subnet(p)  # forward, again, and dx; subnets
    products += model.block  # the observing group's gradients
    # and its importance: two states read and written, weight and gradient read
    reads = 20 * model.block / setting.copy
    compute = 2 * setting.tokens * products / setting.matmul + reads / shards
    if engine == "ddp":
        traffic = ddp_bytes(model, p, width)
        hidden = ring_seconds(traffic["subnets"], ranks, setting, passes=2)
        exposed = ring_seconds(traffic["importance"], ranks, setting, passes=2)
    else:
        traffic = fsdp_bytes(model, p, setting.period, width)
        hidden = ring_seconds(traffic["gather"] + traffic["subnets"], ranks, setting)
        kinds = ("importance", "write_back", "moves")
        exposed = sum(ring_seconds(traffic[kind], ranks, setting) for kind in kinds)
    seconds = max(compute, hidden) + exposed
    memory = held_bytes(model, p, width, shards) + peak_bytes(model, p, width, shards)
    gradients = traffic["subnets"] + traffic["importance"]
    return {
        **{"model": model.name, "gpus": ranks, "engine": engine, "seconds": seconds},
        **{"hidden_seconds": hidden, "exposed_seconds": exposed, "efficiency": compute / seconds},
        "memory_gib": (memory + activation_bytes(model, setting.tokens)) / GIB,
        "share_of_full_gradient": gradients / (width * model.weights),
    }


HEAD = (
    "model | GPUs | engine | step, s | hidden, s | exposed, s | efficiency | memory, GiB"
    " | gradients on the wire, % of full"
)
FORMATS = ("", "", "", ".3f", ".3f", ".4f", ".1%", ".1f", ".1%")  # of a plan's values


def main(folder: Path) -> None:
    setting = Setting()
    sizes = itertools.product(MODELS, (8, 64, 256, 1024), ENGINES)
    rows = [plan(*size, setting) for size in sizes]
    body = [map(format, row.values(), FORMATS) for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    beginning = __doc__.split("\n\n")[0]
    text = f"{beginning}\n\nAssumed: {asdict(setting)}\n\n{table(HEAD, body)}\n"
    (folder / "cluster.md").write_text(text)
    draw({"cluster": functools.partial(picture, rows)}, folder, **{"figure.figsize": (11, 4.5)})
    print(text)


def picture(rows: list[dict], figure: Any) -> bool:
    left, right = figure.subplots(1, 2)
    for number, (model, engine) in enumerate(itertools.product(MODELS, ENGINES)):
        points = [row for row in rows if (row["model"], row["engine"]) == (model.name, engine)]
        look = {"color": f"C{number // 2}", "linestyle": "--" if engine == "ddp" else "-"}
        for pane, key in ((left, "efficiency"), (right, "memory_gib")):
            gpus, values = [row["gpus"] for row in points], [row[key] for row in points]
            pane.plot(gpus, values, label=f"{model.name} {engine}", **look)
    left.set(xscale="log", xlabel="GPUs", ylabel="compute / step time")
    right.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="GiB a GPU")
    left.set_title("Weak scaling, modelled")
    right.set_title("Memory, modelled")
    left.legend(fontsize=7)
    return True


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results")
