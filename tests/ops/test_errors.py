"""Bad arguments of the functional API: one clear ValueError that names the op and what was wrong,
nothing written."""

import pytest
import torch

from losia_kernels import ops

OUT, IN, TOKENS = 8, 6, 5
OUT_IDX, IN_IDX = torch.tensor([0, 3, 7]), torch.tensor([1, 5])


def refused(match: str, op, *args, **kwargs) -> None:
    with pytest.raises(ValueError, match=match):
        op(*args, **kwargs)


@pytest.mark.parametrize(
    "idx, problem",
    [
        (torch.tensor([[0, 1]]), r"idx must be a 1-D int64 tensor, got \(1, 2\)"),
        (
            torch.tensor([0, 1], dtype=torch.int32),
            "idx must be a 1-D int64 tensor, got .* torch.int32",
        ),
    ],
)
def test_gather_features_refuses_an_index(idx, problem):
    refused(f"gather_features: {problem}", ops.gather_features, torch.randn(TOKENS, IN), idx)


def test_subnet_grad_refuses_what_does_not_fit():
    dy, x = torch.randn(TOKENS, OUT), torch.randn(TOKENS, IN)
    refused("subnet_grad: dy .* and x .* must agree", ops.subnet_grad, dy[1:], x, OUT_IDX, IN_IDX)
    refused(
        "subnet_grad: dy is torch.bfloat16, x is torch.float32",
        ops.subnet_grad,
        dy.bfloat16(),
        x,
        OUT_IDX,
        IN_IDX,
    )
    refused(
        "subnet_grad: out_idx must be a 1-D int64", ops.subnet_grad, dy, x, OUT_IDX.int(), IN_IDX
    )
    refused(
        "subnet_grad: in_idx must be a 1-D int64", ops.subnet_grad, dy, x, OUT_IDX, IN_IDX.float()
    )


@pytest.mark.gpu
def test_tensors_on_two_devices_are_refused():
    dy, x = torch.randn(TOKENS, OUT), torch.randn(TOKENS, IN)
    refused("subnet_grad: dy is on cpu, x on cuda", ops.subnet_grad, dy, x.cuda(), OUT_IDX, IN_IDX)
    refused(
        "subnet_grad: out_idx is on cpu, the data on cuda",
        ops.subnet_grad,
        dy.cuda(),
        x.cuda(),
        OUT_IDX,
        IN_IDX,
    )
    refused(
        "gather_features: idx is on cuda.*, the data on cpu", ops.gather_features, x, IN_IDX.cuda()
    )
    arguments = adamw_arguments()
    arguments["grad"] = arguments["grad"].cuda()
    refused("subnet_adamw_: weight, .* are on cpu, cpu, cuda", ops.subnet_adamw_, **arguments)


ADAMW = ("weight", "subnet", "grad", "exp_avg", "exp_avg_sq", "out_idx", "in_idx")


def adamw_arguments(dtype=torch.bfloat16) -> dict:
    block = torch.zeros(len(OUT_IDX), len(IN_IDX))
    values = (
        torch.randn(OUT, IN).to(dtype),
        block,
        block + 1,
        block.clone(),
        block.clone(),
        OUT_IDX,
        IN_IDX,
    )
    scalars = dict(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, step=1)
    return dict(zip(ADAMW, values, strict=True)) | scalars


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"weight": torch.randn(OUT)}, r"weight must be \[out, in\], got \(8,\)"),
        (
            {"subnet": torch.zeros(2, 2)},
            r"are \(3,\) and \(2,\), so .* must be \(3, 2\) each, got \[\(2, 2\), \(3, 2\)",
        ),
        (
            {"grad": torch.zeros(2, 3)},
            r"so subnet, exp_avg, exp_avg_sq and grad must be \(3, 2\) .*, \(2, 3\)\]$",
        ),
        ({"grad": torch.zeros(1, 3, 2)}, r"grad must be \(3, 2\) .*, \(1, 3, 2\)\]$"),
        ({"exp_avg": torch.zeros(2, 3)}, r"must be \(3, 2\) .*, got \[\(3, 2\), \(2, 3\)"),
        (
            {"exp_avg_sq": torch.zeros(3, 2).bfloat16()},
            "moments must be torch.float32, got torch.float32, torch.bfloat16",
        ),
        (
            {"subnet": torch.zeros(3, 2).half()},
            r"subnet must be torch.float32 \(master\) or torch.bfloat16",
        ),
        (
            {"seed": 3},
            "seed asks for stochastic rounding of a 16-bit subnet, but subnet is torch.float32",
        ),
        ({"step": 0}, "step counts from 1, got 0"),
        ({"out_idx": OUT_IDX[:, None]}, r"out_idx and in_idx are \(3, 1\) and \(2,\)"),
        (
            {"in_idx": IN_IDX.int()},
            "out_idx and in_idx must be int64, got torch.int64, torch.int32",
        ),
    ],
)
def test_subnet_adamw_refuses_what_does_not_fit(change, problem):
    arguments = adamw_arguments() | change
    before = {name: arguments[name].clone() for name in ADAMW}
    refused(f"subnet_adamw_: .*{problem}", ops.subnet_adamw_, **arguments)
    assert all(torch.equal(before[name], arguments[name]) for name in ADAMW)


@pytest.mark.parametrize("number", range(1, len(ADAMW)))
def test_subnet_adamw_refuses_another_device(number):
    values = list(adamw_arguments().values())
    values[number] = values[number].to("meta")
    devices = ["cpu"] * number + ["meta"] + ["cpu"] * (len(ADAMW) - number - 1)
    with torch.no_grad():  # past the dispatcher, as in a step
        refused(
            f"weight, subnet, .*, in_idx are on {', '.join(devices)}$", ops.subnet_adamw_, *values
        )


def test_importance_refuses_what_does_not_fit():
    weight, grad, state = torch.randn(OUT, IN), torch.randn(OUT, IN), torch.zeros(OUT, IN)
    update, marginals = ops.importance_update_, ops.importance_marginals
    refused(
        "importance_update_: kind must be one of .*'third_order'",
        update,
        state,
        state.clone(),
        weight,
        grad,
        0.8,
        0.8,
        "third_order",
    )
    refused(
        "importance_update_: importance, uncertainty have dtypes",
        update,
        state,
        state.bfloat16(),
        weight,
        grad,
        0.8,
        0.8,
    )
    refused(
        "importance_update_: importance, weight, grad must have one shape",
        update,
        state,
        state.clone(),
        weight,
        grad.T,
        0.8,
        0.8,
    )
    refused("importance_marginals: weight, grad must have one shape", marginals, weight, grad[1:])
    refused("importance_marginals: kind must be one of", marginals, weight, grad, "none")
    assert not state.any()


def test_score_marginals_refuses_what_does_not_fit():
    score = torch.rand(OUT, IN)
    refused(r"score_marginals: importance must be \[out, in\]", ops.score_marginals, score[0])
    refused(
        "score_marginals: importance, uncertainty must have one shape",
        ops.score_marginals,
        score,
        score[1:],
    )
    refused(
        "score_marginals: in_idx must be a 1-D int64",
        ops.score_marginals,
        score,
        None,
        OUT_IDX,
        IN_IDX.int(),
    )
