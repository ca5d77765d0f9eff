"""The declarative list of runs, most telling first."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from ..methods import STUDY
from .tasks import TASKS

SEARCH_SEED = 100  # its order of batches is in no final run
SEEDS = (0, 1, 2)
TOKENS_PER_MINUTE = 4000  # of one CPU core, forward and backward, float32
TOKENS = {"past-tense": 12, "plural": 12, "pronunciation": 16, "arithmetic": 14, "code": 80}
OURS, LOSIA = "losia-wide-r8", "losia-p8"  # the default; the paper's settings, calibrated


@dataclass(frozen=True)
class Scale:
    """``longest``: characters of a training sample, of longer ones none is taken; ``few``: score the first held-out
    items of each task only; ``other_text``: how many items of English and of code say what was lost; ``near``: the
    scale whose best rates a search begins around, where that has searched."""

    name: str
    steps: int
    batch: int
    longest: int
    few: bool
    other_text: int = 10
    near: str = ""


SMALL, LARGE = Scale("small", 60, 4, 240, True), Scale("large", 300, 16, 480, False, other_text=40)
# single tasks: does what the short runs say hold for longer ones, and for larger batches?
LONG, BATCH_16 = (
    Scale(name, *sizes, 240, few=True, near="small")
    for name, sizes in (("long", (1000, 4)), ("batch-16", (60, 16)))
)
SCALES = {scale.name: scale for scale in (LARGE, SMALL, LONG, BATCH_16)}


@dataclass(frozen=True)
class Run:
    """One result. ``lr`` None: the best of the method's search on the task; ``steps`` None: as many as take the time of
    full fine-tuning's."""

    kind: str  # untrained, search, main, oracle, sequence, analysis, masked, timing, equal-time
    scale: str
    task: str
    method: str
    seed: int = 0
    lr: float | None = None
    steps: int | None = 0

    @property
    def id(self) -> str:
        last = f"lr{self.lr:.0e}" if self.kind == "search" else f"seed{self.seed}"
        parts = self.scale, self.task, self.kind, self.method, last
        return "_".join(parts)

    @property
    def minutes(self) -> float:
        """Estimated for one CPU core."""
        scale = SCALES[self.scale]
        if self.kind in ("sequence", "analysis", "masked"):
            return 8.0
        steps = 0 if self.kind == "untrained" else self.steps or scale.steps
        work = steps * scale.batch * TOKENS[self.task] / TOKENS_PER_MINUTE
        evaluation = {"search": 0.1, "timing": 0.0}.get(self.kind, 0.4)
        return (work * (3 if self.kind == "oracle" else 1) + evaluation) * (1 if scale.few else 3)


NEAR = 0.01  # nats a token between two trials of a search that tell nothing: seeds differ by more
# the rates that a search may try
RATES = tuple(float(f"{digit}e{power}") for power in range(-7, 0) for digit in (1, 3))


def best_rate(costs: dict[float, float]) -> float:
    """Of the rates that cost at most NEAR more than the least the smallest: they learn alike, and it loses least."""
    return min(rate for rate, cost in costs.items() if cost <= min(costs.values()) + NEAR)


def trial_of(scale: Scale, task: str, method: str, lr: float) -> Run:
    return Run("search", scale.name, task, method, SEARCH_SEED, lr, scale.steps)


def searches(scale: Scale, task: str, *methods: str) -> Iterator[Run]:
    """The trials that every search begins with: ``Store.trials`` says which it needs beyond them. Of a scale that
    begins near another's it says all."""
    for method in methods:
        for lr in () if scale.near else STUDY[method].lrs:
            yield trial_of(scale, task, method, lr)


def finals(scale: Scale, task: str, *methods: str) -> Iterator[Run]:
    for seed, method in product(SEEDS, methods):
        yield Run("main", scale.name, task, method, seed, None, scale.steps)


def several(scale: Scale, task: str, *methods: str) -> list[Run]:
    return [*searches(scale, task, *methods), *finals(scale, task, *methods)]


PAPER = "losia-paper"  # many cycles: where there are steps for them
PLACED = tuple(name for name in STUDY if STUDY[name].chooses and name != PAPER)
EXPLORED = tuple(name for name in STUDY if STUDY[name].explored)
CANDIDATES = (OURS, "losia-wide")  # on all tasks
SIZES = ("losia-wide-p4", "losia-wide-p16", "losia-wide-p2")  # for which rate goes with which p
FIRST = ("fft", "lora-r8", LOSIA, "lora-r64")
RIVALS = ("dora-r64", "pissa-r64", "galore")
PEERS = ("shira", "miss", "blocks-64", "columns-16")
BRIEF = ("pronunciation", "past-tense", "arithmetic", "plural")  # tasks with short answers
SEQUENCE = ("past-tense", "pronunciation", "arithmetic", "code", "plural")
CONFIRMED = (OURS, "lora-r8", "fft", "lora-r64")


def confirmation(scale: Scale) -> list[Run]:
    """The methods that matter, on one task."""
    runs = finals(scale, "pronunciation", *CONFIRMED, *((PAPER,) if scale == LONG else ()))
    return [Run("untrained", scale.name, "pronunciation", "fft"), *runs]


def study(scale: Scale) -> list[Run]:
    """All runs of one scale."""
    if scale.near:
        return confirmation(scale)
    runs = [Run("untrained", scale.name, task, "fft") for task in TASKS]
    for method, task in product(CANDIDATES, BRIEF):
        runs += several(scale, task, method)
    for method, task in product(SIZES, BRIEF[:3]):
        runs += searches(scale, task, method)
    for method in (OURS, *FIRST):
        runs += several(scale, "code", method)
    for task in BRIEF:
        runs += several(scale, task, *FIRST)
    for method in (name for name in PLACED if name not in CANDIDATES):
        runs += several(scale, "pronunciation", method)
    runs += searches(scale, "pronunciation", *EXPLORED)
    runs += several(scale, "pronunciation", *RIVALS, *PEERS)
    for method in (OURS, "lora-r64", "fft"):
        where = scale.name, "pronunciation", method, 0, None, 2 * scale.steps
        runs.append(Run("analysis", *where))
    runs.append(Run("masked", scale.name, "past-tense", "fft", 0, None, scale.steps))
    for task in ("past-tense", "pronunciation", "arithmetic"):
        runs.append(Run("oracle", scale.name, task, LOSIA, 0, None, scale.steps))
    for seed, method in product(SEEDS, (OURS, "lora-r8", "lora-r64")):
        runs.append(
            Run("sequence", scale.name, "+".join(SEQUENCE), method, seed, None, scale.steps)
        )
    for task, method in product(("past-tense", "arithmetic", "code"), RIVALS):
        runs += several(scale, task, method)
    for task, method in product(("past-tense", "arithmetic"), PEERS):
        runs += several(scale, task, method)
    return list(dict.fromkeys(runs))


def timings(scale: Scale) -> list[Run]:
    """Seconds a step, and runs as long as full fine-tuning's: only where nothing else runs."""
    if scale.near:
        return []
    where, names = (scale.name, "pronunciation"), ("fft", OURS, *FIRST[1:], *RIVALS)
    timed = [Run("timing", *where, name, 0, STUDY[name].lrs[0], 12) for name in names]
    others = (name for name in CONFIRMED if name != "fft")
    return timed + [Run("equal-time", *where, *each, None, None) for each in product(others, SEEDS)]


def ten_minutes() -> list[Run]:
    """One seed of the methods that matter on the past tense, at the learning rates that the study found."""
    return [run for run in finals(SMALL, "past-tense", *CONFIRMED) if run.seed == 0]
