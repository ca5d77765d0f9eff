"""Each kernel against eager torch, compiled eager torch and the strongest library form; time, rates, share of the roof.

A form is a function of the case's inputs. Forms that write their arguments return them. "ours" is held to the kernels'
rule (twice eager's error), the others to 2 % of the float64 result, which a bfloat16 output meets."""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.utils._pytree import tree_leaves, tree_map

from losia_kernels import ops
from losia_kernels.ops.adamw import Update, subnets_adamw_plain_, update_subnets_
from losia_kernels.ops.gather import gather_features_plain
from losia_kernels.ops.importance import importance_marginals_plain, importance_update_plain_
from losia_kernels.ops.scores import score_marginals_plain
from losia_kernels.ops.subnet_grad import subnet_grad_plain

from ..harness.gates import gate_relative, gate_rule
from ..harness.jobs import Job, first_line
from ..harness.timing import measure, measure_roof, rotation
from .models import name_of, shape_of
from .sectors import UPDATE_BYTES, scattered

LR, BETA1, BETA2, EPS, STEP = 1e-2, 0.9, 0.999, 1e-8, 10


@dataclass(frozen=True)
class OpCase:
    """One operation at one size. ``inputs(generator)`` makes its arguments; ``truth`` is float64; ``moved_bytes``: each
    input read once, each output written once, of what is scattered whole sectors."""

    inputs: Callable[[torch.Generator], tuple]
    forms: dict[str, Callable[..., Any]]
    truth: Callable[..., Any]
    moved_bytes: int
    flops: int = 0


def _size(p: float, shape: tuple[int, int]) -> tuple[int, int]:
    return max(1, int(p * shape[0])), max(1, int(p * shape[1]))


def _randn(generator, *shape, dtype=torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device).to(dtype)


def _index(generator, size: int, k: int) -> Tensor:
    return torch.randperm(size, generator=generator, device=generator.device)[:k].sort().values


def gather_features(shape, p, tokens, dtype) -> OpCase:
    """``shape`` is (out, in); x is ``[t, in]``. Columns at random touch nearly every sector: a full read is counted."""
    k = _size(p, shape)[1]

    def inputs(g):
        return _randn(g, tokens, shape[1], dtype=dtype), _index(g, shape[1], k)

    forms = {"ours": ops.gather_features, "eager": gather_features_plain}
    moved = dtype.itemsize * tokens * (shape[1] + k)
    return OpCase(inputs, forms, lambda x, idx: x.double()[:, idx], moved)


def subnet_grad(shape, p, tokens, dtype) -> OpCase:
    (n_out, n_in), (k_out, k_in) = shape, _size(p, shape)

    def inputs(g):
        dy, x = (_randn(g, tokens, n, dtype=dtype) for n in shape)
        out_idx, in_idx = _index(g, n_out, k_out), _index(g, n_in, k_in)
        return dy, x, x[:, in_idx], out_idx, in_idx

    def cut(dy, x, x_sub, o, i):
        return (dy.T @ x).index_select(0, o).index_select(1, i)

    forms = {
        "ours": lambda dy, x, x_sub, o, i: ops.subnet_grad(dy, x_sub, o, None),
        "ours, gathering x too": lambda dy, x, x_sub, o, i: ops.subnet_grad(dy, x, o, i),
        "eager": lambda dy, x, x_sub, o, i: subnet_grad_plain(dy, x_sub, o, None),
    }
    select = "library: index_select, then matmul"
    forms[select] = lambda dy, x, x_sub, o, i: dy.index_select(1, o).T @ x_sub
    forms["library: dense gradient, then cut"] = cut
    moved = dtype.itemsize * tokens * (n_out + k_in) + 4 * k_out * k_in

    def truth(dy, x, x_sub, o, i):
        return dy[:, o].double().T @ x[:, i].double()

    return OpCase(inputs, forms, truth, moved, 2 * tokens * k_out * k_in)


def _adamw_inputs(g, shape, p, dtype) -> tuple:
    k_out, k_in = _size(p, shape)
    out_idx, in_idx = _index(g, shape[0], k_out), _index(g, shape[1], k_in)
    weight = _randn(g, *shape, dtype=dtype)
    subnet = weight[out_idx][:, in_idx].float()
    grad, avg = (_randn(g, k_out, k_in) for _ in range(2))
    step = torch.full((), STEP - 1.0, device=g.device)  # torch's fused AdamW counts on the device
    return weight, subnet, grad, avg, avg.square(), out_idx, in_idx, step


def _adamw_one_by_one(matrices: list[Update], *rates: float) -> None:
    for m in matrices:
        ops.subnet_adamw_(*m[:7], LR, *rates, STEP)


def _adamw_library(*matrices: tuple) -> list[Tensor]:
    """torch's fused AdamW on all subnets at once, then one index_put a weight."""
    columns = ([matrix[i] for matrix in matrices] for i in (1, 2, 3, 4))
    rates = {"lr": LR, "beta1": BETA1, "beta2": BETA2, "eps": EPS, "weight_decay": 0.0}
    steps = [matrix[7] for matrix in matrices]
    adamw(*columns, [], steps, fused=True, amsgrad=False, maximize=False, **rates)
    for weight, subnet, _, _, _, out_idx, in_idx, _ in matrices:
        weight[out_idx[:, None], in_idx] = subnet.to(weight.dtype)
    return [tensor for matrix in matrices for tensor in matrix[:2]]


def subnet_adamw(shape, p, tokens, dtype, matrices: int = 1) -> OpCase:
    k_out, k_in = _size(p, shape)

    def inputs(g):
        return tuple(_adamw_inputs(g, shape, p, dtype) for _ in range(matrices))

    def by(update: Callable) -> Callable:
        def run(*matrices: tuple) -> list[Tensor]:
            update([Update(*matrix[:7], LR, STEP) for matrix in matrices], BETA1, BETA2, EPS, 0.0)
            return [tensor for matrix in matrices for tensor in matrix[:2]]

        return run

    def truth(*matrices: tuple) -> list[Tensor]:
        return by(subnets_adamw_plain_)(*tree_map(_double, matrices))

    forms = {"ours": by(update_subnets_), "ours, a launch each": by(_adamw_one_by_one)}
    forms |= {"eager": by(subnets_adamw_plain_)}
    forms |= {"library: fused AdamW, then index_put": _adamw_library}
    weight = scattered(k_out, shape[1], k_in, itemsize=dtype.itemsize)
    moved = matrices * int(UPDATE_BYTES * k_out * k_in + weight)
    return OpCase(inputs, forms, truth, moved)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _states(g, shape) -> tuple:
    return tuple(_randn(g, *shape).abs() for _ in range(2))


def _weight_and_grad(g, shape, dtype) -> tuple:
    return tuple(_randn(g, *shape, dtype=dtype) for _ in range(2))


def _in_double(function: Callable) -> Callable:
    return lambda *arguments: function(*map(_double, arguments))


def importance_update(shape, p, tokens, dtype) -> OpCase:
    def by(update: Callable) -> Callable:
        def run(weight, grad, importance, uncertainty) -> list[Tensor]:
            update(importance, uncertainty, weight, grad, 0.85, 0.85, "sensitivity", 1.0)
            return [importance, uncertainty]

        return run

    def inputs(g):
        return _weight_and_grad(g, shape, dtype) + _states(g, shape)

    eager = by(importance_update_plain_)
    forms = {"ours": by(ops.importance_update_), "eager": eager}
    moved = shape[0] * shape[1] * (2 * dtype.itemsize + 16)
    return OpCase(inputs, forms, _in_double(eager), moved)


def importance_marginals(shape, p, tokens, dtype) -> OpCase:
    def eager(weight, grad):
        return importance_marginals_plain(weight, grad, "sensitivity", 1.0)

    forms = {"ours": lambda w, g: ops.importance_marginals(w, g), "eager": eager}
    inputs = functools.partial(_weight_and_grad, shape=shape, dtype=dtype)
    return OpCase(inputs, forms, _in_double(eager), shape[0] * shape[1] * 2 * dtype.itemsize)


def score_marginals(shape, p, tokens, dtype) -> OpCase:
    def eager(importance, uncertainty):
        return score_marginals_plain(importance, uncertainty, None, None)

    forms = {"ours": lambda i, u: ops.score_marginals(i, u), "eager": eager}
    inputs = functools.partial(_states, shape=shape)
    return OpCase(inputs, forms, _in_double(eager), shape[0] * shape[1] * 8)


CASES: dict[str, Callable[..., OpCase]] = {
    "subnet_grad": subnet_grad,
    "importance_update_": importance_update,
    "subnet_adamw_": subnet_adamw,
    "subnet_adamw_ x 32": functools.partial(subnet_adamw, matrices=32),
    "gather_features": gather_features,
    "importance_marginals": importance_marginals,
    "score_marginals": score_marginals,
}
USE_TOKENS = ("subnet_grad", "gather_features")
USE_P = (*USE_TOKENS, "subnet_adamw_", "subnet_adamw_ x 32")


def _copy(arguments: tuple) -> tuple:
    return tree_map(torch.clone, arguments)


def input_sets(case: OpCase, device: torch.device) -> list[tuple]:
    """So many that none is found in the cache when its turn comes again."""
    generator = torch.Generator(device).manual_seed(0)
    sets = [case.inputs(generator)]
    size = sum(tensor.nbytes for tensor in tree_leaves(sets))
    return sets + [case.inputs(generator) for _ in range(rotation(size, device) - 1)]


def gate(case: OpCase, name: str, form: Callable, arguments: tuple) -> dict[str, float]:
    truth = tree_leaves(case.truth(*_copy(arguments)))
    values = tree_leaves(form(*_copy(arguments)))
    if name.startswith("ours"):
        eager = tree_leaves(case.forms["eager"](*_copy(arguments)))
        found = [gate_rule(name, v, e, t) for v, e, t in zip(values, eager, truth, strict=True)]
    else:
        found = [gate_relative(name, v, t, 0.02) for v, t in zip(values, truth, strict=True)]
    return max(found, key=lambda entry: entry["error"] / entry["allowed"])


def forms_for(case: OpCase, device: torch.device) -> dict[str, Callable]:
    """With the compiled eager form on a GPU; on a CPU, where "ours" is eager torch too, compiling would take longer
    than the whole suite."""
    if device.type != "cuda":
        return case.forms
    eager_form = case.forms["eager"]
    compiled = torch.compile(lambda *arguments: eager_form(*arguments), dynamic=False)
    return {**case.forms, "compiled eager": compiled}


@torch.no_grad()  # as in a backward and in an optimizer's step, where these ops run
def run_case(case: OpCase, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Gate and time every form. Raises RedGate when the form in use is wrong; another's trouble is its entry."""
    sets, roof = input_sets(case, device), measure_roof(device, dtype)
    floor = roof.floor_ms(case.moved_bytes, case.flops)
    forms: dict[str, Any] = {}
    for name, form in forms_for(case, device).items():
        call = {name: lambda number, form=form: form(*sets[number % len(sets)])}
        try:
            passed = gate(case, name, form, sets[0])
            timing = measure(call, device, 0.3, hide_launch=True)[name]
        except Exception as error:
            if name == "ours":
                raise
            forms[name] = {"status": f"{type(error).__name__}: {first_line(error)}"}
            continue
        moved, flops = case.moved_bytes / timing.ms / 1e6, case.flops / timing.ms / 1e9
        rates = {"gbs": moved, "tflops": flops, "share_of_roof": floor / timing.ms}
        forms[name] = {"status": "ok", "gate": passed, **timing.to_dict(), **rates}
    if device.type == "cuda":
        torch._dynamo.reset()
    total = {"ms": forms["ours"]["ms"]}
    return {"forms": forms, "floor_ms": floor, "roof": vars(roof), "total": total}


def _sizes(device: torch.device) -> Iterator[tuple[float, str, str, str, float, int]]:
    """(priority, op, model, linear, p, tokens), most telling first."""
    if device.type != "cuda":
        yield from ((1, op, "smollm2-135m", "up_proj", 1 / 8, 1024) for op in CASES)
        return
    llama, dense = "llama-2-7b", ("subnet_grad", "subnet_adamw_", "importance_update_")
    yield from ((30, op, llama, "up_proj", 1 / 8, 8192) for op in CASES)
    for op, linear in itertools.product(dense, ("q_proj", "down_proj")):
        yield 35, op, llama, linear, 1 / 8, 8192
    for p, op in itertools.product((1 / 16, 1 / 4, 1 / 2), USE_P):
        yield 60, op, llama, "up_proj", p, 8192
    lengths = (1024, 2048, 4096, 16384, 32768, 131072)
    for tokens, op in itertools.product(lengths, USE_TOKENS):
        yield 61, op, llama, "up_proj", 1 / 8, tokens
    others = ("llama-2-13b", "llama-2-70b", "llama-3-8b", "gemma-2b", "qwen2.5-7b")
    for model, linear, op in itertools.product(others, ("up_proj", "q_proj"), dense):
        yield 80, op, model, linear, 1 / 8, 8192


def run_op(op: str, shape: tuple, p: float, tokens: int, device, dtype) -> dict[str, Any]:
    return run_case(CASES[op](shape, p, tokens, dtype), device, dtype)


def jobs(device: torch.device, dtype: torch.dtype) -> Iterator[Job]:
    for priority, op, model, linear, p, tokens in _sizes(device):
        shape = shape_of(model).linears[linear]
        size = {"model": model, "linear": linear, "shape": list(shape), "dtype": name_of(dtype)}
        size |= {"p": p} if op in USE_P else {}
        size |= {"tokens": tokens} if op in USE_TOKENS else {}
        run = functools.partial(run_op, op, shape, p, tokens, device, dtype)
        yield Job("ops", op, size, run, priority, seconds=30)
