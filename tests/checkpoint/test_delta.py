"""Deltas: exact in both directions, as large as what was touched, and refused where they do not
belong."""

import json
import shutil
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from losia_kernels import cli
from losia_kernels.checkpoint import delta
from losia_kernels.checkpoint.blocks import find_blocks, put_, take
from losia_kernels.checkpoint.folder import ModelFolder
from tests.checkpoint.trained_pairs import assert_same_model, change, load, make_pair
from tests.integrations.tiny_llama import make_model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


def read_blocks(folder, side="trained"):
    """Name -> [(out_idx, in_idx, values [out, in]), ...]: a second reader, written from the
    format's description."""
    where, values = (
        load_file(folder / "blocks.safetensors"),
        load_file(folder / side / "values.safetensors"),
    )
    blocks = {}
    for name, flat in values.items():
        out_idx, counts, in_idx, masks = (
            where[f"{name}.{part}"].numpy()
            for part in ("out_idx", "out_counts", "in_idx", "in_mask")
        )
        first = 0
        for outputs, mask in zip(np.split(out_idx, np.cumsum(counts)[:-1]), masks, strict=True):
            inputs = in_idx[np.unpackbits(mask)[: len(in_idx)] == 1]
            size = len(outputs) * len(inputs)
            block = outputs, inputs, flat[first : first + size].reshape(len(outputs), len(inputs))
            blocks.setdefault(name, []).append(block)
            first += size
        assert first == len(flat)
    return blocks


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "bfloat16", "tied": False, "shards": ("1GB", "40KB")},
        {"dtype": "float16", "tied": False, "shards": ("40KB", "20KB")},
        {"dtype": "float32", "base_dtype": "bfloat16"},
        {"dtype": "bfloat16", "output_dim_factor": 1.0, "modules_to_save": ["norm"]},
        {
            "tied": False,
            "output_dim_factor": 0.0,
            "modules_to_save": ["embed_tokens", "input_layernorm"],
        },
    ],
    ids=[
        "fp32-tied",
        "bf16-sharded",
        "fp16-both-sharded",
        "bf16-to-fp32",
        "bf16-dense-head-norms",
        "dense-embedding",
    ],
)
def test_base_and_delta_are_the_trained_model_and_back(tmp_path, options):
    pair = make_pair(tmp_path, **options)
    delta.make_delta(pair.base, pair.trained, tmp_path / "delta")
    delta.verify_delta(pair.base, tmp_path / "delta")
    delta.apply_delta(pair.base, tmp_path / "delta", tmp_path / "applied")
    assert_same_model(tmp_path / "applied", pair.trained)
    delta.subtract_delta(pair.trained, tmp_path / "delta", tmp_path / "restored")
    assert_same_model(tmp_path / "restored", pair.base)
    assert not list(tmp_path.glob("*unfinished*"))
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "applied", output_loading_info=True)
    assert not any(report.values()), report


def test_blocks_are_what_the_subnets_touched_each_entry_once(pair, made):
    base, trained, blocks = load(pair.base), load(pair.trained), read_blocks(made)
    tied = {"lm_head": "model.embed_tokens"}
    names = {tied.get(name, name): mask for name, mask in pair.touched.items()}
    assert blocks.keys() == {f"{name}.weight" for name in names}
    for name, mask in names.items():
        stored = torch.zeros(mask.shape, dtype=torch.int)
        for out_idx, in_idx, values in blocks[f"{name}.weight"]:
            stored[out_idx[:, None], in_idx] += 1
            assert torch.equal(values, trained[f"{name}.weight"][out_idx[:, None], in_idx])
        assert torch.equal(stored, (base[f"{name}.weight"] != trained[f"{name}.weight"]).int())
        assert not stored[~mask].any()
        assert stored.sum() > 0.99 * mask.sum()  # an entry may come back to its first value
        count = len(blocks[f"{name}.weight"])
        # of three that overlap: 7, and by such entries more
        assert count == 1 if "embed" in name else 2 <= count <= 12


def test_it_is_as_small_as_what_it_holds_and_says_so(pair, made, capsys):
    base, trained = load(pair.base), load(pair.trained)
    changed = sum(int((base[name] != trained[name]).sum()) for name in base)
    assert (
        sum(len(values) for values in load_file(made / "trained" / "values.safetensors").values())
        == changed
    )
    assert cli.main(["inspect", str(made)]) == 0
    printed = capsys.readouterr().out
    full = sum(tensor.numel() for tensor in base.values())
    assert f"changed  15 of {len(base)} tensors, {changed:,} of {full:,} values" in printed
    record = json.loads((made / "delta.json").read_text())
    assert f"base     sha256 {record['sha256']['base']}" in printed
    assert (
        f"% of the model's {4 * full / 1e6:,.2f} MB" in printed
        and "in base/, which only subtract needs" in printed
    )
    assert "   2 x model.layers.*.mlp.down_proj.weight  32 x 48" in printed
    shutil.rmtree(made / "base")
    assert "without base/" in delta.describe_delta(made)


@pytest.mark.parametrize("shape", [(40, 23), (7, 8), (1, 5), (5, 1)])
@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_any_set_of_entries_is_kept(shape, share):
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(shape, generator=generator)
    changed = torch.rand(shape, generator=generator) <= share
    changed[0, 0] = True
    after = torch.where(changed, before + 1, before)
    where = find_blocks(changed)
    values = take(after, where)
    assert len(values) == changed.sum()
    result = before.clone()
    put_(result, where, values)
    assert torch.equal(result, after)


def test_the_union_of_overlapping_blocks_is_three_blocks():
    changed = torch.zeros(64, 100, dtype=torch.bool)
    changed[3:20, 10:40] = True
    changed[15:33, 30:90] = True
    where = find_blocks(changed)
    assert sorted(where["out_counts"].tolist()) == [5, 12, 13]
    assert sum(part.nbytes for part in where.values()) < 600


def test_bits_count_and_not_values(tmp_path):
    """0.0 and -0.0, and the bits of a NaN, are told apart; a scalar, an integer and an empty tensor
    are kept."""
    base = {
        "a": torch.tensor([[0.0, float("nan"), 1.0]]),
        "scalar": torch.tensor(1.0),
        "ids": torch.arange(3),
        "none": torch.zeros(0, 4),
        "empty": torch.zeros(0),
        "thin": torch.zeros(3, 0),
    }
    trained = {name: tensor.clone() for name, tensor in base.items()}
    trained["a"].view(torch.int32)[0, 1] += 1
    trained["a"][0, 0] = -0.0
    trained["scalar"] += 1
    trained["ids"][2] = 7
    for name, tensors in (("base", base), ("trained", trained)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    delta.make_delta(tmp_path / "base", tmp_path / "trained", tmp_path / "delta")
    delta.apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "applied")
    assert_same_model(tmp_path / "applied", tmp_path / "trained")


def test_a_training_that_changed_nothing(pair, tmp_path):
    delta.make_delta(pair.base, pair.base, tmp_path / "delta")
    delta.apply_delta(pair.base, tmp_path / "delta", tmp_path / "applied")
    assert_same_model(tmp_path / "applied", pair.base)


def test_models_are_read_tensor_by_tensor(pair, made, tmp_path, monkeypatch):
    alive, most = weakref.WeakSet(), [0]
    get = ModelFolder.get

    def counted(self, name):
        tensor = get(self, name)
        alive.add(tensor)
        most[0] = max(most[0], len(alive))
        return tensor

    monkeypatch.setattr(ModelFolder, "get", counted)
    delta.make_delta(pair.base, pair.trained, tmp_path / "again")
    delta.apply_delta(pair.base, made, tmp_path / "applied")
    delta.subtract_delta(pair.trained, made, tmp_path / "restored")
    assert most[0] == 2


def test_files_beside_the_weights_travel_too(pair, tmp_path):
    for name in ("base", "trained"):
        shutil.copytree(getattr(pair, name), tmp_path / name)
    (tmp_path / "base" / "LICENSE").write_text("free")
    (tmp_path / "trained" / "chat_template.jinja").write_text("new")
    (tmp_path / "trained" / "vocab.txt").write_text("added")
    delta.make_delta(tmp_path / "base", tmp_path / "trained", tmp_path / "delta")
    assert {f.name for f in (tmp_path / "delta" / "trained").iterdir()} == {
        "values.safetensors",
        "chat_template.jinja",
        "vocab.txt",
    }
    delta.apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "applied")
    assert_same_model(tmp_path / "applied", tmp_path / "trained")
    delta.subtract_delta(tmp_path / "trained", tmp_path / "delta", tmp_path / "restored")
    assert_same_model(tmp_path / "restored", tmp_path / "base")


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"model__norm__weight": torch.full((32,), 2.0)}, "the values of model.norm.weight differ"),
        (
            {"model__norm__weight": torch.ones(31)},
            "model.norm.weight is float32 [31], not float32 [32]",
        ),
        (
            {"model__norm__weight": torch.ones(32).half()},
            "model.norm.weight is float16 [32], not float32 [32]",
        ),
        ({"model__norm__weight": None}, "it lacks model.norm.weight"),
        ({"other": torch.ones(1)}, "it has besides other"),
    ],
)
@pytest.mark.parametrize("action", ["apply", "verify"])
def test_a_wrong_base_is_refused_before_anything_is_written(
    pair, made, tmp_path, capsys, tensors, problem, action
):
    base = tmp_path / "base"
    shutil.copytree(pair.base, base)
    change(base, **tensors)
    before = {path.name for path in tmp_path.iterdir()}
    output = [str(tmp_path / "out")] if action == "apply" else []
    assert cli.main(["delta", action, str(base), str(made), *output]) == 2
    assert (
        capsys.readouterr().err
        == f"losia-kernels: {base} is not the base model of {made}: {problem}\n"
    )
    assert {path.name for path in tmp_path.iterdir()} == before


def test_the_first_tensor_that_differs_is_named(pair, made, tmp_path):
    make_model(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"the values of model.embed_tokens.weight differ"):
        delta.apply_delta(tmp_path / "other", made, tmp_path / "out")


def test_subtracting_from_another_model_is_refused(pair, made, tmp_path):
    with pytest.raises(
        ValueError, match="is not the trained model of .*: the values of model.embed_tokens.weight"
    ):
        delta.subtract_delta(pair.base, made, tmp_path / "out")


def test_without_the_base_values_it_applies_but_does_not_subtract(pair, made, tmp_path):
    shutil.rmtree(made / "base")
    delta.apply_delta(pair.base, made, tmp_path / "applied")
    assert_same_model(tmp_path / "applied", pair.trained)
    with pytest.raises(ValueError, match="has no base/values.safetensors"):
        delta.subtract_delta(pair.trained, made, tmp_path / "out")


def test_a_base_that_training_rounded_is_not_given_back(tmp_path):
    pair = make_pair(tmp_path, dtype="bfloat16", base_dtype="float32")
    delta.make_delta(pair.base, pair.trained, tmp_path / "delta")
    delta.apply_delta(pair.base, tmp_path / "delta", tmp_path / "applied")
    assert_same_model(tmp_path / "applied", pair.trained)
    with pytest.raises(ValueError, match="was float32 and was rounded to bfloat16 before training"):
        delta.subtract_delta(pair.trained, tmp_path / "delta", tmp_path / "out")


def flip_a_value(made):
    values = load_file(made / "trained" / "values.safetensors")
    next(iter(values.values()))[0] += 1
    save_file(values, made / "trained" / "values.safetensors")


def drop_a_value(made):
    values = load_file(made / "trained" / "values.safetensors")
    save_file(
        {name: flat[:-1].clone() for name, flat in values.items()},
        made / "trained" / "values.safetensors",
    )


def cut_a_file(made):
    content = (made / "blocks.safetensors").read_bytes()
    (made / "blocks.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (
            flip_a_value,
            "is damaged: trained/values.safetensors is damaged: it does not have the checksum",
        ),
        (drop_a_value, "is damaged: trained/values.safetensors has "),
        (cut_a_file, "is damaged: blocks.safetensors has "),
        (
            lambda made: (made / "delta.json").write_text("{"),
            "delta.json cannot be read as JSON",
        ),
        (
            lambda made: (made / "delta.json").write_text('{"version": 9}'),
            "is a delta of version 9",
        ),
        (lambda made: shutil.rmtree(made / "trained"), "trained/values.safetensors is missing"),
    ],
)
def test_a_damaged_delta_leaves_nothing_behind(pair, made, tmp_path, capsys, damage, problem):
    damage(made)
    assert cli.main(["delta", "apply", str(pair.base), str(made), str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and problem in printed
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]


def test_the_command_line(pair, tmp_path, capsys):
    base, trained, made, applied, restored = map(
        str, (pair.base, pair.trained, tmp_path / "d", tmp_path / "a", tmp_path / "r")
    )
    assert cli.main(["delta", "make", base, trained, made]) == 0
    assert "only subtract needs" in capsys.readouterr().out
    assert cli.main(["delta", "verify", base, made]) == 0
    assert f"{base} is the base of {made}: sha256 " in capsys.readouterr().out
    assert cli.main(["delta", "apply", base, made, applied]) == 0
    assert cli.main(["delta", "subtract", applied, made, restored]) == 0
    assert_same_model(tmp_path / "a", pair.trained)
    assert_same_model(tmp_path / "r", pair.base)
