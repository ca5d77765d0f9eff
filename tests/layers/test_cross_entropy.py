import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from csrc_ref.cross_entropy import linear_cross_entropy_ref
from losia_kernels.layers.cross_entropy import (
    CHUNK_BYTES,
    _tokens_per_chunk,
    gradient_blocks,
    losia_linear_cross_entropy,
)
from losia_kernels.ops import cross_entropy
from tests.tolerance import assert_within

OPTIONS = {
    "plain": {},
    "ignore_index": {"ignore_index": 3},
    "smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 2.0},
    "scale": {"logit_scale": 0.25},
    "all": {"label_smoothing": 0.2, "softcap": 5.0, "logit_scale": 2.0},
}
TOKENS, WIDTH, VOCABULARY = 13, 8, 29
CHUNK_OF_4 = 4 * 4 * VOCABULARY  # bytes: 13 tokens are chunks of 4, 4, 4, 1


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(dtype=torch.float64, tokens=TOKENS, vocabulary=VOCABULARY, ignored=-100):
    hidden = torch.randn(tokens, WIDTH, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, WIDTH, dtype=torch.float64).to(dtype)
    labels = torch.randint(vocabulary, (tokens,))
    labels[::5] = ignored
    return hidden, weight, labels


def ordinary(
    hidden,
    weight,
    labels,
    bias=None,
    *,
    reduction="mean",
    softcap=None,
    logit_scale=1.0,
    ignore_index=-100,
    label_smoothing=0.0,
):
    """torch's linear and cross_entropy, the loss in float32 as transformers takes it."""
    z = F.linear(hidden, weight, bias)
    z = (z if z.dtype == torch.float64 else z.float()) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    loss = F.cross_entropy(
        z, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum"
    )
    kept = labels != ignore_index
    return loss if reduction == "sum" else loss / kept.sum()


@pytest.mark.parametrize(
    "reduction",
    [{}, {"reduction": "sum"}],
    ids=["mean", "sum"],
)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_is_torchs(options, reduction):
    """Loss, d_hidden, the chosen rows of the weight's gradient and d_bias, with 3 for an upstream
    gradient."""
    hidden, weight, labels = make(ignored=options.get("ignore_index", -100))
    bias = torch.randn(VOCABULARY, dtype=torch.float64, requires_grad=True)
    out_idx = torch.tensor([0, 3, 11, 28])
    subnet = weight[out_idx].requires_grad_()
    settings = {**options, **reduction}
    loss = losia_linear_cross_entropy(
        hidden, weight, labels, subnet, out_idx, bias=bias, chunk_bytes=CHUNK_OF_4, **settings
    )
    found = (loss, *torch.autograd.grad(3 * loss, (hidden, subnet, bias)))
    weight.requires_grad_()
    expected = ordinary(hidden, weight, labels, bias, **settings)
    d_hidden, d_weight, d_bias = torch.autograd.grad(3 * expected, (hidden, weight, bias))
    torch.testing.assert_close(found, (expected, d_hidden, d_weight[out_idx], d_bias))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options):
    hidden, weight, labels = make(tokens=5, vocabulary=7, ignored=options.get("ignore_index", -100))
    subnet = weight.clone().requires_grad_()
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)

    def loss(hidden, subnet, bias):
        return losia_linear_cross_entropy(
            hidden, subnet, labels, subnet, bias=bias, chunk_bytes=80, **options
        )

    assert torch.autograd.gradcheck(loss, (hidden, subnet, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dense", [False, True], ids=["rows", "dense"])
def test_errs_at_most_twice_what_torch_errs(dtype, options, dense):
    """Of many tokens: d_hidden is rounded once more than torch's, which the largest of few errors
    can double."""
    hidden, weight, labels = make(
        dtype, tokens=400, vocabulary=61, ignored=options.get("ignore_index", -100)
    )
    out_idx = torch.arange(61) if dense else torch.tensor([2, 3, 40, 60])
    subnet = weight[out_idx].float().requires_grad_()
    loss = losia_linear_cross_entropy(
        hidden,
        weight,
        labels,
        subnet,
        None if dense else out_idx,
        chunk_bytes=4 * 61 * 70,
        **options,
    )
    d_hidden, d_subnet = torch.autograd.grad(loss, (hidden, subnet))
    assert (loss.dtype, d_hidden.dtype, d_subnet.dtype) == (torch.float32, dtype, torch.float32)

    weight.requires_grad_()
    plain = ordinary(hidden, weight, labels, **options)
    plain_hidden, plain_weight = torch.autograd.grad(plain, (hidden, weight))
    kept = int((labels != options.get("ignore_index", -100)).sum())
    exact, exact_hidden, exact_weight, _ = linear_cross_entropy_ref(
        hidden.detach(), weight.detach(), labels, divisor=kept, **options
    )
    assert_within(loss.detach(), plain.detach(), exact)
    assert_within(d_hidden, plain_hidden, exact_hidden)
    assert_within(d_subnet, plain_weight[out_idx].float(), exact_weight[out_idx])


def test_float16_gradients_survive_until_the_scaler_is_known():
    """1e-6 per logit of a mean over 8,000 labels is nothing in float16; times a scale of 65,536 it
    is something."""
    hidden, weight, labels = make(torch.float16)
    scale = 65536.0
    loss = losia_linear_cross_entropy(hidden, weight, labels, reduction="sum") / 8_000_000
    (found,) = torch.autograd.grad(loss * scale, hidden)
    exact = linear_cross_entropy_ref(hidden.detach(), weight, labels, divisor=8_000_000 / scale)[1]
    torch.testing.assert_close(found.double(), exact, rtol=5e-3, atol=1e-5)


@pytest.mark.parametrize("tokens, vocabulary", [(1, 1), (1, 29), (13, 1), (0, 29)])
def test_sizes_of_one_and_none(tokens, vocabulary):
    hidden, weight, labels = make(tokens=tokens, vocabulary=vocabulary)
    labels[:] = torch.arange(tokens) % vocabulary
    subnet = weight.clone().requires_grad_()
    loss = losia_linear_cross_entropy(hidden, weight, labels, subnet)
    found = (loss, *torch.autograd.grad(loss, (hidden, subnet)))
    weight.requires_grad_()
    expected = ordinary(hidden, weight, labels)
    torch.testing.assert_close(
        found, (expected, *torch.autograd.grad(expected, (hidden, weight))), equal_nan=True
    )


@pytest.mark.parametrize("reduction", [{}, {"reduction": "sum"}], ids=str)
def test_all_labels_ignored(reduction):
    """NaN or 0 as torch has it, and no gradient."""
    hidden, weight, labels = make()
    labels[:] = -100
    subnet = weight.clone().requires_grad_()
    seen = []
    loss = losia_linear_cross_entropy(
        hidden,
        weight,
        labels,
        subnet,
        **reduction,
        on_gradient=lambda gradient: seen.extend(grad for grad, _ in gradient_blocks(gradient)),
    )
    expected = F.cross_entropy(
        hidden @ weight.T, labels, reduction=reduction.get("reduction", "mean")
    )
    torch.testing.assert_close(loss, expected, equal_nan=True)
    for grad in (*torch.autograd.grad(loss, (hidden, subnet)), *seen):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_ignored_tokens_have_no_logits(monkeypatch):
    """On the CPU; most tokens of a prompt-and-completion batch are ignored."""
    sizes, plain = [], cross_entropy.cross_entropy_grad_plain_
    monkeypatch.setattr(
        cross_entropy,
        "cross_entropy_grad_plain_",
        lambda z, *args: sizes.append(len(z)) or plain(z, *args),
    )
    hidden, weight = torch.randn(12, 4, requires_grad=True), torch.randn(9, 4)
    labels = torch.randint(0, 9, (12,))
    labels[[0, 3, 4, 11]] = -100
    losia_linear_cross_entropy(hidden, weight, labels).backward()
    assert sizes == [8] and not hidden.grad[[0, 3, 4, 11]].any() and hidden.grad[1].any()


def test_any_leading_dimensions():
    hidden, weight, labels = make(tokens=12)
    flat = losia_linear_cross_entropy(hidden, weight, labels)
    shaped = losia_linear_cross_entropy(hidden.view(3, 4, WIDTH), weight, labels.view(3, 4))
    (grad,) = torch.autograd.grad(shaped, hidden)
    assert torch.equal(flat, shaped) and grad.shape == hidden.shape


def test_a_gradient_may_be_asked_for_twice():
    hidden, weight, labels = make()
    loss = losia_linear_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(2 * loss, hidden, retain_graph=True)
    second = torch.autograd.grad(2 * loss, hidden)
    assert torch.equal(first[0], second[0])


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns, and how many matrix products there
    were."""

    def __init__(self):
        super().__init__()
        self.bytes, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out)
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("observing", [False, True])
def test_nothing_is_larger_than_a_chunk(dtype, observing):
    """256 tokens of a vocabulary of 1,000, whose weight takes 16,000 bytes, within 16,000 bytes a
    tensor."""
    budget, idx = 16_000, torch.arange(0, 1000, 16)
    hidden, labels = (
        torch.randn(256, 4, dtype=dtype, requires_grad=True),
        torch.randint(1000, (256,)),
    )
    weight, subnet = torch.randn(1000, 4, dtype=dtype), torch.randn(63, 4, requires_grad=True)
    seen_rows = []
    with LargestTensor() as seen:
        losia_linear_cross_entropy(
            hidden,
            weight,
            labels,
            subnet,
            idx,
            chunk_bytes=budget,
            on_gradient=(lambda gradient: seen_rows.extend(gradient_blocks(gradient)))
            if observing
            else None,
        ).backward()
    assert seen.bytes <= budget
    assert bool(seen_rows) == observing


def test_a_frozen_head_has_no_weight_gradient():
    """Two products a chunk, logits and d_hidden; the third only for a subnet."""
    hidden, weight, labels = make(torch.float32)
    with LargestTensor() as frozen:
        losia_linear_cross_entropy(hidden, weight, labels).backward()
    with LargestTensor() as no_grad, torch.no_grad():
        losia_linear_cross_entropy(hidden, weight, labels)
    assert (frozen.products, no_grad.products) == (2, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    hidden, weight, labels = make(torch.float32)
    with torch.autocast("cpu", dtype):
        found = losia_linear_cross_entropy(hidden, weight, labels)
    expected = losia_linear_cross_entropy(hidden.to(dtype), weight.to(dtype), labels)
    assert torch.equal(found, expected)
    assert torch.autograd.grad(found, hidden)[0].dtype == torch.float32


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES, 300], ids=["one_block", "blocks"])
def test_observed_gradient_is_the_dense_one(options, chunk_bytes):
    hidden, weight, labels = make(ignored=options.get("ignore_index", -100))
    bias = torch.randn(VOCABULARY, dtype=torch.float64)
    out_idx = torch.tensor([4, 5])
    blocks = []
    loss = losia_linear_cross_entropy(
        hidden,
        weight,
        labels,
        weight[out_idx].requires_grad_(),
        out_idx,
        bias=bias,
        chunk_bytes=chunk_bytes,
        on_gradient=lambda gradient: blocks.extend(gradient_blocks(gradient)),
        **options,
    )
    assert not blocks
    (3 * loss).backward()
    weight.requires_grad_()
    (expected,) = torch.autograd.grad(3 * ordinary(hidden, weight, labels, bias, **options), weight)
    assert len(blocks) == (1 if chunk_bytes == CHUNK_BYTES else 4)
    assert [i for _, rows in blocks for i in range(rows.start, rows.stop)] == list(
        range(VOCABULARY)
    )
    torch.testing.assert_close(torch.cat([grad for grad, _ in blocks]), expected)


def test_blocks_depend_on_the_weight_alone():
    """Ranks with batches of their own average the same blocks."""
    shapes = []
    for tokens in (2, 50):
        hidden, weight, labels = make(tokens=tokens)
        blocks = []
        losia_linear_cross_entropy(
            hidden,
            weight,
            labels,
            chunk_bytes=300,
            on_gradient=lambda gradient, blocks=blocks: blocks.extend(gradient.blocks),
        ).backward()
        shapes.append(blocks)
    assert shapes[0] == shapes[1] and len(shapes[0]) > 1


def test_compiles_in_one_graph():
    hidden, weight, labels = make(torch.float32)
    out_idx = torch.tensor([1, 5])
    subnet = weight[out_idx].requires_grad_()

    def loss(hidden, subnet):
        return losia_linear_cross_entropy(
            hidden, weight, labels, subnet, out_idx, chunk_bytes=CHUNK_OF_4
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for function in (loss, compiled):
        value = function(hidden, subnet)
        grads = torch.autograd.grad(value, (hidden, subnet))
        if function is loss:
            expected = value, grads
    torch.testing.assert_close((value, grads), expected)


def test_chunks_are_whole_tiles_where_there_are_any():
    assert _tokens_per_chunk(CHUNK_BYTES, 8192, 32000) == 1024
    assert _tokens_per_chunk(CHUNK_BYTES, 100, 32000) == 100
    assert _tokens_per_chunk(CHUNK_BYTES, 8192, 256000) == 128
    assert _tokens_per_chunk(1, 8192, 256000) == 1


@pytest.mark.parametrize("bad, position", [(VOCABULARY, 0), (-1, 7), (-101, 12)])
def test_label_out_of_range(bad, position):
    hidden, weight, labels = make()
    labels[position] = bad
    with pytest.raises(
        IndexError, match=f"label {bad} of token {position} is out of range .* {VOCABULARY}"
    ):
        losia_linear_cross_entropy(hidden, weight, labels)


BAD = {
    "does not fit": lambda a: a.update(weight=a["weight"][:, 1:]),
    "hidden is torch.float64, weight torch.float32": lambda a: a.update(weight=a["weight"].float()),
    "floating-point": lambda a: a.update(weight=a["weight"].long(), hidden=a["hidden"].long()),
    "labels must be int64 (13,), got torch.int32": lambda a: a.update(labels=a["labels"].int()),
    "labels must be int64 (13,), got torch.int64 (12,)": lambda a: a.update(labels=a["labels"][1:]),
    "labels is on meta": lambda a: a.update(labels=a["labels"].to("meta")),
    "weight is on meta": lambda a: a.update(weight=a["weight"].to("meta")),
    "out_idx must be a 1-D int64": lambda a: a.update(out_idx=torch.tensor([1], dtype=torch.int32)),
    "subnet must be (2, 8)": lambda a: a.update(
        out_idx=torch.tensor([1, 2]), subnet=torch.ones(3, 8)
    ),
    "subnet must be (29, 8)": lambda a: a.update(subnet=torch.ones(3, 8)),
    "bias must be (29,)": lambda a: a.update(bias=torch.ones(3)),
    "reduction must be": lambda a: a.update(reduction="none"),
    "chunk_bytes must be": lambda a: a.update(chunk_bytes=0),
    "softcap must be positive": lambda a: a.update(softcap=-1.0),
}


@pytest.mark.parametrize("problem", BAD)
def test_bad_input(problem):
    arguments = dict(zip(("hidden", "weight", "labels"), make(), strict=True))
    BAD[problem](arguments)
    with pytest.raises(ValueError) as error:
        losia_linear_cross_entropy(**arguments)
    assert problem in str(error.value)


def test_a_tensor_without_data_has_no_autocast():
    """Sizes are counted on the meta device, of which autocast would raise."""
    from losia_kernels.layers.cross_entropy import autocast_dtype

    assert autocast_dtype(torch.empty(2, dtype=torch.bfloat16, device="meta")) == torch.bfloat16
