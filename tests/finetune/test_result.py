"""``inspect`` and ``export`` of the folder of a run."""

import shutil

import pytest

from losia_kernels import cli
from losia_kernels.checkpoint.folder import MARKER
from losia_kernels.finetune.run import finetune
from tests.checkpoint.trained_pairs import assert_same_model
from tests.finetune.tiny_run import options


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("result")
    finetune(options(folder, model_folder))
    return folder / "run"


@pytest.fixture
def unfinished(run, tmp_path):
    folder = tmp_path / "unfinished"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "model")
    return folder


def said(capsys, *command):
    assert cli.main([str(part) for part in command]) == 0
    return capsys.readouterr().out


def test_a_finished_run_gives_its_model(run, model_folder, tmp_path, capsys):
    printed = said(capsys, "inspect", run)
    assert "finished: step 14, loss " in printed and ", evaluation loss " in printed
    for part in (str(model_folder), "train.jsonl", "rank factor 0.25", f"{run / 'model'}\n\nplain"):
        assert part in printed
    assert f"model of {run / 'model'} in " in said(capsys, "export", run, tmp_path / "plain")
    assert_same_model(tmp_path / "plain", run / "model")
    assert not list(tmp_path.glob("*.tmp"))


def test_inspect_holds_the_model_to_its_checksums(run, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    for what in (folder, folder / "model"):
        assert "all have the checksums that they were written with" in said(capsys, "inspect", what)
    weights = folder / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for what in (folder, folder / "model"):
        printed = said(capsys, "inspect", what)
        assert (
            "damaged         model.safetensors is damaged" in printed and "all have" not in printed
        )
    weights.write_bytes(content[:50])
    assert cli.main(["inspect", str(folder)]) == 2
    assert "model.safetensors has 50 bytes instead of" in capsys.readouterr().err


def test_an_unfinished_run_gives_its_newest_whole_checkpoint(unfinished, tmp_path, capsys):
    newest = unfinished / "checkpoints" / "checkpoint-14"
    printed = said(capsys, "inspect", unfinished)
    assert "not finished: step 14" in printed and f"{newest}\n\nstep            14" in printed
    assert f"model of {newest} in " in said(capsys, "export", unfinished, tmp_path / "plain")
    said(capsys, "export", newest, tmp_path / "same")
    assert_same_model(tmp_path / "plain", tmp_path / "same")
    (newest / MARKER).unlink()  # as if its saving had been interrupted
    assert cli.main(["export", str(unfinished), str(tmp_path / "older")]) == 0
    printed = capsys.readouterr()
    assert f"checkpoint-12 in {tmp_path / 'older'}" in printed.out
    assert "warning: checkpoint-14 in " in printed.err


def test_nothing_else_is_written_where_a_run_puts_its_model(unfinished, capsys):
    """It would count as finished."""
    newest = unfinished / "checkpoints" / "checkpoint-14"
    for command in (["export", unfinished], ["export", newest], ["delta", "apply", "b", "d"]):
        assert cli.main([*map(str, command), str(unfinished / "model")]) == 2
        assert "model is where the run puts its model: name another" in capsys.readouterr().err
    assert not (unfinished / "model").exists()


def test_folders_that_are_nearly_a_model_say_what_they_are(unfinished, tmp_path, capsys):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    (tmp_path / "delta").mkdir()
    (tmp_path / "delta" / "delta.json").write_text("{}")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "pytorch_model-00001-of-00002.bin").write_text("")
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_text("")
    for folder, hint in (
        (unfinished / "checkpoints", "it holds checkpoints: name one of them, or the run"),
        (tmp_path / "lora", "it holds an adapter of PEFT"),
        (tmp_path / "torch", "its weights are torch's: load and save it once"),
        (tmp_path / "dcp", "it is a checkpoint that load_checkpoint reads"),
    ):
        assert cli.main(["inspect", str(folder)]) == 2
        assert hint in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / "delta"), str(tmp_path / "plain")]) == 2
    assert "it is a delta: apply it to its base first" in capsys.readouterr().err


def test_a_run_that_has_come_to_nothing_yet_says_so(unfinished, tmp_path, capsys):
    shutil.rmtree(unfinished / "checkpoints")
    assert "newest result   none yet" in said(capsys, "inspect", unfinished)
    assert cli.main(["export", str(unfinished), str(tmp_path / "plain")]) == 2
    line = capsys.readouterr().err
    assert "has neither a model/ nor a whole checkpoint yet" in line and line.count("\n") == 1
    assert not (tmp_path / "plain").exists()
