"""Host overhead: CPU time that Python and dispatch take a layer, on tensors so small that arithmetic is nothing.

    python -m bench host

Per linear and step, LoSiALinear against nn.Linear with frozen and with trained weights, and the optimizer's step
against torch's AdamW: medians of CPU time of this process, which other work on the machine disturbs little.

The rows "launches stubbed" go the way that a GPU's tensors go, on a CPU: all of LoSiA's Python up to the launches of
its kernels, which do nothing. Left out are Triton's own launch and the copy of the step's table; torch's matmuls still
run on the CPU. It is the cost of the host code to be lowered, not the time of anything on a GPU."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from unittest.mock import patch

import torch
from torch import Tensor, nn

from losia_kernels import LoSiAAdamW, LoSiAConfig, apply_losia

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


class NoKernel:
    """``kernel[grid](...)`` that launches nothing."""

    def __getitem__(self, grid: tuple) -> Callable[..., None]:
        return lambda *args, **constants: None


@contextlib.contextmanager
def launches_stubbed() -> Iterator[None]:
    """The ops take the way of a GPU's tensors, up to the launch: outputs are not filled, and nothing is updated."""
    from losia_kernels.kernels import adamw, gather, subnet_grad

    with contextlib.ExitStack() as stack:
        for plain, launcher, file in (
            ("gather.gather_features_plain", "launch_gather_features", gather),
            ("subnet_grad.subnet_grad_plain", "launch_subnet_grad", subnet_grad),
            ("adamw.subnets_adamw_plain_", "launch_subnets_adamw_", adamw),
        ):
            kernel = next(each for each in vars(file) if each.endswith("_kernel"))
            stack.enter_context(patch.object(file, kernel, NoKernel()))
            stack.enter_context(patch(f"losia_kernels.ops.{plain}", getattr(file, launcher)))
        yield


def microseconds(kind: str) -> dict[str, float]:
    chain, optimizer = make(kind)
    x = torch.randn(TOKENS, FEATURES, requires_grad=True)
    times: dict[str, list[float]] = {phase: [] for phase in PHASES}

    def timed(phase: str, run: Callable[[], Tensor | None]) -> Tensor | None:
        start = time.process_time()
        result = run()
        times[phase].append(time.process_time() - start)
        return result

    for _ in range(WARM_UP + REPEATS):
        loss = timed("forward", lambda: chain(x).sum())
        timed("backward", loss.backward)
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
    for kind, times in measured.items():
        cells = (f"{times[p]:>10.1f}" if p in times else f"{'':>10}" for p in PHASES)
        lines.append(f"{kind:<36} {' '.join(cells)}")
    return "\n".join(lines)
