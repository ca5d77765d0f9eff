"""Files made to do harm: none writes outside the output, runs code, or takes memory that it has not
the bytes for; each is refused in one line."""

import io
import json
import os
import pickle
import resource
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import filesystem, metadata

from losia_kernels import LoSiAAdamW, LoSiAConfig, apply_losia, cli
from losia_kernels.checkpoint import delta, load_checkpoint, save_checkpoint
from losia_kernels.checkpoint.checksums import all_files, checksums, read_sealed, write_sealed
from losia_kernels.checkpoint.folder import INDEX, MARKER, WEIGHTS
from losia_kernels.checkpoint.reading import check_archive, check_file_name
from losia_kernels.checkpoint.shards import check_shards, read_metadata
from losia_kernels.checkpoint.writing import UNFINISHED
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


@pytest.fixture
def made(pair, tmp_path):
    delta.make_delta(pair.base, pair.trained, tmp_path / "delta")
    return tmp_path / "delta"


@pytest.fixture
def outside(tmp_path):
    """A file that nothing may read from or write to; it is looked at afterwards."""
    path = tmp_path / "outside"
    path.write_text("precious")
    yield path
    assert path.read_text() == "precious" and not path.is_symlink()


@pytest.fixture
def refused(capsys):
    """Runs a command that must end in one line with this text and exit code 2."""

    def run(*arguments, problem: str) -> None:
        assert cli.main([str(each) for each in arguments]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("losia-kernels: ") and printed.count("\n") == 1, printed
        assert problem in printed, printed

    return run


@pytest.fixture
def little_memory():
    """What would take 74 GiB fails at once instead of taking the machine down."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (24 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


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


@pytest.mark.parametrize("at", ["out" + UNFINISHED, "out"])
def test_a_link_where_the_output_goes_is_not_written_through(pair, tmp_path, refused, at):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("")
    (tmp_path / at).symlink_to(victim)
    refused("delta", "make", pair.base, pair.trained, tmp_path / "out", problem="out")
    assert [path.name for path in victim.iterdir()] == ["precious"]


# pickles -------------------------------------------------------------------------------------------


class Payload:
    """Unpickled, it makes the file ``ran``."""

    def __init__(self, ran: Path):
        self.ran = ran

    def __reduce__(self):
        return Path.touch, (self.ran,)


def pickles(ran: Path) -> dict[str, bytes]:
    """Ways to say "run this" that a pickle has."""
    path = str(ran).encode()
    return {
        "reduce": pickle.dumps(Payload(ran)),
        "inside": pickle.dumps(metadata.Metadata({}, Payload(ran), {})),
        "old protocol": pickle.dumps(Payload(ran), 0),
        "system": b"cos\nsystem\n(S'touch " + path + b"'\ntR.",
        "inst": b"(S'touch " + path + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'touch " + path + b"'\no.",
        "eval": b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x041+11\x85R.",
        "torch.load": b"\x80\x04\x8c\x05torch\x8c\x04load\x93\x8c\x01x\x85R.",
        "getattr": b"\x80\x04\x8c\x05torch\x8c\x0fos.system\x93.",
        # the class of all later ones would be another
        "class": b"\x80\x04\x8c'torch.distributed.checkpoint.metadata\x8c\x08Metadata\x93"
        b"N}\x8c\x08__init__K\x01s\x86b.",
        "persistent": b"\x80\x04\x8c\x01xQ.",
        "long": b"\x80\x04\x96\xff\xff\xff\xff\xff\x00\x00\x00.",  # 1 TiB of bytearray
        "not one": b"\0" * 100,
        "nothing": b"",
        "a number": pickle.dumps(3),
    }


@pytest.mark.parametrize("payload", pickles(Path("x")))
def test_metadata_that_would_run_code(tmp_path, payload, little_memory):
    ran = tmp_path / "ran"
    (tmp_path / ".metadata").write_bytes(pickles(ran)[payload])
    for read in (read_metadata, check_shards):
        with pytest.raises(ValueError, match=r"\.metadata"):
            read(tmp_path)
    assert not ran.exists()
    assert metadata.Metadata.__init__ is not None and metadata.Metadata({}).planner_data is None


@pytest.fixture
def saved(tmp_path):
    """A checkpoint, and what to load it with."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    config = LoSiAConfig(rank_factor=1 / 4, period=2, target_modules=["0", "1"])
    optimizer = LoSiAAdamW(apply_losia(model, config), lr=1e-2)
    model(torch.ones(2, 16)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path / "saved", model, optimizer, {"step": 1})
    return tmp_path / "saved", model, optimizer


def write_metadata(folder: Path, found: metadata.Metadata) -> None:
    found.storage_meta = None  # the path in it has become a pure one
    (folder / ".metadata").write_bytes(pickle.dumps(found))


def remark(folder: Path) -> None:
    """A marker whose checksums fit what is there now."""
    files = [name for name in all_files(folder) if name != MARKER]
    write_sealed(folder / MARKER, {"files": checksums(folder, files)})


def test_metadata_that_would_run_code_in_load_checkpoint(saved, tmp_path, refused):
    folder, model, optimizer = saved
    assert load_checkpoint(folder, model, optimizer) == {"step": 1}
    original = (folder / ".metadata").read_bytes()
    for payload in pickles(tmp_path / "ran").values():
        (folder / ".metadata").write_bytes(payload)
        with pytest.raises(ValueError, match="metadata"):
            load_checkpoint(folder, model, optimizer)
        remark(folder)
        with pytest.raises(ValueError, match="metadata"):
            load_checkpoint(folder, model, optimizer)
        refused("inspect", folder, problem="is no model folder")
    assert not (tmp_path / "ran").exists()
    (folder / ".metadata").write_bytes(original)
    remark(folder)
    assert load_checkpoint(folder, model, optimizer) == {"step": 1}
    torch.save({"param_groups": Payload(tmp_path / "ran")}, folder / "losia.pt")
    remark(folder)
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(folder, model, optimizer)
    assert not (tmp_path / "ran").exists()


def test_bytes_among_the_tensors(saved, tmp_path):
    """torch would unpickle, without a look, what the metadata calls bytes."""
    folder, model, optimizer = saved
    found = read_metadata(folder)
    key = next(key for key in found.state_dict_metadata if key.startswith("model."))
    index = next(index for index in found.storage_data if index.fqn == key)
    content = io.BytesIO()
    torch.save(Payload(tmp_path / "ran"), content)
    (folder / "evil.distcp").write_bytes(content.getvalue())
    found.state_dict_metadata[key] = metadata.BytesStorageMetadata()
    found.storage_data[index] = filesystem._StorageInfo("evil.distcp", 0, len(content.getvalue()))
    write_metadata(folder, found)
    remark(folder)
    with pytest.raises(ValueError, match="is no tensor"):
        load_checkpoint(folder, model, optimizer)
    with pytest.raises(ValueError, match="evil.distcp: .* is no plain value"):
        check_shards(folder)
    assert not (tmp_path / "ran").exists()


def test_shards_with_plain_values_may_be_given_to_torch(tmp_path):
    values = {"a": torch.ones(3, 4), "lr": 0.1, "betas": (0.9, 0.999), "none": None}
    dcp.save(values, checkpoint_id=tmp_path / "plain", no_dist=True)
    check_shards(tmp_path / "plain")
    dcp.save({"x": Payload(tmp_path / "ran")}, checkpoint_id=tmp_path / "other", no_dist=True)
    with pytest.raises(ValueError, match="x is no plain value"):
        check_shards(tmp_path / "other")
    assert not (tmp_path / "ran").exists()


# sizes ---------------------------------------------------------------------------------------------


def lies(found: metadata.Metadata) -> dict:
    """Changes of the metadata that would have something read elsewhere, or far more made than is
    there."""
    index, info = next(
        (index, info) for index, info in found.storage_data.items() if index.offset == (0, 0)
    )
    entry = found.state_dict_metadata[index.fqn]
    huge = torch.Size([2**20, 2**20])

    def larger():
        entry.size = huge

    def chunk():
        entry.size, entry.chunks[0].sizes = huge, huge

    def of(field, value):
        return lambda: setattr(info, field, value)

    return {
        "size": larger,
        "chunk": chunk,
        "negative": lambda: setattr(entry, "size", torch.Size([-16, -16])),
        "length": of("length", 2**40),
        "offset": of("offset", 2**40),
        "before": of("offset", -1),
        "no number": of("offset", "0"),
        "elsewhere": of("relative_path", "../outside"),
        "absolute": of("relative_path", "/etc/passwd"),
        "missing": of("relative_path", "absent"),
        "transformed": of("transform_descriptors", ["x"]),
    }


@pytest.mark.parametrize(
    "lie", "size chunk negative length offset before elsewhere absolute missing transformed".split()
)
def test_metadata_that_lies_about_its_files(saved, outside, lie, little_memory):
    folder, model, optimizer = saved
    found = read_metadata(folder)
    lies(found)[lie]()
    write_metadata(folder, found)
    remark(folder)
    with pytest.raises(ValueError, match="metadata does not fit|absent|names "):
        load_checkpoint(folder, model, optimizer)


def test_an_archive_that_unpacks_to_more_than_it_is(tmp_path):
    torch.save(torch.zeros(2**20), tmp_path / "whole.pt")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as whole,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name))
    size = (tmp_path / "bomb.pt").stat().st_size
    assert size < 10**5 and torch.load(tmp_path / "bomb.pt").numel() == 2**20  # torch unpacks it
    with pytest.raises(ValueError, match="would take more memory than it has bytes"):
        check_archive(tmp_path / "bomb.pt", size, tmp_path / "bomb.pt")
    check_archive(tmp_path / "whole.pt", (tmp_path / "whole.pt").stat().st_size, "")


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
