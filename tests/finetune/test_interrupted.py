"""Ctrl-C says how to go on, and ``--resume --output FOLDER`` is enough to do so."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from losia_kernels import cli
from losia_kernels.checkpoint.checksums import write_sealed
from losia_kernels.checkpoint.folder import MARKER
from losia_kernels.cli import main
from losia_kernels.finetune.folder import read_options, resumed_options
from losia_kernels.finetune.options import InputError
from losia_kernels.finetune.run import finetune
from losia_kernels.integrations.history import read_log
from tests.finetune.tiny_run import STEPS, options
from tests.integrations.tiny_llama import make_tokenizer

ROOT = Path(__file__).parents[2]


def start(folder, model_folder, **changes):
    """A run as a process of its own, whose step ``wait_at`` waits for its end."""
    code = (
        "import signal, sys, time; from pathlib import Path; from transformers import TrainerCallback\n"
        # which a process in the background ignores
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from losia_kernels import cli; from losia_kernels.finetune import run\n"
        "from tests.finetune.tiny_run import options\n"
        "class Wait(TrainerCallback):\n"
        "    def on_step_end(self, args, state, control, **kwargs):\n"
        "        if state.global_step == 6: print('WAITING', flush=True); time.sleep(60)\n"
        "values = vars(options(Path(sys.argv[1]), Path(sys.argv[2])))\n"
        "values['save_steps'] = int(sys.argv[3])\n"
        "cli.COMMANDS['finetune'] = lambda **given: run.finetune(cli.FinetuneOptions(**values), (Wait(),))\n"
        "sys.exit(cli.main(['finetune', '--output', values['output']]))"
    )
    arguments = [str(folder), str(model_folder), str(changes.get("save_steps", 4))]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )


def interrupt(process):
    while "WAITING" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    return process.returncode, said.splitlines()[-1]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, model_folder):
    """A run that Ctrl-C stopped after step 6, with a checkpoint of step 4, and what it said."""
    folder = tmp_path_factory.mktemp("interrupted")
    return folder, *interrupt(start(folder, model_folder))


def test_ctrl_c_says_in_one_line_how_to_go_on(interrupted):
    folder, code, said = interrupted
    assert code == 130
    assert said == (
        f"losia-kernels: interrupted: losia-kernels finetune --resume --output {folder / 'run'} "
        f"goes on from step 4"
    )


def test_the_command_that_it_said_goes_on_to_the_same_bits(
    interrupted, tmp_path, model_folder, capsys, monkeypatch
):
    folder, _, said = interrupted
    whole = finetune(options(tmp_path, model_folder))
    command = said.split("losia-kernels ")[1].split(" goes on")[0].split()
    monkeypatch.chdir(tmp_path)  # the paths in run.json are right from anywhere
    capsys.readouterr()
    assert cli.main(command) == 0
    assert "checkpoint-4" in capsys.readouterr().out
    trained = load_file(folder / "run" / "model" / "model.safetensors")
    for name, weight in load_file(whole / "model.safetensors").items():
        assert weight.equal(trained[name]), name
    assert [e["step"] for e in read_log(folder / "run" / "log.jsonl") if "loss" in e] == list(
        range(1, STEPS + 1)
    )


def test_a_resumed_run_saves_as_often_as_it_is_told(tmp_path, model_folder):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(options(tmp_path, model_folder), (Stop(),))
    finetune(options(tmp_path, model_folder, resume=True, save_steps=5))
    left = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {"checkpoint-10", "checkpoint-14"}  # the last one at the end


def test_ctrl_c_before_a_checkpoint_says_that_it_begins_anew(tmp_path, model_folder):
    code, said = interrupt(start(tmp_path, model_folder, save_steps=0))
    assert code == 130
    assert said.endswith("goes on from the beginning, for there is no checkpoint yet")


def test_a_copy_of_a_checkpoint_is_no_step_to_go_on_from(tmp_path, monkeypatch, capsys):
    for name in ("checkpoint-4", "checkpoint-keep", "checkpoint-8-copy"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / MARKER).write_text("{}")
    (tmp_path / "run.json").write_text("{}")

    def interrupted(**given):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "finetune", interrupted)
    assert cli.main(["finetune", "--resume", "--output", str(tmp_path)]) == 130
    assert "goes on from step 4\n" in capsys.readouterr().err


def test_checkpoints_that_are_gone_are_missed(tmp_path, model_folder, capsys):
    changes = {"steps": 4, "save_steps": 2, "eval_data": None}
    finetune(options(tmp_path, model_folder, **changes))
    for name in ("model", "checkpoints"):
        shutil.rmtree(tmp_path / "run" / name)
    capsys.readouterr()
    finetune(options(tmp_path, model_folder, **changes, resume=True))
    said = capsys.readouterr().out
    assert "no checkpoint of the 4 steps that were taken: starting from the beginning" in said


@pytest.mark.parametrize(
    "command, said",
    [
        (
            ["finetune", "--model", "m", "--data", "d", "--output", "absent"],
            ": nothing was written",
        ),
        (["inspect", "folder"], ""),
    ],
)
def test_ctrl_c_where_there_is_nothing_to_go_on_with(command, said, monkeypatch, capsys):
    def interrupt(**options):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, command[0], interrupt)
    assert cli.main(command) == 130
    line = capsys.readouterr().err
    assert line.startswith(f"losia-kernels: interrupted{said}") and line.count("\n") == 1
    monkeypatch.setenv("RANK", "1")  # of several processes one speaks
    assert cli.main(command) == 130 and capsys.readouterr().err == ""


def test_run_json_holds_every_option(tmp_path, model_folder, monkeypatch):
    first = options(tmp_path, model_folder, print_every=3, save_steps=2)
    monkeypatch.chdir(tmp_path)
    first.data, first.output = "train.jsonl", "run"
    finetune(first)
    run = tmp_path / "run"
    found = read_options(run)
    assert (found.print_every, found.save_steps, found.data) == (
        3,
        2,
        str(tmp_path / "train.jsonl"),
    )
    assert (
        set(vars(found)) - {"output", "resume"} <= json.loads((run / "run.json").read_text()).keys()
    )


def test_the_environment_of_the_file_is_the_runs(tmp_path, model_folder, monkeypatch):
    """And a template by a relative path is found from another folder."""
    for name in ("LOSIA_TEST", "LOSIA_API_TOKEN"):
        monkeypatch.setenv(name, "before")
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    work.mkdir(), elsewhere.mkdir()
    given = options(work, model_folder)
    (work / "t.jinja").write_text(make_tokenizer().chat_template)
    (work / "run.yaml").write_text(
        f"model: {model_folder}\ndata: {given.data}\noutput: run\nsteps: 2\nsave_steps: 1\n"
        "chat_template_path: t.jinja\neos_token: <|end|>\nenv:\n  LOSIA_TEST: 7\n  LOSIA_API_TOKEN: secret\n"
    )
    monkeypatch.chdir(work)
    assert main(["finetune", "--config", "run.yaml"]) == 0
    text = (work / "run" / "run.json").read_text()
    record = json.loads(text)
    assert record["env"] == {"LOSIA_TEST": "7"} and "secret" not in text
    template = str(work / "t.jinja")
    assert record["config"] == {"chat_template_path": template, "eos_token": "<|end|>"}
    shutil.rmtree("run/model")
    monkeypatch.setenv("LOSIA_TEST", "before")
    monkeypatch.chdir(elsewhere)
    assert main(["finetune", "--resume", "--output", str(work / "run")]) == 0
    assert os.environ["LOSIA_TEST"] == "7"
    assert json.loads((work / "run" / "run.json").read_text())["env"] == {"LOSIA_TEST": "7"}


def test_a_resumed_run_has_the_options_of_the_first_but_for_those_given(tmp_path, monkeypatch):
    record = {"model": "m", "data": "d", "lr": 3e-3, "batch_size": 8, "seed": 0, "save_steps": 7}
    write_sealed(tmp_path / "run.json", record)
    given = {"output": str(tmp_path), "resume": True}
    resumed = resumed_options({**given, "print_every": 2})
    assert (resumed.lr, resumed.batch_size, resumed.save_steps) == (3e-3, 8, 7)
    assert (resumed.print_every, resumed.output, resumed.resume) == (2, str(tmp_path), True)
    monkeypatch.setenv("WORLD_SIZE", "4")  # batches of all processes together stay as large
    assert resumed_options(given).batch_size == 2
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="its batches of 8 samples cannot be shared out"):
        resumed_options(given)


def test_left_says_the_truth_from_the_first_line(tmp_path, model_folder, capsys, monkeypatch):
    """Calibration, which comes before the first step, is no measure of the steps to come."""
    from losia_kernels.integrations import aside

    calibrate = aside.calibrate

    def slowly(*arguments, **options):
        time.sleep(2)
        return calibrate(*arguments, **options)

    monkeypatch.setattr(aside, "calibrate", slowly)
    finetune(options(tmp_path, model_folder, print_every=1, save_steps=0, eval_data=None))
    printed = capsys.readouterr()
    first = next(line for line in printed.out.splitlines() if line.startswith("step 1/14"))
    minutes, seconds = first.split("left 0:")[1].split()[0].split(":")
    assert int(minutes) * 60 + int(seconds) < 13  # of 13 steps of milliseconds
    entry = read_log(tmp_path / "run" / "log.jsonl")[0]
    assert entry["seconds"] < 1.5 and entry["tokens_per_second"] > 100
    assert "placing the first subnets: 100%" in printed.err and "4/4" in printed.err


def test_a_run_whose_output_nobody_reads_any_more_says_how_to_go_on(tmp_path):
    """As of ``finetune | tee log`` whose tee was killed."""
    (tmp_path / "run.json").write_text("{}")
    code = (
        "import sys; from losia_kernels import cli\n"
        "cli.COMMANDS['finetune'] = lambda **given: [print('x' * 999, flush=True) for _ in range(999)]\n"
        f"sys.exit(cli.main(['finetune', '--resume', '--output', {str(tmp_path)!r}]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    said = process.stderr.read().decode()
    assert process.wait() == 141 and said.count("\n") == 1, said
    assert "whoever reads the output is gone: losia-kernels finetune --resume" in said
