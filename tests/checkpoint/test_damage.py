"""Deltas, adapters, checkpoints and JSON files with one damaged file: it is named in one line, and
nothing is left behind."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from losia_kernels import LoSiAAdamW, apply_losia, cli
from losia_kernels.checkpoint import checksums, delta, load_checkpoint, save_checkpoint, writing
from losia_kernels.checkpoint.export import export_checkpoint
from losia_kernels.checkpoint.lora import export_lora
from losia_kernels.finetune.run import finetune
from tests.checkpoint.damages import DAMAGES
from tests.checkpoint.trained_pairs import assert_same_model, change, make_pair
from tests.finetune.tiny_run import options
from tests.tiny import paper


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"), steps=2, output_dim_factor=0.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("run")
    finetune(options(folder, model_folder, steps=2, save_steps=2, period=2, eval_data=None))
    return folder / "run"


def said(capsys, *arguments) -> str:
    """The one line that a refused command says."""
    capsys.readouterr()
    assert cli.main([str(each) for each in arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("losia-kernels: ") and printed.count("\n") == 1, printed
    return printed


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_file_of_a_delta(pair, tmp_path, capsys, damage):
    made, output = tmp_path / "delta", tmp_path / "out"
    delta.make_delta(pair.base, pair.trained, made)
    for name in checksums.all_files(made):
        content = (made / name).read_bytes()
        DAMAGES[damage](made / name)
        expected = "is no delta" if (name, damage) == ("delta.json", "missing") else name
        assert expected in said(capsys, "delta", "apply", pair.base, made, output)
        assert expected in said(capsys, "delta", "verify", pair.base, made)
        if (name, damage) != ("delta.json", "missing"):
            assert name in said(capsys, "inspect", made)
        assert [path.name for path in tmp_path.iterdir()] == ["delta"]
        (made / name).write_bytes(content)
    delta.apply_delta(pair.base, made, output)


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_file_of_an_adapter(pair, tmp_path, capsys, damage):
    made = tmp_path / "lora"
    export_lora(pair.base, pair.trained, made)
    for name in checksums.all_files(made):
        content = (made / name).read_bytes()
        DAMAGES[damage](made / name)
        expected = "no model folder" if (name, damage) == ("lora_error.json", "missing") else name
        assert expected in said(capsys, "inspect", made)
        (made / name).write_bytes(content)
    assert cli.main(["inspect", str(made)]) == 0


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_file_of_a_checkpoint_that_is_exported(run, tmp_path, capsys, damage):
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(run / "checkpoints" / "checkpoint-2", checkpoint)
    for name in checksums.all_files(checkpoint):
        if (name, damage) == ("losia.json", "missing"):
            continue  # a Trainer's checkpoint without it can be exported
        content = (checkpoint / name).read_bytes()
        DAMAGES[damage](checkpoint / name)
        expected = "no model folder" if (name, damage) == ("model.safetensors", "missing") else name
        assert expected in said(capsys, "export", checkpoint, tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
        code = cli.main(["inspect", str(checkpoint)])
        printed = "".join(capsys.readouterr())
        assert expected in printed and (code == 2 or "damaged  " in printed), (name, printed)
        (checkpoint / name).write_bytes(content)
    export_checkpoint(checkpoint, tmp_path / "out")
    # the card is of the finished run
    shutil.copy(run / "model" / "README.md", tmp_path / "out")
    assert_same_model(tmp_path / "out", run / "model")


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_file_of_a_checkpoint_in_a_loop_of_ones_own(tmp_path, damage):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    config = paper(rank_factor=1 / 4, period=2, target_modules=["0", "1"])
    optimizer = LoSiAAdamW(apply_losia(model, config), lr=1e-2)
    save_checkpoint(tmp_path / "saved", model, optimizer)
    for name in checksums.all_files(tmp_path / "saved"):
        path = tmp_path / "saved" / name
        content = path.read_bytes()
        DAMAGES[damage](path)
        with pytest.raises((ValueError, FileNotFoundError), match=name):
            load_checkpoint(tmp_path / "saved", model, optimizer)
        path.write_bytes(content)
    load_checkpoint(tmp_path / "saved", model, optimizer)


OTHER_JSON = {
    "list": "[]",
    "null": "null",
    "number": "1e999",
    "string": '"x"',
    "empty": "{}",
    "deep": "[" * 100_000,
    "deep object": '{"weight_map": ' * 50_000,
    "half a character": '{"weight_map": {"a": "\\ud800"}, "version": "\\ud800", "step": 1}',
    "other types": '{"weight_map": [1], "version": {}, "step": "x", "layers": 3, "files": []}',
    "no JSON": "{",
    "digits": '{"version": ' + "9" * 10_000 + "}",
}


@pytest.mark.parametrize("content", OTHER_JSON)
@pytest.mark.parametrize(
    "name",
    ["delta.json", "lora_error.json", "losia.json", "model.safetensors.index.json", "run.json"],
)
def test_json_of_another_shape(run, pair, tmp_path, capsys, name, content):
    folder = tmp_path / "folder"
    if name == "losia.json":
        shutil.copytree(run / "checkpoints" / "checkpoint-2", folder)
    elif name == "run.json":
        shutil.copytree(run, folder)
    else:
        folder.mkdir()
    (folder / name).write_text(OTHER_JSON[content])
    if name == "run.json":
        given = [f"--{each}={pair.base}" for each in ("model", "data")]
        assert name in said(capsys, "finetune", *given, "--resume", "--output", folder)
        return
    problem = said(capsys, "inspect", folder)
    assert name in problem or "delta of version" in problem, problem


def test_a_config_of_another_shape(pair, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(pair.base, base)
    many = {**json.loads((base / "config.json").read_text()), "num_hidden_layers": 10**9}
    for content in (*OTHER_JSON.values(), '{"architectures": []}', json.dumps(many)):
        (base / "config.json").write_text(content)
        assert str(base) in said(capsys, "lora", base, pair.trained, tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_run_where_a_model_is_wanted(run, pair, tmp_path, capsys):
    problem = said(capsys, "delta", "make", pair.base, run, tmp_path / "out")
    assert f"it is a run, whose model is {run / 'model'}" in problem
    unfinished = tmp_path / "run"
    shutil.copytree(run, unfinished)
    shutil.rmtree(unfinished / "model")
    problem = said(capsys, "lora", pair.base, unfinished, tmp_path / "out")
    assert "a run that is not finished: finetune --resume goes on with it" in problem


def test_weights_that_are_a_pointer(pair, tmp_path, capsys):
    (tmp_path / "base").mkdir()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "base" / "model.safetensors").write_text(pointer)
    problem = said(capsys, "delta", "make", tmp_path / "base", pair.trained, tmp_path / "out")
    assert "it is a pointer of Git LFS (git lfs pull)" in problem


# what travels --------------------------------------------------------------------------------------


def test_named_chat_templates_travel(run, pair, tmp_path):
    trained = tmp_path / "trained"
    shutil.copytree(pair.trained, trained)
    (trained / "additional_chat_templates").mkdir()
    (trained / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    delta.make_delta(pair.base, trained, tmp_path / "delta")
    delta.apply_delta(pair.base, tmp_path / "delta", tmp_path / "applied")
    delta.subtract_delta(trained, tmp_path / "delta", tmp_path / "restored")
    named = "additional_chat_templates/tool_use.jinja"
    assert (tmp_path / "applied" / named).read_text() == "{{ tools }}"
    assert not (tmp_path / "restored" / named).exists()
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(run / "checkpoints" / "checkpoint-2", checkpoint)
    shutil.copytree(trained / "additional_chat_templates", checkpoint / "additional_chat_templates")
    export_checkpoint(checkpoint, tmp_path / "exported")
    assert (tmp_path / "exported" / named).read_text() == "{{ tools }}"


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_a_base_with_a_tied_output_layer_saved_twice(tmp_path, shards):
    pair = make_pair(tmp_path, steps=2, output_dim_factor=0.0, shards=(shards, "1GB"))
    base = pair.base
    if shards == "1GB":
        embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
        change(base, lm_head__weight=embedding.clone())
    else:
        embedding = {}
        for path in base.glob("*.safetensors"):
            embedding |= load_file(path)
        extra = {"lm_head.weight": embedding["model.embed_tokens.weight"].clone()}
        save_file(extra, base / "model-extra.safetensors")
        index = json.loads((base / "model.safetensors.index.json").read_text())
        index["weight_map"]["lm_head.weight"] = "model-extra.safetensors"
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    delta.make_delta(base, pair.trained, tmp_path / "delta")
    delta.verify_delta(base, tmp_path / "delta")
    delta.apply_delta(base, tmp_path / "delta", tmp_path / "applied")
    assert_same_model(tmp_path / "applied", pair.trained)
    delta.subtract_delta(pair.trained, tmp_path / "delta", tmp_path / "restored")
    restored = load_file(tmp_path / "restored" / "model.safetensors")
    expected = {}
    for path in base.glob("*.safetensors"):
        expected |= load_file(path)
    assert restored.keys() == expected.keys()
    assert all(torch.equal(restored[name], expected[name]) for name in expected)
    export_lora(base, pair.trained, tmp_path / "lora")
    delta.make_delta(pair.trained, base, tmp_path / "other way")
    delta.apply_delta(pair.trained, tmp_path / "other way", tmp_path / "base again")
    assert load_file(tmp_path / "base again" / "model.safetensors").keys() == expected.keys()


def test_an_output_layer_of_its_own_is_no_other_name(tmp_path):
    pair = make_pair(tmp_path, steps=2, output_dim_factor=0.0)
    change(pair.base, lm_head__weight=torch.zeros(261, 32))
    with pytest.raises(ValueError, match="lacks lm_head.weight"):
        delta.make_delta(pair.base, pair.trained, tmp_path / "delta")


# how folders come to be ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["make", "apply", "lora", "export"])
def test_a_full_disk_at_any_write_leaves_nothing(run, pair, tmp_path, kind, monkeypatch):
    output = tmp_path / "deep" / "out"
    delta.make_delta(pair.base, pair.trained, tmp_path / "delta")
    work = {
        "make": lambda: delta.make_delta(pair.base, pair.trained, output),
        "apply": lambda: delta.apply_delta(pair.base, tmp_path / "delta", output),
        "lora": lambda: export_lora(pair.base, pair.trained, output),
        "export": lambda: export_checkpoint(run / "checkpoints" / "checkpoint-2", output),
    }[kind]
    calls = [0]
    fails_at = [sys.maxsize]

    def counting(original):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] > fails_at[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        return call

    for owner, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (Path, "mkdir")):
        monkeypatch.setattr(owner, name, counting(getattr(owner, name)))
    monkeypatch.setattr(shutil, "copyfile", counting(shutil.copyfile))
    work()
    shutil.rmtree(tmp_path / "deep")
    for at in range(calls[0] - 1):
        calls[0], fails_at[0] = 0, at
        with pytest.raises((OSError, ValueError), match="No space left on device"):
            work()
        assert [path.name for path in tmp_path.iterdir()] == ["delta"], at


def test_two_processes_on_one_output(pair, tmp_path):
    with (
        writing.new_folder(tmp_path / "out"),
        pytest.raises(ValueError, match="another process is writing"),
    ):
        delta.make_delta(pair.base, pair.trained, tmp_path / "out")
    assert not writing.beside_of(tmp_path / "out").exists()


def test_who_is_refused_takes_nothing_away(tmp_path, monkeypatch):
    """Two processes that see the folder absent: the one that comes second leaves it to the first."""
    beside = writing.beside_of(tmp_path / "out")
    exists = Path.exists
    with writing.new_folder(tmp_path / "out") as folder:
        monkeypatch.setattr(Path, "exists", lambda path: path != beside and exists(path))
        with (
            pytest.raises(ValueError, match="another process"),
            writing.new_folder(folder.parent / "out"),
        ):
            pass
        monkeypatch.undo()
        (folder / "new").write_text("")
    assert (tmp_path / "out" / "new").exists()


def test_what_an_unfinished_folder_holds_is_gone(tmp_path):
    beside = writing.beside_of(tmp_path / "out")
    (beside / "deep").mkdir(parents=True)
    (beside / "deep" / "file").write_text("")
    (beside / "link").symlink_to(tmp_path)
    with writing.new_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_that_cannot_be_written_is_told_first(pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(delta, "_compare", lambda *args: pytest.fail("it was compared"))
    (tmp_path / "file").write_text("")
    for output in ("/proc/out", tmp_path / "file" / "out"):
        assert "cannot write" in said(capsys, "delta", "make", pair.base, pair.trained, output)


def test_without_locks_a_warning_says_so(tmp_path, monkeypatch):
    def no_locks(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(writing.fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="is on a file system without locks"):
        with writing.new_folder(tmp_path / "out"):
            pass
    assert (tmp_path / "out").is_dir()


def test_everything_is_on_the_disk_before_a_name_is_given(tmp_path, monkeypatch):
    """A rename may reach the disk before what the file holds."""
    synced, fsync = set(), os.fsync

    def noted(handle):
        synced.add(os.fstat(handle).st_ino)
        return fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    for name in ("rename", "replace"):
        original = getattr(os, name)

        def checked(source, target, original=original):
            paths = [Path(source), *Path(source).rglob("*")] if Path(source).is_dir() else [source]
            assert {os.stat(path).st_ino for path in paths} <= synced, source
            return original(source, target)

        monkeypatch.setattr(os, name, checked)
    with writing.new_folder(tmp_path / "out") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
        writing.write_json(folder / "x.json", {})
    parent = os.stat(tmp_path).st_ino
    assert parent in synced


def test_ctrl_c_leaves_nothing(pair, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(delta, "write_sealed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        delta.make_delta(pair.base, pair.trained, tmp_path / "deep" / "out")
    assert not list(tmp_path.iterdir())
