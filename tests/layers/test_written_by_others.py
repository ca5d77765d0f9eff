"""What others write into a subnet is what the next use of the weight sees; what averages a model
cannot reach where its subnets are."""

import copy

import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM

from losia_kernels import LoSiAAdamW, apply_losia, export_state_dict
from losia_kernels.layers.convert import trained_parameters
from losia_kernels.layers.module import losia_layers
from tests.integrations.tiny_llama import make_model
from tests.tiny import make_batches, paper, same_tensors, snapshot, take_step, tiny_lm

IDS = torch.arange(12).view(2, 6)


def trained_run(steps: int = 3, period: int = 2, **options):
    torch.manual_seed(0)
    model = apply_losia(tiny_lm(**options), paper(rank_factor=0.5, period=period))
    optimizer = LoSiAAdamW(model, lr=0.05)
    for batch in make_batches(steps):
        take_step(model, optimizer, batch)
    return model, optimizer


def parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def logits(model):
    with torch.no_grad():
        return model(make_batches(1)[0]["input_ids"]).logits.clone()


def copied(model, values):
    for p, value in zip(parameters(model), values, strict=True):
        p.data.copy_(value)


def assigned(model, values):
    for p, value in zip(parameters(model), values, strict=True):
        p.data = value.clone()


def counted(model, values):
    with torch.no_grad():
        for p, value in zip(parameters(model), values, strict=True):
            p.copy_(value)


def as_a_vector(model, values):
    vector_to_parameters(parameters_to_vector(values), parameters(model))


def of_all_parameters(model, values):
    """As an average that keeps frozen parameters as they are, and swaps in all of them."""
    values = iter(values)
    for p in model.parameters():
        p.data.copy_(next(values) if p.requires_grad else p.detach().clone())


def added(model, values):
    """As SAM climbs, and by torch's multi-tensor functions."""
    with torch.no_grad():
        differences = [v - p for p, v in zip(parameters(model), values, strict=True)]
        torch._foreach_add_([p.data for p in parameters(model)], differences)


WAYS = pytest.mark.parametrize(
    "write", [copied, assigned, counted, as_a_vector, of_all_parameters, added]
)


def with_the_subnets(model, values) -> torch.nn.Module:
    """The model as it should be seen: subnets of these values, in the weights."""
    other = copy.deepcopy(model)
    for (_, layer), value in zip(losia_layers(other), values, strict=True):
        with torch.no_grad():
            layer.subnet.copy_(value)
        layer.write_back_()
    return other


@WAYS
@pytest.mark.parametrize("use", ["evaluate", "export", "state_dict", "train"])
def test_every_use_sees_it(write, use):
    model, _ = trained_run()
    before, values = logits(model), [p.detach() * 2 for p in parameters(model)]
    expected = with_the_subnets(model, values)
    write(model, values)
    if use == "evaluate":
        assert torch.equal(logits(model), logits(expected))
        assert not torch.equal(logits(model), before)
    elif use == "train":
        batch = make_batches(1)[0]
        model(**batch).loss.backward()
        expected(**batch).loss.backward()
        pairs = zip(parameters(model), parameters(expected), strict=True)
        assert all(torch.equal(one.grad, other.grad) for one, other in pairs)
    else:
        get = export_state_dict if use == "export" else torch.nn.Module.state_dict
        assert same_tensors(get(model), get(expected))


@WAYS
def test_swapped_in_for_an_evaluation_and_back_the_training_is_what_it_was(write):
    model, optimizer = trained_run()
    control, of_control = trained_run()
    for batch in make_batches(4, seed=1):
        own = [p.detach().clone() for p in parameters(model)]
        write(model, [value * 2 for value in own])
        logits(model)
        copied(model, own)
        take_step(model, optimizer, batch)
        take_step(control, of_control, batch)
    assert same_tensors(snapshot(model), snapshot(control))


def test_the_gradient_of_a_perturbed_subnet_is_one_of_the_perturbed_model():
    """Sharpness-aware minimization."""
    model, optimizer = trained_run()
    (batch,) = make_batches(1)
    model(**batch).loss.backward()
    own = [p.detach().clone() for p in parameters(model)]
    climbed = [p.detach() + 0.5 * p.grad for p in parameters(model)]
    expected = with_the_subnets(model, climbed)
    for p, value in zip(parameters(model), climbed, strict=True):
        p.data.add_(value - p.data)
        p.grad = None
    model(**batch).loss.backward()
    expected(**batch).loss.backward()
    for p, other in zip(parameters(model), parameters(expected), strict=True):
        torch.testing.assert_close(p.grad, other.grad)
    copied(model, own)
    optimizer.step()
    assert not list(trained_parameters(model))


def test_a_saved_folder_and_a_generation_hold_it(tmp_path):
    model = apply_losia(make_model(), paper(rank_factor=0.5))
    base = model.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None)
    generator = torch.Generator().manual_seed(0)
    for p in parameters(model):
        p.data.copy_(torch.randn(p.shape, generator=generator))
    said = model.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert not torch.equal(said, base)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(
        loaded.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None), said
    )


# an export changes nothing ------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_an_export_changes_no_bit_no_version_and_no_flag(tied):
    config = paper(rank_factor=0.5, output_dim_factor=0.5)
    model = apply_losia(tiny_lm(tied=tied), config)
    optimizer = torch.optim.SGD(parameters(model), lr=0.5)
    model(**make_batches(1)[0]).loss.backward()
    optimizer.step()  # nobody writes it back
    expected = with_the_subnets(model, [p.detach() for p in parameters(model)])

    def state():
        return {
            name: (t._version, t.data_ptr(), t.requires_grad)
            for name, t in [*model.named_parameters(), *expected.named_buffers()]
        }

    before, values = state(), {n: p.detach().clone() for n, p in model.named_parameters()}
    exported = export_state_dict(model)
    assert state() == before
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    assert same_tensors(exported, export_state_dict(expected))
    if tied:
        assert exported["lm_head.weight"] is exported["model.embed_tokens.weight"]
    with pytest.raises(RuntimeError, match="an optimizer has stepped the subnet"):
        model(**make_batches(1)[0])  # it is as unfinished as it was


# averages -----------------------------------------------------------------------------------------


def averages_of_buffers(model, batches, optimizer):
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for batch in batches:
        take_step(model, optimizer, batch)
        averaged.update_parameters(model)
    return averaged.module


def averages_of_state_dicts(model, batches, optimizer):
    """As timm's ModelEma and its many descendants."""
    averaged = copy.deepcopy(model)
    for batch in batches:
        take_step(model, optimizer, batch)
        pairs = zip(averaged.state_dict().values(), model.state_dict().values(), strict=True)
        for mean, value in pairs:
            mean.copy_(0.9 * mean + 0.1 * value)
    return averaged


@pytest.mark.parametrize("average", [averages_of_buffers, averages_of_state_dicts])
def test_where_subnets_are_is_not_averaged(average):
    model, optimizer = trained_run(period=1)
    averaged = average(model, make_batches(6, seed=1), optimizer)
    for name, layer in [*losia_layers(averaged), *losia_layers(model)]:
        layer.current_subnet.check((layer.out_features, layer.in_features), name)
    fresh, _ = trained_run(0)
    fresh.load_state_dict(averaged.state_dict())
    assert torch.equal(logits(fresh), logits(averaged))
    assert not torch.equal(logits(averaged), logits(model))


@pytest.mark.parametrize("moves", ["random", "importance"])
@pytest.mark.parametrize("steps", range(1, 9))
def test_an_average_of_all_parameters_swapped_in_is_the_average_of_the_weights(steps, moves):
    """Also right at a move, where the weight's average is the weight in the new place, and the
    subnet's one of the old place."""
    config = paper(rank_factor=0.25, period=2, moves=moves, init_subnet="random", lr_of="subnet")
    model = apply_losia(tiny_lm(), config)
    optimizer = LoSiAAdamW(model, lr=0.05)
    averages = {name: p.detach().clone() for name, p in model.named_parameters()}
    for batch in make_batches(steps):
        take_step(model, optimizer, batch)
        for name, p in model.named_parameters():
            averages[name].lerp_(p.detach(), 0.25)
    expected = tiny_lm()
    expected.load_state_dict({name: averages[name] for name in expected.state_dict()})
    before, own = snapshot(model), [p.detach().clone() for p in model.parameters()]
    for name, p in model.named_parameters():
        p.data.copy_(averages[name])
    assert torch.equal(logits(model), logits(expected))
    for p, value in zip(model.parameters(), own, strict=True):
        p.data.copy_(value)
    assert same_tensors(snapshot(model), before)


def test_exchanged_with_an_average_and_back_the_live_model_is_whole():
    """As Lightning's weight averaging evaluates: parameters and buffers change places."""
    model, optimizer = trained_run(period=1)
    averaged = averages_of_buffers(model, make_batches(4, seed=1), optimizer)
    before = snapshot(model)

    def exchange():
        for one, other in zip(
            [*model.parameters(), *model.buffers()],
            [*averaged.parameters(), *averaged.buffers()],
            strict=True,
        ):
            held = one.data.clone()
            one.data.copy_(other.data)
            other.data.copy_(held)

    expected = logits(averaged)
    exchange()
    for _, layer in losia_layers(model):
        layer.current_subnet.check((layer.out_features, layer.in_features), layer.name)
    assert torch.equal(logits(model), expected)
    exchange()
    assert torch.equal(logits(averaged), expected)
    assert same_tensors(snapshot(model), before)
    take_step(model, optimizer, make_batches(1)[0])


def test_buffers_of_a_model_leave_indices_out_and_everybody_finds_them_by_name():
    model, _ = trained_run()
    layer = model.model.layers[0].up_proj
    assert not [name for name, _ in model.named_buffers() if name.endswith("_idx")]
    assert model.get_buffer("model.layers.0.up_proj.out_idx") is layer.out_idx
    assert dict(layer.named_buffers(recurse=False)).keys() == {"out_idx", "in_idx"}
    assert {key for key in layer.state_dict() if key.endswith("_idx")} == {"out_idx", "in_idx"}
    moved = copy.deepcopy(model).to("meta").to_empty(device="cpu").model.layers[0].up_proj
    assert torch.equal(moved.out_idx, layer.out_idx)  # nothing else could bring them back
