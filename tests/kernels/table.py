"""Every kernel against its float64 oracle, as a table: ``make kernels``.

Without a GPU the kernels are interpreted. An error is the largest absolute difference to the
oracle, of the output that comes closest to what ``tests.tolerance`` allows. Exit status 1 if one is
over.
"""

import contextlib
import itertools
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csrc_ref.adamw import subnet_adamw_ref
from csrc_ref.cross_entropy import cross_entropy_ref
from csrc_ref.gather import gather_features_ref
from csrc_ref.importance import importance_marginals_ref, importance_update_ref
from csrc_ref.scores import score_marginals_ref
from csrc_ref.subnet_grad import subnet_grad_ref
from losia_kernels.kernels.launch import override_config
from losia_kernels.ops.adamw import Update
from tests.conftest import INTERPRETED  # which chooses before anything imports triton
from tests.kernels.updates import OPTIONS, choose, make_update
from tests.tolerance import error_and_allowed

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MATRICES = ((37, 53), (64, 272))  # odd sizes, and whole vectors past a tile
PRODUCTS, LOGITS = ((67, 13, 37), (256, 128, 64)), ((7, 53), (2, 5000))
OBSERVED = ("sensitivity", 0.5)  # kind, grad_scale
CAPPED = (-100, 0.1, 5.0, 0.5)  # ignore_index, label_smoothing, softcap, logit_scale


def randn(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def half(size: int) -> Tensor:
    return choose(size, -(-size // 2), DEVICE)


def product(dtype: torch.dtype, tokens: int, out: int, n: int) -> tuple:
    return randn(dtype, tokens, out), randn(dtype, tokens, n), half(out), half(n)


def update(dtype: torch.dtype, *shape: int) -> tuple:
    k = [len(half(size)) for size in shape]
    return make_update(shape, k, dtype, torch.float32, DEVICE)


def smoothed(dtype: torch.dtype, *shape: int) -> tuple:
    state = (randn(torch.float32, *shape).abs() for _ in range(2))
    return *state, randn(dtype, *shape), randn(dtype, *shape), 0.85, 0.7, *OBSERVED


def scored(dtype: torch.dtype, *shape: int) -> tuple:
    return *(randn(dtype, *shape).abs() for _ in range(2)), *map(half, shape)


def logits(dtype: torch.dtype, tokens: int, vocabulary: int) -> tuple:
    return randn(dtype, tokens, vocabulary), choose(vocabulary, tokens, DEVICE), *CAPPED


def step(run: Callable, *args) -> Any:
    if run is subnet_adamw_ref:
        return run(*args[:7], lr=args[7], step=args[8], **OPTIONS)
    return run([Update(*args)], **OPTIONS)


def whole(run: Callable, *args) -> Any:
    return run(*args) if run is cross_entropy_ref else run(*args, True)


def block(run: Callable, z: Tensor, labels: Tensor, *formula) -> Any:
    """The last two thirds of the vocabulary; the rest of the logits stays as it is."""
    first, vocabulary = z.shape[1] // 3, z.shape[1]
    _, lse, grad = cross_entropy_ref(z, labels, *formula)
    if run is cross_entropy_ref:
        return torch.cat([z[:, :first].double(), grad[:, first:]], dim=1)
    run(z[:, first:], labels, lse.float(), first, vocabulary, *formula)


class Case(NamedTuple):
    """``kernels/<word>.py`` has ``launch_<op>`` and ``ops/<word>.py`` its plain form; both write
    the arguments ``written``. ``call(run, *arguments)`` runs them and the oracle."""

    op: str
    oracle: Callable
    arguments: Callable[..., tuple]
    shapes: tuple[tuple[int, ...], ...] = MATRICES
    written: tuple[int, ...] = ()
    call: Callable[..., Any] = lambda run, *args: run(*args)

    def outputs(self, run: Callable, args: tuple) -> list[Tensor]:
        args = tuple(each.clone() if isinstance(each, Tensor) else each for each in args)
        returned = self.call(run, *args)
        returned = [returned] if isinstance(returned, Tensor) else list(returned or ())
        if run is self.oracle:
            return [each.double() for each in returned]  # a gather has its argument's dtype
        return returned + [args[i] for i in self.written]

    def judge(self, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[float, float]:
        """Error and what is allowed, of the worst output."""
        word, name = self.oracle.__module__.removeprefix("csrc_ref."), self.op.removesuffix("_")
        kernels, ops = (
            import_module(f"losia_kernels.{each}.{word}") for each in ("kernels", "ops")
        )
        plain = getattr(ops, self.op.replace(name, f"{name}_plain"))
        torch.manual_seed(0)
        args = self.arguments(dtype, *shape)
        runs = getattr(kernels, f"launch_{self.op}"), plain, self.oracle
        results = zip(*(self.outputs(run, args) for run in runs), strict=True)
        return max((error_and_allowed(*each) for each in results), key=ratio)


CASES = (
    Case("gather_features", gather_features_ref, lambda *a: (randn(*a), half(a[-1]))),
    Case("subnet_grad", subnet_grad_ref, product, PRODUCTS),
    Case("subnets_adamw_", subnet_adamw_ref, update, MATRICES, (0, 1, 3, 4), step),
    Case("importance_update_", importance_update_ref, smoothed, MATRICES, (0, 1)),
    Case(
        "importance_marginals", importance_marginals_ref, lambda *a: (*smoothed(*a)[2:4], *OBSERVED)
    ),
    Case("score_marginals", score_marginals_ref, scored),
    Case("cross_entropy_grad_", cross_entropy_ref, logits, LOGITS, (0,), whole),
    Case("cross_entropy_block_grad_", cross_entropy_ref, logits, LOGITS, (0,), block),
)


def ratio(judged: tuple[float, float]) -> float:
    error, allowed = judged
    return error / allowed if error < torch.inf and allowed < torch.inf else torch.inf


def judge_all() -> int:
    """Print a line for each case, dtype and shape; how many are over."""
    over = 0
    for case, dtype in itertools.product(CASES, DTYPES):
        oracle = f"{case.oracle.__module__}.{case.oracle.__name__}"
        for shape in case.shapes:
            judged = case.judge(dtype, shape)
            over += ratio(judged) > 1
            what = f"{case.op:<26}{str(dtype)[6:]:<10}{' x '.join(map(str, shape)):<14}"
            held = f"{judged[0]:>10.2e}{judged[1]:>10.2e}{ratio(judged):>7.2f}"
            print(what, held, "OVER" if ratio(judged) > 1 else "ok  ", oracle, flush=True)
    return over


def main() -> int:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh tensors are full of NaN
    print("interpreted on the CPU" if INTERPRETED else torch.cuda.get_device_name())
    print(f"{'op':<26}{'dtype':<10}{'shape':<14}      error   allowed  ratio      oracle")
    with contextlib.ExitStack() as stack:
        if INTERPRETED:  # numpy adds a tile's outputs one after the other, a GPU in a tree
            for op in ("importance_marginals", "score_marginals"):
                stack.enter_context(override_config(op, block_out=16))
        over = judge_all()
    print(f"{over} over" if over else "all within twice plain torch's error plus 1e-6")
    return min(over, 1)


if __name__ == "__main__":
    sys.exit(main())
