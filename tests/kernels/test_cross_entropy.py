import math

import pytest
import torch
import torch.nn.functional as F

from csrc_ref.cross_entropy import cross_entropy_ref
from losia_kernels import ops
from losia_kernels.kernels.launch import override_config
from losia_kernels.ops.cross_entropy import (
    cross_entropy_block_grad_plain_,
    cross_entropy_grad_plain_,
)
from tests.tolerance import assert_within

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 1), (1, 37), (5, 1), (7, 53), (3, 300), (2, 1031)]
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "tight_cap": {"softcap": 3.0},
    "wide_cap": {"softcap": 30.0},
    "scale": {"logit_scale": 0.25},
    "all": {
        "label_smoothing": 0.2,
        "softcap": 5.0,
        "logit_scale": 2.0,
        "ignore_index": 0,
    },
}
DEFAULTS = {
    "ignore_index": -100,
    "label_smoothing": 0.0,
    "softcap": None,
    "logit_scale": 1.0,
}


def launch(*args, **options):
    from losia_kernels.kernels.cross_entropy import launch_cross_entropy_grad_

    return launch_cross_entropy_grad_(*args, **{**DEFAULTS, "write_grad": True, **options})


def launch_block(*args, **options):
    from losia_kernels.kernels.cross_entropy import launch_cross_entropy_block_grad_

    launch_cross_entropy_block_grad_(*args, **{**DEFAULTS, **options})


def make(shape, dtype, device, ignore_index=-100):
    """Logits of a width of 4 and labels, one of them ignored where there is more than one."""
    logits = (4 * torch.randn(shape)).to(device, dtype)
    labels = torch.randint(shape[1], shape[:1])
    if shape[0] > 1:
        labels[shape[0] // 2] = ignore_index
    return logits, labels.to(device)


def check(logits, labels, **options):
    truth = cross_entropy_ref(logits.cpu(), labels.cpu(), **options)
    plain_grad, kernel_grad = logits.clone(), logits  # the kernel's keeps the strides of the test
    plain = cross_entropy_grad_plain_(
        plain_grad, labels, **{**DEFAULTS, "write_grad": True, **options}
    )
    kernel = launch(kernel_grad, labels, **options)
    for got, expected, exact in zip(
        (*kernel, kernel_grad), (*plain, plain_grad), truth, strict=True
    ):
        assert_within(got, expected, exact)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_oracle_is_autograd_of_the_formula(options):
    logits, labels = make((7, 53), torch.float64, "cpu", options.get("ignore_index", -100))
    logits.requires_grad_()
    settings = {**DEFAULTS, **options}
    z = logits * settings["logit_scale"]
    if settings["softcap"] is not None:
        z = settings["softcap"] * torch.tanh(z / settings["softcap"])
    losses = F.cross_entropy(
        z,
        labels,
        ignore_index=settings["ignore_index"],
        label_smoothing=settings["label_smoothing"],
        reduction="none",
    )
    losses.sum().backward()
    found = cross_entropy_ref(logits.detach(), labels, **options)
    torch.testing.assert_close(found, (losses.detach(), z.logsumexp(-1).detach(), logits.grad))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(device, dtype, shape):
    with override_config("cross_entropy_grad_", block_out=64):
        check(*make(shape, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(device, dtype, options):
    with override_config("cross_entropy_grad_", block_out=32):
        check(*make((4, 101), dtype, device, options.get("ignore_index", -100)), **options)


def test_the_default_tile_covers_the_vocabulary(device):
    check(*make((2, 5000), torch.bfloat16, device))


def test_any_strides(device):
    logits, labels = make((6, 53), torch.float32, device)
    check(logits.T.contiguous().T, labels)
    check(torch.stack([logits, logits], dim=-1)[..., 1], torch.stack([labels] * 2, dim=-1)[:, 0])
    check(torch.randn(12, 90, device=device)[::2, 3:56], labels)


@pytest.mark.parametrize("value", [80.0, -80.0, 1e4, -1e4])
def test_large_logits_do_not_overflow(device, value):
    logits, labels = make((4, 53), torch.float32, device)
    logits += value
    expected = F.cross_entropy(logits.double(), labels, reduction="none")
    losses, _ = launch(logits, labels)
    torch.testing.assert_close(
        losses.double(), expected, rtol=0, atol=1e-5 * max(1, abs(value) / 100)
    )
    assert logits.isfinite().all()


def test_a_class_that_is_ruled_out(device):
    """Logits of -inf, whole tiles of them first: probability and gradient are 0."""
    logits, labels = make((3, 90), torch.float32, device)
    logits[:, :70], labels[:] = -math.inf, torch.tensor([89, 70, -100], device=device)
    expected = F.cross_entropy(logits, labels, reduction="none")
    with override_config("cross_entropy_grad_", block_out=16):
        losses, _ = launch(logits, labels)
    torch.testing.assert_close(losses, expected)
    assert (
        torch.equal(logits[:, :70], torch.zeros(3, 70, device=device)) and logits.isfinite().all()
    )


def test_logits_are_left_alone_without_a_gradient(device):
    logits, labels = make((5, 37), torch.float32, device)
    before, expected = logits.clone(), launch(logits.clone(), labels)
    found = launch(logits, labels, write_grad=False)
    assert torch.equal(logits, before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("label", [-1, 37, 2**40])
def test_a_label_out_of_range_is_nan_in_its_token_only(device, label):
    logits, labels = make((3, 37), torch.float32, device)
    labels[:] = torch.tensor([3, label, 5])
    losses, _ = launch(logits, labels)
    assert losses.isnan().tolist() == [False, True, False]
    assert logits.isnan().any(1).tolist() == [False, True, False]


def test_no_tokens(device):
    losses, lse = launch(
        torch.empty(0, 5, device=device), torch.empty(0, dtype=torch.int64, device=device)
    )
    assert losses.shape == lse.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("first, last", [(0, 40), (40, 101)])
def test_a_block_of_the_vocabulary(device, dtype, options, first, last):
    logits, labels = make((4, 101), dtype, device, options.get("ignore_index", -100))
    _, lse, grad = cross_entropy_ref(logits.cpu(), labels.cpu(), **options)
    plain, lse = logits[:, first:last].clone(), lse.float().to(device)
    kernel = logits[:, first:last]
    cross_entropy_block_grad_plain_(plain, labels, lse, first, 101, **{**DEFAULTS, **options})
    with override_config("cross_entropy_grad_", block_out=16):
        launch_block(kernel, labels, lse, first, 101, **options)
    assert_within(kernel, plain, grad[:, first:last])


@pytest.mark.parametrize(
    "problem, change",
    [
        ("logits must be", lambda a: a.update(logits=a["logits"][0])),
        ("labels must be int64", lambda a: a.update(labels=a["labels"][1:])),
        ("labels must be int64", lambda a: a.update(labels=a["labels"].int())),
        ("softcap must be positive", lambda a: a.update(softcap=0.0)),
    ],
)
def test_bad_input(problem, change):
    logits, labels = make((3, 7), torch.float32, "cpu")
    arguments = {"logits": logits, "labels": labels}
    change(arguments)
    with pytest.raises(ValueError, match=problem):
        ops.cross_entropy_grad_(**arguments)


def test_opcheck():
    logits, labels = make((3, 7), torch.float32, "cpu")
    losia = torch.ops.losia
    torch.library.opcheck(losia.cross_entropy_grad_.default, (logits, labels, -100, 0.1, 5.0, 0.5))
    block = (logits[:, 2:5], labels, logits.logsumexp(-1), 2, 7)
    torch.library.opcheck(losia.cross_entropy_block_grad_.default, block)
