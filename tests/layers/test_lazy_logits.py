"""Logits that were not computed in the forward: an evaluation needs none, and who reads them gets
those of its time."""

import functools
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from losia_kernels import apply_losia
from losia_kernels.layers import lazy_logits
from tests.layers.test_fused_loss import calls, pair, tell_again  # noqa: F401
from tests.tiny import TinyLM, make_batches, paper


class Largest(TorchDispatchMode):
    """The most elements that an operation's result had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [
            t.numel() for t in tree_leaves(result) if type(t) is torch.Tensor and not t.is_meta
        ]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_computes_logits_only_if_they_are_read(calls, mode, monkeypatch):  # noqa: F811
    # two tokens
    chunked = functools.partial(lazy_logits.losia_linear_cross_entropy, chunk_bytes=2 * 13 * 8)
    monkeypatch.setattr(lazy_logits, "losia_linear_cross_entropy", chunked)
    fused, plain = (model.eval() for model in pair(output_dim_factor=0.5))
    batch = {key: value.repeat(40, 1) for key, value in make_batches(1)[0].items()}
    with mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        with Largest() as largest:
            ours = fused(**batch)
        theirs = plain(**batch)
        torch.testing.assert_close(ours.loss, theirs.loss)
        assert len(calls) == 1 and largest.elements < theirs.logits.numel()
        assert torch.equal(ours.logits.argmax(-1), theirs.logits.argmax(-1))
        assert not ours.loss.requires_grad and torch.equal(ours.logits + 0, theirs.logits)


class WithHidden(TinyLM):
    def forward(self, input_ids, labels=None):
        x = self.model.embed_tokens(input_ids)
        logits = self.lm_head(x)
        return SimpleNamespace(
            loss=F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()),
            logits=logits,
            hidden=x,
        )


@torch.no_grad()
def test_the_logits_of_an_evaluation_are_those_of_its_time():
    """Or an error, where they are gone; never those of another weight."""
    torch.manual_seed(0)
    model = apply_losia(WithHidden(), paper(rank_factor=0.5, output_dim_factor=0.5)).eval()
    batch = make_batches(1)[0]
    expected = model.lm_head(model.model.embed_tokens(batch["input_ids"]))
    doubled = {"lm_head.weight": 2 * model.lm_head.weight}
    assert torch.equal(
        torch.func.functional_call(model, doubled, kwargs=batch).logits + 0, 2 * expected
    )

    def refused(change) -> None:
        output = model(**batch)
        change(output)
        with pytest.raises(
            RuntimeError, match="the output layer or the hidden states have changed"
        ):
            output.logits.argmax(-1)

    refused(lambda output: output.hidden.div_(2))
    refused(lambda output: model.lm_head.weight.mul_(1))
    refused(lambda output: setattr(model.lm_head.weight, "data", model.lm_head.weight * 2))
    refused(lambda output: model.lm_head.to(torch.float16).to(torch.float32))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_after_the_forward_nothing_is_only_noted(mode):
    """What is written into the logits then is not seen by what was made of them before."""
    with mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused, plain = pair(output_dim_factor=0.5)
        found = []
        for model in (fused, plain):
            logits = model(**make_batches(1)[0]).logits
            warm = logits / 0.7
            logits.detach()[..., :10] = 0.0
            found.append((warm + 0, logits + 0))
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_logits_are_read_in_the_precision_of_their_forward():
    fused, plain = (model.float() for model in pair())
    batch = make_batches(1)[0]
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            inside = [model(**batch).logits for model in (fused, plain)]
        outside = [model(**batch).logits for model in (fused, plain)]
        with torch.autocast("cpu", torch.bfloat16):
            read = [logits.clone() for logits in outside]
    assert read[0].dtype == read[1].dtype == torch.float32 and torch.equal(*read)
    assert inside[0].dtype == torch.bfloat16 and torch.equal(inside[0] + 0, inside[1] + 0)
