"""``pytest bench/``: each form of each op under pytest-benchmark, after its gate. Figures of a CPU are labelled CPU."""

import itertools

import pytest
import torch

from bench.speed import ops
from bench.speed.models import shape_of

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
MODEL, TOKENS = ("llama-2-7b", 8192) if GPU else ("smollm2-135m", 1024)
FORMS = [
    (op, form)
    for op, make in ops.CASES.items()
    for form in ops.forms_for(make((64, 64), 1 / 8, 64, DTYPE), DEVICE)
]


@pytest.mark.parametrize(("op", "form"), FORMS, ids=lambda value: value.replace(" ", "_"))
def test_op(benchmark, op: str, form: str):
    case = ops.CASES[op](shape_of(MODEL).linears["up_proj"], 1 / 8, TOKENS, DTYPE)
    run = ops.forms_for(case, DEVICE)[form]
    sets = ops.input_sets(case, DEVICE)
    turns = itertools.cycle(sets)
    passed = ops.gate(case, form, run, sets[0])
    benchmark.group = op
    benchmark.extra_info |= {"device": DEVICE.type, "moved_bytes": case.moved_bytes, "gate": passed}

    @torch.no_grad()
    def call() -> None:
        run(*next(turns))
        if GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=20, warmup_rounds=3)
