"""Run folders with one damaged file, crowded and full ones: what is damaged is named, the newest good
state is used, nothing is removed that was not replaced."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from losia_kernels import cli
from losia_kernels.checkpoint.checksums import all_files, checksums, read_sealed, write_sealed
from losia_kernels.checkpoint.folder import MARKER
from losia_kernels.checkpoint.writing import locked
from losia_kernels.finetune import run as finetune_run
from losia_kernels.finetune.checkpoints import find_checkpoints
from losia_kernels.finetune.folder import write_failure
from losia_kernels.finetune.options import InputError
from losia_kernels.finetune.run import finetune
from tests.checkpoint.damages import DAMAGES
from tests.checkpoint.trained_pairs import assert_same_model
from tests.finetune.doomed_process import SAVE_STEPS, STEPS
from tests.finetune.killed_runs import Killed, Runs
from tests.finetune.tiny_run import options
from tests.integrations.tiny_llama import make_tokenizer


def run_options(folder: Path, model: Path, **changes):
    values = dict(steps=STEPS, save_steps=SAVE_STEPS, period=2, eval_data=None)
    return options(folder, model, gradient_accumulation=1, **{**values, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("whole")
    finetune(run_options(folder, model_folder))
    return folder / "run"


@pytest.fixture
def run(whole, tmp_path):
    """A run of which only the model was not written, in checkpoints 4 and 6."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    return tmp_path / "run"


def remark(checkpoint: Path) -> None:
    """A marker whose checksums fit what is there now."""
    files = [name for name in all_files(checkpoint) if name != MARKER]
    record = {**read_sealed(checkpoint / MARKER, {}), "files": checksums(checkpoint, files)}
    write_sealed(checkpoint / MARKER, record)


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in all_files(folder)}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damaged_file_of_a_checkpoint_is_named_and_the_one_before_used(run, damage):
    checkpoints = run / "checkpoints"
    for name in all_files(checkpoints / "checkpoint-6"):
        path = checkpoints / "checkpoint-6" / name
        content = path.read_bytes()
        DAMAGES[damage](path)
        found = find_checkpoints(checkpoints, reached=7)
        assert found.last == checkpoints / "checkpoint-4", name
        assert found.unfinished == []
        assert list(found.damaged) == [checkpoints / "checkpoint-6"]
        assert path.name in found.damaged[checkpoints / "checkpoint-6"], name
        path.write_bytes(content)
    assert find_checkpoints(checkpoints).last == checkpoints / "checkpoint-6"


@pytest.mark.parametrize(
    ("name", "damage"), [("model.safetensors", "flip"), ("optimizer.pt", "zeros"), (MARKER, "cut")]
)
def test_a_run_goes_on_from_the_checkpoint_before(
    run, whole, tmp_path, model_folder, capsys, name, damage
):
    DAMAGES[damage](run / "checkpoints" / "checkpoint-6" / name)
    damaged = files_of(run / "checkpoints" / "checkpoint-6")
    finetune(run_options(tmp_path, model_folder, resume=True))
    printed = capsys.readouterr().out
    assert "checkpoint-6 does not count and will be set aside: " in printed and name in printed
    assert f"resuming from {run / 'checkpoints' / 'checkpoint-4'}\n" in printed
    assert_same_model(run / "model", whole / "model")
    assert files_of(run / "checkpoints" / "damaged-checkpoint-6") == damaged
    assert find_checkpoints(run / "checkpoints").last.name == "checkpoint-6"


def test_without_a_good_checkpoint_nothing_is_removed(run, tmp_path, model_folder):
    for path in (run / "checkpoints").iterdir():
        with open(path / "config.json", "a") as file:
            file.write(" ")
    before = files_of(run)
    with pytest.raises(
        InputError,
        match=r"no checkpoint is whole: checkpoint-6: config.json has .*; checkpoint-4: ",
    ):
        finetune(run_options(tmp_path, model_folder, resume=True))
    assert files_of(run) == before


def test_what_fits_its_checksums_and_does_not_load_stops_the_run(run, tmp_path, model_folder):
    checkpoint = run / "checkpoints" / "checkpoint-6"
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    remark(checkpoint)
    (run / "checkpoints" / "checkpoint-2").mkdir()  # a removal that was interrupted
    before = files_of(run / "checkpoints")
    with pytest.raises(
        InputError, match=r"cannot go on from .*checkpoint-6: .*nothing was changed"
    ):
        finetune(run_options(tmp_path, model_folder, resume=True))
    assert files_of(run / "checkpoints") == before
    assert (run / "checkpoints" / "checkpoint-2").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_of_a_finished_run_is_named(whole, tmp_path, model_folder, damage):
    shutil.copytree(whole, tmp_path / "run")
    for name in all_files(tmp_path / "run" / "model"):
        path = tmp_path / "run" / "model" / name
        content = path.read_bytes()
        DAMAGES[damage](path)
        with pytest.raises(InputError, match=f"{name} .*move model away"):
            finetune(run_options(tmp_path, model_folder, resume=True))
        path.write_bytes(content)
    finetune(run_options(tmp_path, model_folder, resume=True))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_json_is_named(run, tmp_path, model_folder, damage):
    DAMAGES[damage](run / "run.json")
    with pytest.raises(InputError, match="run.json"):
        finetune(run_options(tmp_path, model_folder, resume=True))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["log.jsonl", "subnets.jsonl"])
def test_damaged_records_do_not_keep_a_run_from_going_on(
    run, whole, tmp_path, model_folder, capsys, damage, name
):
    DAMAGES[damage](run / name)
    damaged = (run / name).read_bytes() if (run / name).exists() else None
    finetune(run_options(tmp_path, model_folder, resume=True))
    assert_same_model(run / "model", whole / "model")
    if damage in ("zeros", "shape"):
        assert (run / f"damaged-{name}").read_bytes() == damaged
    if damage in ("missing", "empty", "zeros", "shape") and name == "subnets.jsonl":
        capsys.readouterr()
        assert cli.main(["plot", str(run), "--only", "frequency"]) == 2
        assert "subnets.jsonl is damaged" in capsys.readouterr().err


# two processes -------------------------------------------------------------------------------------


def test_a_second_process_is_told_in_one_line(run, tmp_path, model_folder, capsys):
    code = (
        "import sys; from pathlib import Path; from losia_kernels.checkpoint.writing import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert other.stdout.readline() == b"held\n"
    before = files_of(run)
    with pytest.raises(InputError, match="another process is writing .*run: wait until it is done"):
        finetune(run_options(tmp_path, model_folder, resume=True))
    assert files_of(run) == before
    other.send_signal(signal.SIGKILL)
    other.wait()
    finetune(run_options(tmp_path, model_folder, resume=True))
    assert (run / "model").exists()


def test_a_new_output_is_held_before_anything_is_in_it(tmp_path, model_folder):
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"), pytest.raises(InputError, match="another process is writing"):
        finetune(run_options(tmp_path, model_folder))
    assert not any((tmp_path / "run").iterdir())


def test_an_output_that_is_a_link_to_a_folder(tmp_path, model_folder):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    finetune(run_options(tmp_path, model_folder, steps=2))
    assert (tmp_path / "disk" / "model").exists()


# what decides the bits -----------------------------------------------------------------------------


def test_the_same_tokens_by_other_paths_go_on(run, whole, tmp_path, model_folder, monkeypatch):
    (tmp_path / "link").symlink_to(model_folder)
    monkeypatch.chdir(tmp_path)
    given = run_options(tmp_path, Path("link"), resume=True, data="./train.jsonl")
    shutil.copy("train.jsonl", "copy.jsonl")
    for data in ("./train.jsonl", "copy.jsonl"):
        given.data = data
        finetune(given)
        card = (run / "model" / "README.md").read_text()
        assert (
            f"| data | {Path(data).name} |" in card and f"\n{model_folder.name}, fine-tuned" in card
        )
        shutil.copy(whole / "model" / "README.md", run / "model")
        assert_same_model(run / "model", whole / "model")
        shutil.rmtree(run / "model")


def test_another_chat_template_is_told(tmp_path, model_folder):
    model = tmp_path / "base"
    shutil.copytree(model_folder, model)
    data = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data.write_text(json.dumps({"messages": messages}) + "\n")
    given = dict(data=str(data), steps=1, save_steps=1, batch_size=1, group_by_length=False)
    finetune(run_options(tmp_path, model, **given))
    shutil.rmtree(tmp_path / "run" / "model")
    path = next(path for path in model.glob("chat_template*"))
    path.write_text(path.read_text().replace("\n{% endfor %}", "\n\n{% endfor %}", 1) + "{# x #}")
    path.write_text(path.read_text().replace("<|end|>", "<|end|>!"))
    with pytest.raises(InputError, match="no longer becomes the tokens that it was begun with"):
        finetune(run_options(tmp_path, model, resume=True, **given))
    with pytest.raises(InputError, match="seed was 0, now 1"):
        finetune(run_options(tmp_path, model, resume=True, seed=1, **given))


def test_other_versions_are_said(run, tmp_path, model_folder):
    record = read_sealed(run / "run.json", {})
    record["versions"]["torch"] = "1.0"
    write_sealed(run / "run.json", record)
    with pytest.warns(
        UserWarning, match="was begun with torch 1.0, now .*: what follows may differ"
    ):
        finetune(run_options(tmp_path, model_folder, resume=True))


# full disks, places that cannot be written ---------------------------------------------------------


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(tmp_path, model_folder):
    runs = Runs()
    killed = Killed(runs, tmp_path, model_folder)
    for number in range(0, killed.events, killed.events // 6):
        folder = tmp_path / f"full-{number}"
        folder.mkdir()
        assert runs.run(folder, model_folder, f"full {number}") == 2, number
        said = (folder / "refused.txt").read_text()
        assert "No space left on device" in said and "\n" not in said, said
        started = (folder / "run" / "run.json").exists()
        assert started or not list((folder).glob("run/*")), number
        assert ("--resume goes on" in said) == started, said
        for checkpoint in folder.glob("run/checkpoints/*"):
            assert (checkpoint / MARKER).exists(), (number, checkpoint)
        assert runs.run(folder, model_folder, "", started) == 0
        killed.hold(folder / "run")
    runs.close()


def test_weights_that_do_not_fit_the_disk(tmp_path, model_folder, whole):
    """Of a library's own writer: files may be no larger than that."""
    size = (whole / "checkpoints" / "checkpoint-6" / "model.safetensors").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        with pytest.raises(InputError, match="cannot write .*--resume goes on"):
            finetune(run_options(tmp_path, model_folder))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
    finetune(run_options(tmp_path, model_folder, resume=True))
    assert_same_model(tmp_path / "run" / "model", whole / "model")


def test_what_torch_says_of_a_full_disk_is_known():
    with pytest.raises(Exception) as caught:  # noqa: B017
        torch.save({"x": torch.zeros(10**6)}, "/dev/full")
    assert write_failure(caught.value)
    assert write_failure(OSError(28, "No space left on device")) == "No space left on device"
    assert write_failure(OSError(2, "No such file")) is None
    assert write_failure(RuntimeError("size mismatch")) is None


def test_what_tokenizers_say_of_a_full_disk_is_known():
    tokenizer = make_tokenizer().backend_tokenizer
    for path, said in (("/dev/full", "No space left on device"), ("/none/tokenizer.json", None)):
        with pytest.raises(Exception) as caught:  # noqa: B017
            tokenizer.save(path)
        assert write_failure(caught.value) == said


@pytest.mark.parametrize("output", ["/proc/run", "file/run", "denied/run"])
def test_an_output_that_cannot_be_written_is_told_before_the_model_is_loaded(
    tmp_path, model_folder, monkeypatch, output
):
    (tmp_path / "file").write_text("")
    (tmp_path / "denied").mkdir()
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: "denied" not in str(path) and access(path, mode)
    )
    monkeypatch.setattr(finetune_run, "load_model", lambda options: pytest.fail("it was loaded"))
    with pytest.raises(InputError, match="cannot write .*run: "):
        finetune(run_options(tmp_path, model_folder, output=str(tmp_path / output)))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"denied", "eval.jsonl", "file", "train.jsonl"}
    assert not list((tmp_path / "denied").iterdir())


# models and folders that are something else --------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "pointer of Git LFS",
        ),
        (None, "model.safetensors cannot be read as safetensors"),
        (b"", "model.safetensors cannot be read as safetensors"),
        (b"\0" * 5000, "model.safetensors cannot be read as safetensors"),
    ],
)
def test_weights_that_are_none(tmp_path, model_folder, content, problem):
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100] if content is None else content)
    with pytest.raises(InputError, match=problem):
        finetune(run_options(tmp_path, base))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"version https://git-lfs", b"PK\x03\x04"])
def test_weights_of_torch_that_are_none(tmp_path, model_folder, content):
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(InputError, match="cannot load the model"):
        finetune(run_options(tmp_path, base))
    assert not (tmp_path / "run").exists()


def test_links_in_a_run_are_not_written_through(run, tmp_path, model_folder):
    (tmp_path / "precious").write_text("precious")
    for name in ("log.jsonl", "run.json.tmp", "checkpoints/checkpoint-8"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(tmp_path / "precious")
        with pytest.raises(InputError, match=f"{name} is a link"):
            finetune(run_options(tmp_path, model_folder, resume=True))
        (run / name).unlink()
    assert (tmp_path / "precious").read_text() == "precious"


def test_shards_that_would_run_code_are_no_checkpoint(run, tmp_path, model_folder):
    """With checksums that fit; torch's reader would unpickle them."""
    checkpoint = run / "checkpoints" / "checkpoint-6"
    (checkpoint / "optimizer_0").mkdir()
    payload = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    (checkpoint / "optimizer_0" / ".metadata").write_bytes(payload)
    remark(checkpoint)
    found = find_checkpoints(run / "checkpoints")
    assert found.last.name == "checkpoint-4"
    assert ".metadata is damaged, or no checkpoint's" in found.damaged[checkpoint]
    finetune(run_options(tmp_path, model_folder, resume=True))
    assert not (tmp_path / "ran").exists()


# Ctrl-C --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["load_model", "load_data", "convert_model"])
def test_ctrl_c_before_the_first_step_leaves_nothing(tmp_path, model_folder, monkeypatch, moment):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune_run, moment, interrupt)
    with pytest.raises(KeyboardInterrupt):
        finetune(run_options(tmp_path, model_folder, output=str(tmp_path / "deep" / "run")))
    assert not (tmp_path / "deep").exists()
