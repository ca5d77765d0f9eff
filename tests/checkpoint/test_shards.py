"""Checkpoints of torch.distributed.checkpoint made to do harm: none runs code, reads elsewhere, or
takes memory that it has not the bytes for."""

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata

from losia_kernels import LoSiAAdamW, apply_losia
from losia_kernels.checkpoint import load_checkpoint, save_checkpoint
from losia_kernels.checkpoint.checksums import all_files, checksums, write_sealed
from losia_kernels.checkpoint.folder import MARKER
from losia_kernels.checkpoint.reading import check_archive
from losia_kernels.checkpoint.shards import check_shards, read_metadata
from tests.tiny import paper


class Payload:
    """Unpickled, it makes the file ``ran``."""

    def __init__(self, ran: Path):
        self.ran = ran

    def __reduce__(self):
        return Path.touch, (self.ran,)


def pickles(ran: Path) -> dict[str, bytes]:
    """Ways to say "run this" that a pickle has."""
    path, module = str(ran).encode(), metadata.__name__.encode()
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
        "class": b"\x80\x04"
        + b"".join(b"\x8c" + bytes([len(name)]) + name for name in (module, b"Metadata"))
        + b"\x93N}\x8c\x08__init__K\x01s\x86b.",
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
    config = paper(rank_factor=1 / 4, period=2, target_modules=["0", "1"])
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
