"""The loss without logits against the model's own: same numbers, and the model is as it was."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from losia_kernels import LoSiAAdamW, apply_losia, calibrate, remove_losia
from losia_kernels.layers import lazy_logits
from losia_kernels.layers.cross_entropy import gradient_blocks
from losia_kernels.layers.fused_loss import fuse_loss, unfuse_loss
from losia_kernels.layers.lazy_logits import LazyLogits
from losia_kernels.layers.module import losia_layers
from tests.tiny import TinyLM, make_batches, paper, same_tensors, take_step, tiny_lm

EVERY_HEAD = [0.0, 0.5, 1.0]


@pytest.fixture(autouse=True)
def tell_again():
    lazy_logits.warn_once.cache_clear()


class ExactLM(TinyLM):
    """Takes its loss in the dtype of its logits, float64 here, where TinyLM takes it in float32."""

    def forward(self, input_ids, labels=None):
        output = super().forward(input_ids)
        if labels is not None:
            output.loss = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
        return output


def exact_lm() -> ExactLM:
    torch.manual_seed(0)
    return ExactLM().double()


def pair(**options) -> tuple[nn.Module, nn.Module]:
    """The same model, fused and ordinary."""
    settings = {"rank_factor": 0.5, "period": 1} | options
    return tuple(
        apply_losia(exact_lm(), paper(**settings, fused_loss=fused)) for fused in (True, False)
    )


@pytest.fixture
def calls(monkeypatch) -> list:
    """One entry for each loss that was computed without logits."""
    seen = []
    original = lazy_logits.losia_linear_cross_entropy
    monkeypatch.setattr(
        lazy_logits,
        "losia_linear_cross_entropy",
        lambda *a, **k: seen.append(k) or original(*a, **k),
    )
    return seen


@pytest.mark.parametrize("output_dim_factor", EVERY_HEAD)
@pytest.mark.parametrize("importance", ["sensitivity", "gradient", "marginal"])
def test_training_follows_the_ordinary_path(calls, output_dim_factor, importance):
    """Three cycles of one step a group: same losses, same moves of the head, same weights, to
    float64's rounding."""
    models = pair(output_dim_factor=output_dim_factor, importance=importance)
    optimizers = [LoSiAAdamW(model, lr=1e-2) for model in models]
    places = set()
    for batch in make_batches(9):
        losses = [take_step(m, o, batch, batch) for m, o in zip(models, optimizers, strict=True)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-12)
        for (name, fused), (_, plain) in zip(
            *(losia_layers(model) for model in models), strict=True
        ):
            assert torch.equal(fused.out_idx, plain.out_idx) and torch.equal(
                fused.in_idx, plain.in_idx
            ), name
            torch.testing.assert_close(fused.weight, plain.weight, rtol=0, atol=1e-11)
            if name == "lm_head":
                places.add(tuple(fused.out_idx.tolist()))
    assert len(calls) == 18
    assert (
        len(places) > 1 if output_dim_factor == 0.5 else len(places) == (output_dim_factor == 1.0)
    )


def test_calibration_is_the_same(calls):
    fused, plain = pair(output_dim_factor=0.5)
    batches = make_batches(3)
    for model in (fused, plain):
        calibrate(model, batches)
    assert len(calls) == 3
    for (_, ours), (_, theirs) in zip(losia_layers(fused), losia_layers(plain), strict=True):
        assert torch.equal(ours.out_idx, theirs.out_idx) and torch.equal(ours.in_idx, theirs.in_idx)


def test_tied_embedding_stays_frozen_and_both_uses_see_the_update():
    model = apply_losia(tiny_lm(tied=True), paper(rank_factor=0.5, output_dim_factor=0.5))
    optimizer, before = LoSiAAdamW(model, lr=1e-2), model.lm_head.weight.clone()
    outside = torch.ones(13, dtype=torch.bool).index_fill(0, model.lm_head.out_idx, False)
    take_step(model, optimizer, make_batches(1)[0])
    assert (
        model.model.embed_tokens.weight is model.lm_head.weight
        and model.lm_head.weight.grad is None
    )
    changed = (model.lm_head.weight != before).any(1)
    assert changed.any() and not changed[outside].any()


def test_a_plainly_trained_head(calls):
    """modules_to_save: the head is an nn.Linear whose weight has a gradient of its own."""
    grads = []
    for model in pair(modules_to_save=["lm_head"]):
        model(**make_batches(1)[0]).loss.backward()
        grads.append(model.lm_head.weight.grad)
    assert len(calls) == 1
    torch.testing.assert_close(*grads)


def test_only_a_forward_with_labels_is_lazy(calls):
    fused, _ = pair(output_dim_factor=0.5)
    batch = make_batches(1)[0]
    assert type(fused(input_ids=batch["input_ids"]).logits) is torch.Tensor and not calls
    assert type(fused(**batch).logits) is LazyLogits and len(calls) == 1
    assert "forward" not in fused.lm_head.__dict__


def test_the_logits_are_there_for_who_reads_them():
    fused, plain = pair(output_dim_factor=0.5)
    batch = make_batches(1)[0]
    ours, theirs = fused(**batch), plain(**batch)
    assert (ours.logits.shape, ours.logits.dtype, ours.logits.device) == (
        theirs.logits.shape,
        theirs.logits.dtype,
        theirs.logits.device,
    )
    with (
        pytest.warns(UserWarning, match="computed its logits after all: argmax needs them"),
        torch.no_grad(),
    ):
        guess = ours.logits.argmax(-1)
    assert torch.equal(guess, theirs.logits.argmax(-1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once, and computed once
        assert torch.equal(ours.logits + 0, theirs.logits)
    for output in (ours, theirs):
        (output.loss + output.logits.square().mean()).backward()
    torch.testing.assert_close(fused.lm_head.subnet.grad, plain.lm_head.subnet.grad)
    take_step(fused, LoSiAAdamW(fused), batch)


def test_logits_of_weights_that_are_gone_are_refused():
    fused, _ = pair(output_dim_factor=0.5)
    output, optimizer = fused(**make_batches(1)[0]), LoSiAAdamW(fused)
    output.loss.backward()
    optimizer.step()
    with (
        pytest.raises(RuntimeError, match="the output layer or the hidden"),
        pytest.warns(match="after all"),
    ):
        output.logits.sum()


OTHER_LOSSES = {
    "per token": lambda z, y: F.cross_entropy(
        z.flatten(0, 1), y.flatten(), reduction="none"
    ).mean(),
    "class weights": lambda z, y: F.cross_entropy(
        z.flatten(0, 1), y.flatten(), weight=torch.arange(1.0, 14).double()
    ),
    "soft targets": lambda z, y: F.cross_entropy(
        z.flatten(0, 1), F.one_hot(y.flatten(), 13).double()
    ),
    "classes in the middle": lambda z, y: F.cross_entropy(z.transpose(1, 2), y),
    "log_softmax": lambda z, y: F.nll_loss(z.log_softmax(-1).flatten(0, 1), y.flatten()),
    "shifted by slicing": lambda z, y: F.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten()),
    "negative factor": lambda z, y: F.cross_entropy((-1.0 * z).flatten(0, 1), y.flatten()),
    "learned temperature": lambda z, y: F.cross_entropy(
        (z / torch.tensor(2.0)).flatten(0, 1), y.flatten()
    ),
    "capped twice": lambda z, y: F.cross_entropy(
        (3 * torch.tanh(torch.tanh(z))).flatten(0, 1), y.flatten()
    ),
    "other classes": lambda z, y: F.cross_entropy(z.reshape(13, 15), y.flatten()[:13]),
    "in place": lambda z, y: F.cross_entropy(mask_in_place(z).flatten(0, 1), y.flatten()),
    "in place, seen through a view": lambda z, y: (
        lambda flat: F.cross_entropy((mask_in_place(z), flat)[1], y.flatten())
    )(z.view(-1, 13)),
}
FUSED_LOSSES = {
    "module": lambda z, y: nn.CrossEntropyLoss()(z.view(-1, 13), y.view(-1)),
    "sum": lambda z, y: F.cross_entropy(z.reshape(-1, 13), y.flatten(), reduction="sum") / 7,
    "smoothed": lambda z, y: F.cross_entropy(
        z.flatten(0, 1).float(), y.flatten(), label_smoothing=0.1
    ),
    "ignoring": lambda z, y: F.cross_entropy(
        input=z.contiguous().flatten(0, 1), target=y.flatten(), ignore_index=3
    ),
    "scaled": lambda z, y: F.cross_entropy((0.5 * z * 3 / 7).flatten(0, 1), y.flatten()),
    "capped": lambda z, y: F.cross_entropy((torch.tanh(z / 2.0) * 2.0).flatten(0, 1), y.flatten()),
    "scaled, capped, scaled": lambda z, y: F.cross_entropy(
        (5 * (z * 0.7).tanh() / 2).flatten(0, 1), y.flatten()
    ),
    "cast": lambda z, y: F.cross_entropy(z.to(torch.float32).flatten(0, 1), y.flatten()),
}


def mask_in_place(z):
    z[..., 2] = -1e4
    return z


class WithLoss(nn.Module):
    """A head and a loss of its own."""

    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(1)
        self.head, self.loss = nn.Linear(8, 13, bias=True).double(), loss

    def forward(self, hidden, labels):
        return self.loss(self.head(hidden), labels)


@pytest.mark.parametrize("name", [*FUSED_LOSSES, *OTHER_LOSSES])
def test_any_loss_is_the_models_own(calls, name):
    """What is understood is fused; the rest takes the ordinary path and the same numbers come
    out."""
    results = []
    model = WithLoss((FUSED_LOSSES | OTHER_LOSSES)[name])
    hidden, labels = (
        torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True),
        torch.randint(13, (3, 5)),
    )
    for fuse in (False, True):
        if fuse:
            fuse_loss(model, "head")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            loss = model(hidden, labels=labels)
        results.append(
            (loss, *torch.autograd.grad(loss, (hidden, model.head.weight, model.head.bias)))
        )
    torch.testing.assert_close(*results)
    assert len(calls) == (name in FUSED_LOSSES)
    assert bool(told) == (name in OTHER_LOSSES)


def test_a_custom_function_on_the_logits_is_told_rather_than_left_without_a_gradient():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            return logits.square().sum()

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.ones(3, 13, dtype=torch.float64)

    model = WithLoss(lambda z, y: Square.apply(z))
    fuse_loss(model, "head")
    with pytest.warns(match="after all"):
        loss = model(torch.randn(3, 8, dtype=torch.float64), labels=torch.tensor([1, 2, 3]))
    with pytest.raises(RuntimeError, match="a custom autograd function took them"):
        loss.backward()


@pytest.mark.parametrize(
    "change, why",
    [
        (
            lambda m: m.lm_head.register_forward_hook(lambda *_: None),
            "something is hooked to its output layer",
        ),
        (
            lambda m: m.lm_head.register_forward_pre_hook(lambda *_: None),
            "something is hooked to its output layer",
        ),
        (
            lambda m: setattr(m.lm_head, "forward", m.lm_head.forward),
            "something is hooked to its output layer",
        ),
        (
            lambda m: m.lm_head.compile(backend="aot_eager"),
            "its output layer is compiled",
        ),
        (
            lambda m: setattr(m, "lm_head", type("Fancy", (nn.Linear,), {})(8, 13)),
            "its output layer is a Fancy",
        ),
    ],
)
def test_says_why_not(calls, change, why):
    model = apply_losia(tiny_lm(), paper(rank_factor=0.5))
    change(model)
    with pytest.warns(UserWarning, match=f"TinyLM computes its loss from whole logits: {why}"):
        model(**make_batches(1)[0]).loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**make_batches(1)[0]).loss.backward()
    assert not calls


def test_a_failing_forward_leaves_the_model_as_it_was():
    model = apply_losia(tiny_lm(), paper(rank_factor=0.5))
    with pytest.raises(IndexError):
        model(torch.full((1, 3), 99), labels=torch.zeros(1, 3, dtype=torch.int64))
    assert "forward" not in model.lm_head.__dict__


def test_a_copy_computes_its_own_loss(calls):
    model = apply_losia(tiny_lm(), paper(rank_factor=0.5, output_dim_factor=0.5))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    batch = make_batches(1)[0]
    assert twin(**batch).loss.item() == pytest.approx(2.5649, abs=1e-3)  # log 13
    assert model(**batch).loss.item() != pytest.approx(2.5649, abs=1e-3)
    assert len(calls) == 2
    unfuse_loss(twin)
    twin(**batch)
    model(**batch)
    assert len(calls) == 3


def test_removed_with_the_layers(calls):
    model = apply_losia(tiny_lm(), paper(rank_factor=0.5))
    state = model.state_dict().keys()
    remove_losia(model)(**make_batches(1)[0])
    assert not calls and not model._forward_pre_hooks and not model._forward_hooks
    assert not any("losia" in key or "fused" in key for key in state)


def test_checkpointed_as_a_whole(calls):
    """The forward is run again in the backward; the layer observes once."""
    model, plain = pair(output_dim_factor=0.5)
    grads, seen = [], []
    for m in (model, plain):
        m.lm_head.observe_(
            lambda gradient: seen.extend(grad.clone() for grad, _ in gradient_blocks(gradient))
        )
        loss = torch.utils.checkpoint.checkpoint(
            lambda m=m: m(**make_batches(1)[0]).loss, use_reentrant=False
        )
        loss.backward()
        grads.append(m.lm_head.subnet.grad)
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(*seen)


def test_autocast():
    """bfloat16 products as in the ordinary path, and the logits of that dtype for who reads them
    later."""
    fused, plain = (model.float() for model in pair(output_dim_factor=0.5))
    batch = make_batches(1)[0]
    outputs = []
    for model in (fused, plain):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(model(**batch))
        outputs[-1].loss.backward()
    assert outputs[0].loss.dtype == outputs[1].loss.dtype == torch.float32
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        fused.lm_head.subnet.grad, plain.lm_head.subnet.grad, rtol=2e-2, atol=1e-3
    )
    with pytest.warns(UserWarning, match="after all"):
        assert torch.equal(outputs[0].logits.clone(), outputs[1].logits)


def test_a_compiled_model_takes_the_ordinary_path(calls):
    model = WithLoss(FUSED_LOSSES["module"])
    hidden, labels = torch.randn(2, 8, dtype=torch.float64), torch.tensor([3, 4])
    expected = model(hidden, labels=labels)
    fuse_loss(model, "head")
    torch.testing.assert_close(
        torch.compile(model, backend="eager", fullgraph=True)(hidden, labels=labels), expected
    )
    assert not calls


def test_state_dict_is_untouched():
    fused, plain = pair(output_dim_factor=0.5)
    assert same_tensors(fused.state_dict(), plain.state_dict())


@pytest.mark.parametrize("output_dim_factor", EVERY_HEAD)
def test_shapes_alone(calls, output_dim_factor):
    """Under FakeTensorMode, where nothing has a value, a step runs as well."""
    with FakeTensorMode():
        model = apply_losia(tiny_lm(), paper(rank_factor=0.5, output_dim_factor=output_dim_factor))
        loss = model(
            torch.zeros(2, 3, dtype=torch.int64), labels=torch.zeros(2, 3, dtype=torch.int64)
        ).loss
        loss.backward()
    assert loss.shape == () and len(calls) == 1
