"""Host overhead: CPU time that Python and dispatch take a layer, on tensors so small that arithmetic is nothing.

    python -m bench host

Per linear and step, LoSiALinear against nn.Linear with frozen and with trained weights, and the optimizer's step
against torch's AdamW: medians of CPU time of this process, which other work on the machine disturbs little.

The rows "launches stubbed" go the way that a GPU's tensors go, on a CPU: all of LoSiA's Python up to the launches of
its kernels, which do nothing. Left out are Triton's own launch and the copy of the step's table; torch's matmuls still
run on the CPU. "In a graph" is what a replay of ``CapturedBackward`` leaves to the host: a look at what may have
changed, and the gradients' way into ``.grad``. It is the cost of the host code to be lowered, not the time of anything
on a GPU."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor, nn

from losia_kernels import CapturedBackward, LoSiAAdamW, LoSiAConfig, apply_losia

from .simulated import launching_nothing

LAYERS, FEATURES, TOKENS = 210, 16, 4  # as many linears as SmolLM2-135M's blocks have
WARM_UP, REPEATS = 5, 30
KINDS = ("frozen", "full", "losia", "losia, in backward")
PHASES = ("forward", "backward", "step")


class Chain(nn.Module):
    """``LAYERS`` linears, seven a block, each fed by the one before."""

    def __init__(self):
        super().__init__()
        linears = [nn.Linear(FEATURES, FEATURES, bias=False) for _ in range(LAYERS)]
        blocks = (linears[start : start + 7] for start in range(0, LAYERS, 7))
        self.layers = nn.Sequential(*(nn.Sequential(*block) for block in blocks))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def make(kind: str) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    """A chain and its optimizer; ``kind`` is one of ``KINDS``. No layer observes."""
    torch.manual_seed(0)
    chain = Chain()
    if kind == "frozen":
        return chain.requires_grad_(False), None
    if kind == "full":
        return chain, torch.optim.AdamW(chain.parameters(), lr=1e-3)
    sizes = {"rank_factor": 1 / 2, "output_dim_factor": 0.0}
    apply_losia(chain, LoSiAConfig.paper(**sizes, period=10**6, importance="gradient"))
    return chain, LoSiAAdamW(chain, lr=1e-3, in_backward=kind == "losia, in backward")


class NoGraph:
    """In the place of ``torch.cuda.CUDAGraph``."""

    def replay(self) -> None: ...


@contextlib.contextmanager
def graphs_stubbed() -> Iterator[None]:
    """Graphs are captured of nothing, and replays leave everything as it was."""
    from losia_kernels.training import capture

    stream = SimpleNamespace(wait_stream=lambda other: None)
    with contextlib.ExitStack() as stack:
        for name, answer in {
            "CUDAGraph": NoGraph,
            "graph": lambda graph, **options: contextlib.nullcontext(),
            "graph_pool_handle": object,
            "Stream": lambda device: stream,
            "current_stream": lambda device: stream,
            "stream": lambda stream: contextlib.nullcontext(),
        }.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        fork = patch.object(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
        stack.enter_context(fork)
        stack.enter_context(patch.object(capture, "_has_graphs", lambda device: True))
        yield


@contextlib.contextmanager
def launches_stubbed() -> Iterator[None]:
    """The ops take the way of a GPU's tensors, up to the launch: outputs are not filled, and nothing is updated."""
    from losia_kernels.kernels import adamw, gather, subnet_grad

    with launching_nothing(), contextlib.ExitStack() as stack:
        for plain, launch in (
            ("gather.gather_features_plain", gather.launch_gather_features),
            ("subnet_grad.subnet_grad_plain", subnet_grad.launch_subnet_grad),
            ("adamw.subnets_adamw_plain_", adamw.launch_subnets_adamw_),
        ):
            stack.enter_context(patch(f"losia_kernels.ops.{plain}", launch))
        yield


def microseconds(kind: str, captured: bool = False) -> dict[str, float]:
    """Of a captured form forward and backward are one: the backward's column has both."""
    chain, optimizer = make(kind)
    x = torch.randn(TOKENS, FEATURES, requires_grad=not captured)
    replay = CapturedBackward(lambda x: chain(x).sum(), optimizer) if captured else None
    times: dict[str, list[float]] = {phase: [] for phase in PHASES}

    def timed(phase: str, run: Callable[[], Tensor | None]) -> Tensor | None:
        start = time.process_time()
        result = run()
        times[phase].append(time.process_time() - start)
        return result

    for _ in range(WARM_UP + REPEATS):
        if replay is None:
            loss = timed("forward", lambda: chain(x).sum())
            timed("backward", loss.backward)
        else:
            timed("backward", lambda: replay(x))
        if optimizer is not None:
            timed("step", optimizer.step)
            optimizer.zero_grad()
        x.grad = None
    medians = {name: statistics.median(each[WARM_UP:]) for name, each in times.items() if each}
    return {name: seconds / LAYERS * 1e6 for name, seconds in medians.items()}


def report() -> str:
    """The table, of this process and this machine; nothing is written."""
    lines = [
        f"host overhead on the CPU, microseconds a linear ({LAYERS} of {FEATURES} x {FEATURES}, {TOKENS} tokens; "
        f"medians of {REPEATS}, {torch.get_num_threads()} threads)",
        f"{'':<36} {'forward':>10} {'backward':>10} {'step':>10}",
    ]
    measured = {kind: microseconds(kind) for kind in KINDS}
    with launches_stubbed():
        for kind in KINDS[2:]:
            measured[f"{kind}, launches stubbed"] = microseconds(kind)
        with graphs_stubbed():
            measured["losia, in a graph, launches stubbed"] = microseconds("losia", captured=True)
    for kind, times in measured.items():
        cells = (f"{times[p]:>10.1f}" if p in times else f"{'':>10}" for p in PHASES)
        lines.append(f"{kind:<36} {' '.join(cells)}")
    return "\n".join(lines)
