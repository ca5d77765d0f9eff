"""LoRA adapters of a training's change: exact where the rank suffices, the best of their rank where
not, and honest."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from losia_kernels import cli
from losia_kernels.checkpoint.lora import export_lora, factor
from tests.checkpoint.trained_pairs import load, make_pair
from tests.tolerance import assert_within

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Several relocalizations, and an output layer of its own."""
    return make_pair(tmp_path_factory.mktemp("pair"), tied=False)


@pytest.fixture(scope="module")
def one_subnet(tmp_path_factory):
    """No relocalization; the tied output layer is left frozen."""
    return make_pair(tmp_path_factory.mktemp("one"), steps=3, period=100, output_dim_factor=0.0)


def merged(base, adapter, **kwargs):
    """What PEFT's merge makes of the base."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    return peft.PeftModel.from_pretrained(model, adapter, **kwargs).merge_and_unload().state_dict()


def assert_merged_is_trained(pair, adapter):
    """No further from the trained weights than twice what adding the difference in the same dtype
    is, plus 1e-6."""
    base, trained, result = load(pair.base), load(pair.trained), merged(pair.base, adapter)
    for name, weight in trained.items():
        added = base[name] + (weight - base[name])
        assert_within(result[name], added, weight.double())


def test_one_subnet_is_a_lora_of_its_smaller_side(one_subnet, tmp_path):
    errors = export_lora(one_subnet.base, one_subnet.trained, tmp_path / "lora")
    assert len(errors) == 14
    for layer, error in errors.items():
        k_out, k_in = one_subnet.touched[layer].any(1).sum(), one_subnet.touched[layer].any(0).sum()
        assert error.rank == min(k_out, k_in), layer
        assert error.relative_error < 1e-7 and error.merged_error < 1e-5
    assert_merged_is_trained(one_subnet, tmp_path / "lora")


def test_rounding_the_base_to_the_trained_dtype_is_no_change(tmp_path):
    """``finetune --dtype bfloat16`` of a float32 folder: the rank is the subnet's, not that of the
    rounding."""
    run = dict(dtype="bfloat16", steps=3, period=100, output_dim_factor=0.0)
    wide = make_pair(tmp_path / "wide", base_dtype="float32", **run)
    narrow = make_pair(tmp_path / "narrow", **run)
    errors, expected = (
        export_lora(pair.base, pair.trained, tmp_path / name)
        for pair, name in ((wide, "a"), (narrow, "b"))
    )
    assert errors == expected and all(error.rank <= 12 for error in errors.values())


def test_the_adapter_alone_gives_the_trained_model(one_subnet, tmp_path):
    export_lora(one_subnet.base, one_subnet.trained, tmp_path / "lora")
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(one_subnet.base)
        before = base(tokens).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "lora")(tokens).logits
        trained = AutoModelForCausalLM.from_pretrained(one_subnet.trained)
        expected = trained(tokens).logits
        exact = trained.double()(tokens).logits
    assert (before - expected).abs().max() > 1e-3
    assert_within(adapted, expected, exact)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_after_relocalizations_it_is_exact_at_the_rank_of_what_was_touched(pair, tmp_path, dtype):
    if dtype == "bfloat16":
        pair = make_pair(tmp_path, dtype=dtype, tied=False)
    errors = export_lora(pair.base, pair.trained, tmp_path / "lora")
    assert errors.keys() == pair.touched.keys()
    for layer, error in errors.items():
        touched = pair.touched[layer]
        assert error.rank <= min(touched.any(1).sum(), touched.any(0).sum())
        assert error.relative_error < 1e-7
        # in bfloat16 the sum is rounded to what it was
        assert error.merged_error == 0 or dtype == "float32"
    assert_merged_is_trained(pair, tmp_path / "lora")


def test_a_smaller_rank_is_the_best_of_that_rank_and_says_its_error(pair, tmp_path, capsys):
    rank = 5
    arguments = [str(pair.base), str(pair.trained), str(tmp_path / "lora"), "--rank", str(rank)]
    assert cli.main(["lora", *arguments]) == 0
    printed = capsys.readouterr().out
    stated = json.loads((tmp_path / "lora" / "lora_error.json").read_text())
    base, trained = load(pair.base), load(pair.trained)
    adapter = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    lost = total = 0.0
    for layer, error in stated["layers"].items():
        change = trained[f"{layer}.weight"].double() - base[f"{layer}.weight"].double()
        lora_a, lora_b = (adapter[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
        assert lora_a.shape == (rank, change.shape[1]) and lora_b.shape == (change.shape[0], rank)
        best = torch.linalg.svdvals(change)[rank:].norm()  # Eckart-Young
        distance = (lora_b.double() @ lora_a.double() - change).norm()
        assert math.isclose(distance, best, rel_tol=1e-5)
        assert math.isclose(error["relative_error"], distance / change.norm(), rel_tol=1e-5)
        assert math.isclose(error["merged_error"], error["relative_error"], rel_tol=1e-3)
        lost, total = lost + distance**2, total + change.norm() ** 2
    assert math.isclose(stated["relative_error"], (lost / total) ** 0.5, rel_tol=1e-5)
    assert (
        f"error    {stated['relative_error']:.2e} of the change" in printed
        and "15 layers, rank 5, " in printed
    )
    assert cli.main(["inspect", str(tmp_path / "lora")]) == 0
    assert capsys.readouterr().out == printed
    kinds = [line for line in printed.splitlines() if " x " in line]
    assert len(kinds) == 8 and "   2 x model.layers.*.mlp.up_proj  rank 5  error up to " in printed
    alike = [e["relative_error"] for n, e in stated["layers"].items() if "up_proj" in n]
    assert f"up_proj  rank 5  error up to {max(alike):.2e}, merged " in printed
    result = merged(pair.base, tmp_path / "lora")
    name = "model.layers.0.mlp.up_proj.weight"
    off = (result[name] - trained[name]).norm() / (trained[name] - base[name]).norm()
    assert math.isclose(
        off, stated["layers"]["model.layers.0.mlp.up_proj"]["merged_error"], rel_tol=1e-3
    )


def test_a_rank_that_suffices_leaves_the_layer_exact(pair, tmp_path):
    exact = export_lora(pair.base, pair.trained, tmp_path / "exact")
    ranks = sorted({error.rank for error in exact.values()})
    errors = export_lora(pair.base, pair.trained, tmp_path / "some", rank=ranks[0])
    assert [error.relative_error < 1e-7 for error in errors.values()] == [
        e.rank == ranks[0] for e in exact.values()
    ]


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_factors_select_one_side(shape):
    change = torch.zeros(shape, dtype=torch.float64)
    change[torch.tensor([1, 4, 5])[:, None], torch.tensor([0, 2])] = torch.randn(
        3, 2, dtype=torch.float64
    )
    lora_b, lora_a = factor(change)
    assert lora_b.shape == (shape[0], 2) and lora_a.shape == (2, shape[1])
    assert torch.equal(lora_a.sum(1), torch.ones(2)) and lora_a.count_nonzero() == 2
    assert torch.equal(lora_b @ lora_a, change.float())


def test_a_weight_that_is_stored_transposed(tmp_path):
    """GPT-2's Conv1D."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8)
    )
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[2:5, 10:40] += 1
    model.save_pretrained(tmp_path / "trained")
    errors = export_lora(tmp_path / "base", tmp_path / "trained", tmp_path / "lora")
    assert {layer: error.rank for layer, error in errors.items()} == {"transformer.h.0.mlp.c_fc": 3}
    result, trained = merged(tmp_path / "base", tmp_path / "lora"), load(tmp_path / "trained")
    for name, weight in trained.items():
        torch.testing.assert_close(result[name], weight, atol=1e-6, rtol=0)


def changed_by_hand(pair, folder, name, change):
    shutil.copytree(pair.trained, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        (
            "model.norm.weight",
            lambda t: t.add_(1),
            "and the training changed model.norm.weight: use a delta",
        ),
        ("model.embed_tokens.weight", lambda t: t.add_(1), "changed model.embed_tokens.weight"),
        (
            "model.layers.0.mlp.up_proj.weight",
            lambda t: t[0].fill_(float("nan")),
            "up_proj.weight holds values that are",
        ),
    ],
)
def test_what_no_lora_holds_is_refused_by_name(one_subnet, tmp_path, capsys, name, change, problem):
    trained = changed_by_hand(one_subnet, tmp_path / "trained", name, change)
    assert cli.main(["lora", str(one_subnet.base), str(trained), str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and problem in printed
    assert [path.name for path in tmp_path.iterdir()] == ["trained"]


def test_a_trained_tied_output_layer_is_refused(tmp_path):
    pair = make_pair(tmp_path, steps=1)
    with pytest.raises(ValueError, match="model.embed_tokens.weight"):
        export_lora(pair.base, pair.trained, tmp_path / "lora")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["{base}", "{base}", "out"], "nothing has changed"),
        (["{base}", "{trained}", "out", "--rank", "0"], "the rank must be at least 1, got 0"),
        (["{base}", "{trained}", "{base}"], "exists: name a new folder"),
        (["{base}", "absent", "out"], "absent is no folder"),
    ],
)
def test_bad_arguments(one_subnet, capsys, monkeypatch, tmp_path, arguments, problem):
    monkeypatch.chdir(tmp_path)
    folders = {"base": one_subnet.base, "trained": one_subnet.trained}
    assert cli.main(["lora", *(text.format(**folders) for text in arguments)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and problem in printed
    assert not list(tmp_path.iterdir())
