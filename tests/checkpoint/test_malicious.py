"""Files made to do harm: none writes outside the output, runs code, or takes memory that it has not
the bytes for; each is refused in one line."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from losia_kernels.checkpoint import delta
from losia_kernels.checkpoint.checksums import all_files, checksums, read_sealed, write_sealed
from losia_kernels.checkpoint.folder import INDEX, WEIGHTS
from losia_kernels.checkpoint.reading import check_file_name
from losia_kernels.checkpoint.writing import beside_of
from tests.checkpoint.trained_pairs import assert_same_model, make_pair
from tests.integrations.tiny_llama import make_model

NAMES = [
    "../outside",
    "..",
    ".",
    "",
    "/etc/outside",
    "a/b",
    "a\\b",
    "..\\outside",
    "C:outside",
    "out\0side",
    "out\nside",
    "\ud800",
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"), steps=2, output_dim_factor=0.0)


def rewrite(folder: Path, change) -> None:
    """Change a delta's record as someone would who knows the format: checksums fit."""
    record = read_sealed(folder / "delta.json", {})
    change(record)
    files = [name for name in all_files(folder) if name != "delta.json"]
    record["checksums"] = checksums(folder, files)
    write_sealed(folder / "delta.json", record)


# names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, None, 3, ["a"]])
def test_a_name_is_one_component(name):
    with pytest.raises(ValueError, match="which is not the name of a file beside it"):
        check_file_name(name, "index.json")
    assert check_file_name("model-00001-of-00002.safetensors", "index.json")


@pytest.mark.parametrize("name", [*NAMES, WEIGHTS, "additional_chat_templates/../../outside", ".x"])
def test_a_delta_that_names_files_elsewhere(pair, made, outside, tmp_path, refused, name):
    if "\ud800" in name:
        text = (made / "delta.json").read_text()
        (made / "delta.json").write_text(text.replace('"config.json"', '"\\ud800"'))
    else:
        rewrite(made, lambda record: record["files"]["trained"].append(name))
    before = sorted(tmp_path.iterdir())
    refused("delta", "apply", pair.base, made, tmp_path / "out", problem="delta.json")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", NAMES[:-1])
def test_an_index_that_names_files_elsewhere(pair, tmp_path, refused, name):
    folder = tmp_path / "sharded"
    shutil.copytree(pair.base, folder)
    os.rename(folder / WEIGHTS, folder / "part.safetensors")
    weight_map = dict.fromkeys(load_file(folder / "part.safetensors"), "part.safetensors")
    weight_map["x"] = name
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused("delta", "make", folder, pair.trained, tmp_path / "out", problem=INDEX)


def test_a_shard_elsewhere_is_not_emptied_by_an_export(pair, tmp_path, refused):
    """Joined to the output, an absolute path is itself."""
    victim, folder = tmp_path / "victim.safetensors", tmp_path / "checkpoint"
    tensors = load_file(pair.base / WEIGHTS)
    save_file({**tensors, "model.norm.subnet": torch.ones(1)}, victim)
    before = victim.read_bytes()
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": str(victim)}}))
    refused("export", folder, tmp_path / "out", problem="not the name of a file beside it")
    assert victim.read_bytes() == before


# links ---------------------------------------------------------------------------------------------


def test_links_among_side_files_are_not_followed(pair, outside, tmp_path, refused):
    base, trained = tmp_path / "base", tmp_path / "trained"
    shutil.copytree(pair.base, base)
    shutil.copytree(pair.trained, trained)
    (trained / "NOTES").symlink_to(outside)
    refused("delta", "make", base, trained, tmp_path / "out", problem="NOTES is a link")
    (trained / "NOTES").unlink()
    templates = tmp_path / "templates"
    templates.mkdir()
    (templates / "x.jinja").write_text("precious")
    (trained / "additional_chat_templates").symlink_to(templates)
    refused("delta", "make", base, trained, tmp_path / "out", problem="is a link")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_links_in_a_delta_are_not_followed(pair, made, outside, tmp_path, refused, what):
    if what == "file":
        rewrite(made, lambda record: record["files"]["trained"].append("NOTES"))
        (made / "trained" / "NOTES").symlink_to(outside)
    else:
        os.rename(made / "trained", tmp_path / "elsewhere")
        (made / "trained").symlink_to(tmp_path / "elsewhere")
    refused("delta", "apply", pair.base, made, tmp_path / "out", problem="is a link")


def test_the_hubs_own_links_are_followed(pair, outside, tmp_path, refused):
    """Its cache keeps files as blobs beside its snapshots; a link to anywhere else is still one."""
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    shutil.copytree(pair.base, snapshot)
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        os.rename(path, blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    delta.make_delta(snapshot, pair.trained, tmp_path / "delta")
    delta.subtract_delta(pair.trained, tmp_path / "delta", tmp_path / "restored")
    assert_same_model(tmp_path / "restored", pair.base)
    (snapshot / "NOTES").symlink_to("../../../outside")
    refused("delta", "make", snapshot, pair.trained, tmp_path / "out", problem="NOTES is a link")


@pytest.mark.parametrize("at", [beside_of(Path("out")).name, "out"])
def test_a_link_where_the_output_goes_is_not_written_through(pair, tmp_path, refused, at):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("")
    (tmp_path / at).symlink_to(victim)
    refused("delta", "make", pair.base, pair.trained, tmp_path / "out", problem="out")
    assert [path.name for path in victim.iterdir()] == ["precious"]


# sizes ---------------------------------------------------------------------------------------------


def headers() -> dict[str, bytes]:
    def tensor(shape, end):
        header = {"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}
        return json.dumps(header).encode()

    huge, small = tensor([2**20, 2**20], 2**42), tensor([2**20, 2**20], 16)
    return {
        "header": struct.pack("<Q", 2**60) + b"{}",
        "shape": struct.pack("<Q", len(huge)) + huge + b"\0" * 16,
        "offsets": struct.pack("<Q", len(small)) + small + b"\0" * 16,
    }


@pytest.mark.parametrize("lie", headers())
def test_safetensors_that_lie_about_their_size(pair, tmp_path, refused, little_memory, lie):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / WEIGHTS).write_bytes(headers()[lie])
    for command in (["inspect"], ["export"], ["delta", "make", pair.base]):
        output = [] if command == ["inspect"] else [tmp_path / "out"]
        refused(*command, tmp_path / "model", *output, problem="cannot be read as safetensors")


def test_a_delta_that_lies_about_its_blocks(pair, made, tmp_path, refused, little_memory):
    blocks = load_file(made / "blocks.safetensors")
    name = next(name for name in blocks if name.endswith("out_counts"))
    blocks[name] = torch.full_like(blocks[name], 2**31 - 1)
    save_file(blocks, made / "blocks.safetensors")
    rewrite(made, lambda record: None)
    refused("delta", "apply", pair.base, made, tmp_path / "out", problem="does not come out")


@pytest.mark.parametrize("dtype", ["load", "Tensor", "os", "float33"])
def test_a_delta_whose_dtype_is_none(pair, made, tmp_path, refused, dtype):
    def change(record):
        next(iter(record["tensors"].values()))["dtype"]["trained"] = dtype

    rewrite(made, change)
    refused("delta", "apply", pair.base, made, tmp_path / "out", problem="no such tensor")
    refused("inspect", made, problem="no such tensor")


# code of a model's own -----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["pipeline", "AutoModel", "AutoConfig", "logging", "Mine"])
def test_a_config_whose_architecture_is_no_model(pair, tmp_path, refused, architecture):
    base = tmp_path / "base"
    shutil.copytree(pair.base, base)
    config = json.loads((base / "config.json").read_text())
    config["architectures"] = [architecture]
    (base / "config.json").write_text(json.dumps(config))
    refused("lora", base, pair.trained, tmp_path / "out", problem="transformers has no model")


def test_code_beside_a_config_is_not_run(pair, tmp_path, refused):
    base = tmp_path / "base"
    shutil.copytree(pair.base, base)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    refused("lora", base, pair.trained, tmp_path / "out", problem="contains custom code")
    assert not (tmp_path / "ran").exists()


def test_a_name_of_another_kind_is_no_reason_to_refuse(tmp_path):
    """What others call their files: spaces, accents, dots, an at sign."""
    make_model().save_pretrained(tmp_path / "base")
    for name in ("my notes (2).txt", "Größe.md", "a..b", "x@1.2", "-rf"):
        (tmp_path / "base" / name).write_text("kept")
    delta.make_delta(tmp_path / "base", tmp_path / "base", tmp_path / "delta")
    delta.apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    assert_same_model(tmp_path / "out", tmp_path / "base")
