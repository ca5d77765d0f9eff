"""What goes wrong unseen in other setups is told in the first step: subnets nobody reaches or
writes back."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F

from losia_kernels import LoSiAAdamW, apply_losia, attach
from losia_kernels.layers.module import losia_layers
from tests.tiny import make_batches, paper, take_step, tiny_lm


def make(**options):
    return apply_losia(tiny_lm(), paper(**{"rank_factor": 0.5, "fused_loss": False} | options))


def subnets(model) -> list[torch.nn.Parameter]:
    return [layer.subnet for _, layer in losia_layers(model)]


def attached(model):
    optimizer = torch.optim.AdamW(subnets(model), lr=0.01)
    attach(optimizer, model)
    return optimizer


OPTIMIZERS = pytest.mark.parametrize(
    "make_optimizer", [LoSiAAdamW, attached], ids=["LoSiAAdamW", "attach"]
)


def loss_past_the_head(model, batch):
    """As fused losses do: hidden states times ``lm_head.weight``, without calling the layer."""
    hidden = model.model.embed_tokens(batch["input_ids"])
    for block in model.model.layers:
        hidden = block(hidden)
    logits = F.linear(model.model.norm(hidden), model.lm_head.weight)
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


@OPTIMIZERS
@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_a_loss_that_reads_the_output_layers_weight_past_it_is_an_error(make_optimizer, factor):
    model, (batch,) = make(output_dim_factor=factor), make_batches(1)
    optimizer = make_optimizer(model)
    loss_past_the_head(model, batch).backward()
    with pytest.raises(
        RuntimeError,
        match="lm_head: the loss gave .* no gradient.*fused_linear_cross_entropy=False",
    ):
        optimizer.step()


@OPTIMIZERS
def test_with_the_output_layer_frozen_it_may(make_optimizer):
    model, batches = make(), make_batches(3)
    optimizer = make_optimizer(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in batches:
            loss_past_the_head(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()


@OPTIMIZERS
def test_layers_without_a_gradient_are_named_once(make_optimizer):
    model, (batch,) = make(), make_batches(1)
    optimizer = make_optimizer(model)

    def step():
        hidden = model.model.layers[0](model.model.embed_tokens(batch["input_ids"]))
        hidden.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    with pytest.warns(
        UserWarning,
        match="2 of 4 subnets got no gradient.*layers.1.up_proj, model.layers.1.down_proj",
    ):
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()


@OPTIMIZERS
def test_a_step_without_any_gradient_is_told(make_optimizer):
    optimizer = make_optimizer(make())
    with pytest.warns(UserWarning, match="no subnet has a gradient"):
        optimizer.step()


@OPTIMIZERS
@pytest.mark.parametrize("importance", ["sensitivity", "gradient"])
def test_gradients_that_no_backward_has_brought_are_told_at_the_end_of_a_slot(
    make_optimizer, importance
):
    """As a replayed CUDA graph writes them: into ``.grad``, while Python sees no backward."""
    model, batches = make(period=2, importance=importance), make_batches(6)
    optimizer = make_optimizer(model)
    start = [layer.in_idx.clone() for _, layer in losia_layers(model)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(4):
            for subnet in subnets(model):
                subnet.grad = torch.ones_like(subnet)
            optimizer.step()
    said = [str(warning.message) for warning in told]
    assert (
        len(said) == 2
        and "model.layers.0 got gradients, but no backward" in said[0]
        and "layers.1" in said[1]
    )
    assert all(
        torch.equal(layer.in_idx, before)
        for (_, layer), before in zip(losia_layers(model), start, strict=True)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in batches:
            optimizer.zero_grad()
            take_step(model, optimizer, batch)


@OPTIMIZERS
def test_zeros_that_are_left_to_a_block_that_no_batch_uses_are_no_gradients(make_optimizer):
    model, (first, *batches) = make(period=2), make_batches(7)
    optimizer = make_optimizer(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in (first, *batches):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            model.model.layers[1].forward = lambda hidden: hidden  # dropped, as at random
    assert all(subnet.grad is not None for subnet in subnets(model))


FORMS = pytest.mark.parametrize(
    "form", [{}, {"foreach": True}, {"fused": True}], ids=["for", "foreach", "fused"]
)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_optimizer_that_nobody_attached_is_told_at_the_second_forward(dtype, form):
    model = make().to(dtype)
    optimizer = torch.optim.AdamW(subnets(model), lr=0.1, **form)
    first, second = make_batches(2)
    take_step(model, optimizer, first, first)
    with pytest.raises(
        RuntimeError,
        match=r"layers.0.up_proj: an optimizer has stepped.*attach\(optimizer, model\)",
    ):
        model(**second)


def test_an_optimizer_with_kernels_of_its_own_is_told_too():
    """bitsandbytes writes past torch's count of writes."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = make()
    take_step(
        model,
        bitsandbytes.optim.AdamW8bit(subnets(model), lr=0.1, min_8bit_size=1),
        *make_batches(2),
    )
    with pytest.raises(RuntimeError, match="an optimizer has stepped"):
        model(**make_batches(1)[0])


def test_of_other_parameters_no_write_is_counted():
    """A graph that is kept over a fused step of an unrelated model stays usable, as torch has
    it."""
    model = make()  # layers are alive
    other = torch.nn.Parameter(torch.ones(3))
    stepped, idle, *_ = subnets(model)
    optimizer = torch.optim.AdamW([other, stepped, idle], lr=0.1, fused=True)
    other.grad, stepped.grad = torch.ones_like(other), torch.ones_like(stepped)
    before = [p._version for p in (other, stepped, idle)]
    optimizer.step()
    assert [p._version - then for p, then in zip((other, stepped, idle), before, strict=True)] == [
        0,
        1,
        0,
    ]


def test_a_copy_is_told_too():
    model = copy.deepcopy(make())
    take_step(model, torch.optim.AdamW(subnets(model), lr=0.1, fused=True), *make_batches(2))
    with pytest.raises(RuntimeError, match="an optimizer has stepped"):
        model(**make_batches(1)[0])


@FORMS
def test_with_write_back_a_plain_optimizer_is_fine(form):
    model = make()
    optimizer = torch.optim.AdamW(subnets(model), lr=0.1, **form)
    for batch in make_batches(3):
        take_step(model, optimizer, batch)
        for _, layer in losia_layers(model):
            layer.write_back_()


def test_written_back_past_torchs_counter_it_is_fine():
    """The values decide: ``.data`` is written without a trace."""
    model = make()
    optimizer = torch.optim.AdamW(subnets(model), lr=0.1)
    for batch in make_batches(3):
        take_step(model, optimizer, batch)
        for _, layer in losia_layers(model):
            layer.weight.data[layer.out_idx[:, None], layer.in_idx] = layer.subnet.data


def test_evaluation_does_not_complain_and_a_copy_as_the_original():
    model, (batch,) = make(), make_batches(1)
    copy.deepcopy(model)(**batch)
    take_step(model, torch.optim.AdamW(subnets(model), lr=0.1), batch)
    with torch.no_grad():
        model(**batch)
    for complaining in (copy.deepcopy(model), model, model):  # until it is written back
        with pytest.raises(RuntimeError, match="write_back_"):
            complaining(**batch)
