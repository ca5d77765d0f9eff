"""Mistakes are said in one line with exit code 2; what help and subcommands say."""

import ast
import io
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from losia_kernels import NonFiniteScoreError, cli
from losia_kernels.checkpoint.folder import MARKER

for library in ("transformers", "accelerate", "matplotlib", "psutil"):
    pytest.importorskip(library)
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    from tests.integrations.tiny_llama import make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("tiny-llama")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys):
    def run(*arguments):
        with warnings.catch_warnings():  # and what main sets for a whole process
            warnings.filterwarnings("ignore", category=DeprecationWarning)  # as Python does
            try:
                code = cli.main([str(argument) for argument in arguments])
            except SystemExit as exit:  # argparse's way
                code = exit.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    return path


def check_mistake(result, problem):
    code, out, err = result
    assert code == 2, err
    assert err.count("\n") == 1 and err.startswith("losia-kernels") and problem in err, err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "COMMAND"),
        (["finetune"], "finetune needs --model, --data, --output"),
        (["finetune", "--resume"], "finetune needs --output"),
        (["tune"], "invalid choice: 'tune'"),
        (
            ["finetune", "--rank-factor", "1/0"],
            "expected a number or a fraction such as 1/8, got '1/0'",
        ),
        (["finetune", "--rank-factor", "1e400"], "expected a number or a fraction such as 1/8"),
        (
            ["finetune", "--period", "often"],
            "--period: expected a number of steps or 'auto', got 'often'",
        ),
        (["finetune", "--modle", "x"], "--modle x; did you mean --model?"),
        (["finetune", "--steps", "many"], "--steps: invalid int value: 'many'"),
        (["finetune", "--packing", "--group-by-length"], "not allowed with argument --packing"),
        (["finetune", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_bad_arguments(run, arguments, problem):
    check_mistake(run(*arguments), problem)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--rank-factor", "2"], "rank_factor must be a number in (0, 1], got 2.0"),
        (["--rank-factor", "0.01"], "rank_factor 0.01 is too small"),
        (["--output-dim-factor", "1.5"], "output_dim_factor must be a number in [0, 1]"),
        (["--period", "0"], "period must be a whole number of steps, at least 1, or 'auto', got 0"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--lr", "-1"], "lr must be positive"),
        (["--lr", "nan"], "lr must be positive"),
        (["--weight-decay", "-0.1"], "weight_decay must be at least 0, got -0.1"),
        (["--warmup-ratio", "1"], "warmup_ratio must be in [0, 1)"),
        (["--epochs", "0"], "epochs must be positive"),
        (["--epochs", "inf"], "epochs must be positive, got inf"),
        (["--epochs", "nan"], "epochs must be positive, got nan"),
        (["--lr", "inf"], "lr must be positive, got inf"),
        (["--weight-decay", "inf"], "weight_decay must be at least 0, got inf"),
        (["--max-grad-norm", "-1"], "max_grad_norm must be at least 0, got -1.0"),
        (["--max-grad-norm", "nan"], "max_grad_norm must be at least 0, got nan"),
        (["--warmup-ratio", "nan"], "warmup_ratio must be in [0, 1), got nan"),
        (["--seed", "-1"], "seed must be in [0, 2**32), got -1"),
        (["--seed", "4294967296"], "seed must be in [0, 2**32), got 4294967296"),
        (["--alignment", "0"], "alignment must be at least 1"),
        (
            ["--in-backward"],
            "in_backward keeps no gradients: it needs gradient_accumulation 1 and max_grad_norm 0",
        ),
        (
            ["--master", "split", "--dtype", "float32"],
            "master split completes bfloat16 weights",
        ),
        (["--save-steps", "-1"], "save_steps must be at least 0"),
        (["--max-length", "1"], "no sample has anything left to learn"),
        (["--eval-data", "absent.jsonl"], "cannot read absent.jsonl"),
    ],
)
def test_bad_values(run, data, model_folder, tmp_path, options, problem):
    result = run(
        "finetune", "--model", model_folder, "--data", data, "--output", tmp_path / "out", *options
    )
    check_mistake(result, problem)


def test_a_missing_and_a_wrong_model_folder(run, data, tmp_path, model_folder):
    ignored = shutil.ignore_patterns("tokenizer*")
    model_folder = shutil.copytree(model_folder, tmp_path / "model", ignore=ignored)
    absent, empty, finished, checkpoint = (
        tmp_path / name for name in ("absent", "empty", "finished", "checkpoint")
    )
    for folder in (empty, finished / "model", checkpoint):
        folder.mkdir(parents=True)
    for file in (
        finished / "model" / "config.json",
        checkpoint / "config.json",
        checkpoint / MARKER,
    ):
        file.write_text("{}")
    for folder, problem in (
        (absent, f"no model folder {absent}"),
        (data, f"no model folder {data}"),
        (empty, f"{empty} is no model folder: it has no config.json"),
        (model_folder, f"{model_folder} has no tokenizer: save it there too"),
        (finished, f"it has no config.json; there is one in {finished / 'model'}"),
        (
            checkpoint,
            "is a checkpoint of a LoSiA run: --resume goes on with the run, losia-kernels export makes a",
        ),
        ("", "model is empty"),
    ):
        result = run("finetune", "--model", folder, "--data", data, "--output", tmp_path / "out")
        check_mistake(result, problem)


def test_a_name_that_is_neither_here_nor_on_the_hub(run, data, tmp_path, monkeypatch):
    def no_hub(name):
        raise OSError("no connection\nand more")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", no_hub)
    result = run(
        "finetune", "--model", "someone/model", "--data", data, "--output", tmp_path / "out"
    )
    check_mistake(
        result,
        "cannot load the model someone/model from the hub (there is no such folder): no connection",
    )


def test_values_are_looked_at_before_the_imports_that_take_seconds(
    run, data, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "losia_kernels.finetune.run", None)
    for option, problem in (
        (("--rank-factor", "2"), "rank_factor must be"),
        (("--lr", "0"), "lr must be positive"),
    ):
        check_mistake(
            run("finetune", "--model", "m", "--data", data, "--output", tmp_path / "out", *option),
            problem,
        )


@pytest.mark.parametrize("option", ["--data", "--eval-data"])
def test_a_malformed_line_is_named_with_its_file_before_the_model_is_loaded(
    run, data, tmp_path, option
):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text": \n')
    absent = tmp_path / "absent"
    result = run(
        "finetune", "--model", absent, "--data", data, "--output", tmp_path / "out", option, bad
    )
    check_mistake(result, f"{bad}:2: not valid JSON")


def test_an_output_that_is_not_empty_is_left_alone(run, data, model_folder, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("mine")
    result = run("finetune", "--model", model_folder, "--data", data, "--output", output)
    check_mistake(result, "exists and is not empty")
    assert [path.name for path in output.iterdir()] == ["precious"]


def test_a_mistake_leaves_no_output_behind(run, data, tmp_path):
    run("finetune", "--model", tmp_path / "absent", "--data", data, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_to_resume(run, data, model_folder, tmp_path):
    result = run(
        "finetune",
        "--model",
        model_folder,
        "--data",
        data,
        "--output",
        tmp_path / "out",
        "--resume",
    )
    check_mistake(result, "nothing to resume")


def test_a_folder_that_is_no_losia_checkpoint(run, model_folder, tmp_path):
    for folder, problem in (
        (tmp_path, "is no model folder"),
        (tmp_path / "absent", "is no folder"),
    ):
        check_mistake(run("inspect", folder), problem)
        check_mistake(run("export", folder, tmp_path / "out"), problem)
    check_mistake(run("export", model_folder, tmp_path / "out"), "holds no LoSiA subnets")
    assert [path.name for path in tmp_path.iterdir()] == []
    code, out, err = run("inspect", model_folder)
    assert (code, err) == (0, "") and "no subnets; 20 tensors, float32, 0.10 MB" in out


@pytest.mark.parametrize("error", [FloatingPointError, NonFiniteScoreError])
def test_training_that_breaks_off_exits_with_1_and_one_line(run, monkeypatch, error):
    def break_off(**options):
        raise error("the loss is nan at step 3")

    monkeypatch.setitem(cli.COMMANDS, "inspect", break_off)
    assert run("inspect", "x") == (1, "", "losia-kernels: the loss is nan at step 3\n")


def test_help_says_defaults_and_units_and_needs_no_transformers():
    blocked = (
        "import sys; sys.modules['transformers'] = None\n"
        "from losia_kernels.cli import main; main(['finetune', '--help'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", blocked], capture_output=True, text=True, env={"COLUMNS": "200"}
    )
    assert result.returncode == 0, result.stderr
    for text in (
        "--rank-factor P",
        "(default: 0.15)",
        "--period STEPS",
        "--max-length TOKENS",
        "(default: 2048)",
        "(default: 0.0)",
        "run.json",
    ):
        assert text in result.stdout


def test_the_help_keeps_names_of_options_whole(monkeypatch, run):
    for width in range(40, 90, 7):
        monkeypatch.setenv("COLUMNS", str(width))
        said = run("finetune", "--help")[1] + run("plot", "--help")[1]
        assert not re.search(r"[a-z]-$", said, re.MULTILINE)
    for part in (
        "subnets: which neurons are trained",
        "the model before training, for the last two",
    ):
        assert part in " ".join(said.split())


def test_beyond_the_package_it_imports_the_standard_library_alone():
    """What a command needs it imports when it runs."""
    code = (
        "import sys, losia_kernels; before = set(sys.modules); import losia_kernels.cli\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    added = {name for name in result.stdout.split() if "losia" in name}
    assert added == {
        "losia_kernels.cli",
        "losia_kernels.finetune",
        "losia_kernels.finetune.declare",
        "losia_kernels.finetune.left",
        "losia_kernels.finetune.options",
    }
    others = {name.partition(".")[0] for name in result.stdout.split()} - {"losia_kernels"}
    assert others <= sys.stdlib_module_names, result.stderr


INSTALL = "in a checkout of losia_kernels: pip install -e '.[finetune]'"


def finetune_after(code, *path):
    """What ``finetune`` says on stderr after some code, in a process with another ``path``."""
    whole = (
        f"import sys; sys.path[:0] = sys.argv[1:]\n{code}\nfrom losia_kernels.cli import main\n"
        "sys.exit(main(['finetune', '--model', 'm', '--data', 'd', '--output', 'o']))"
    )
    command = [sys.executable, "-c", whole, *map(str, path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    return result.stderr


@pytest.mark.parametrize("name", ["transformers", "accelerate", "matplotlib", "psutil"])
def test_what_is_missing_is_named_with_what_installs_it(name):
    said = finetune_after(f"sys.modules[{name!r}] = None")
    needs = f"losia-kernels: finetune needs {name}, which is not installed; {INSTALL}\n"
    assert said.endswith(needs)


def test_what_is_broken_is_named_with_what_installs_it(tmp_path):
    (tmp_path / "accelerate.py").write_text("raise ImportError('libnope.so: cannot open')")
    said = finetune_after("", tmp_path)
    assert said.endswith(
        "losia-kernels: finetune cannot import accelerate, broken or of another version "
        f"(libnope.so: cannot open); {INSTALL}\n"
    )


def test_the_first_cause_of_an_import_that_failed_is_named(run, monkeypatch):
    """transformers imports late, and says only that it could not import."""

    def import_late(**options):
        try:
            raise RuntimeError("operator torchvision::nms does not exist\nand more")
        except RuntimeError as error:
            raise ModuleNotFoundError("Could not import module 'Trainer'") from error

    monkeypatch.setitem(cli.COMMANDS, "inspect", import_late)
    check_mistake(run("inspect", "x"), "(operator torchvision::nms does not exist)")


def test_the_extra_brings_all_that_the_command_imports():
    tomllib = pytest.importorskip("tomllib", reason="of Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    brought = [*project["dependencies"], "losia-kernels[finetune]"]
    for line in brought:  # an extra brings those that it names
        named = re.fullmatch(r"losia-kernels\[([\w,]+)\]", line)
        brought += [each for name in named[1].split(",") for each in extras[name]] if named else []
    modules = {"pyyaml": "yaml"}  # whose names are not their packages'
    packages = {re.match(r"[\w-]+", line)[0] for line in brought}
    known = {modules.get(name, name) for name in packages} | set(sys.stdlib_module_names)
    package = ROOT / "losia_kernels"
    files = [package / "cli.py", *(package / "integrations").glob("*.py")]
    files += [path for name in ("finetune", "checkpoint") for path in (package / name).glob("*.py")]
    imported = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            imported |= {name.partition(".")[0]: file.name for name in names}
    assert {"transformers", "matplotlib"} <= imported.keys()
    assert not imported.keys() - known - {"huggingface_hub"}, imported  # which transformers brings


def test_a_reader_that_has_seen_enough_is_no_mistake(model_folder):
    """``losia-kernels inspect FOLDER | head -0``"""
    command = [sys.executable, "-m", "losia_kernels", "inspect", model_folder]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141


def test_no_word_that_is_printed_ends_a_command(tmp_path, monkeypatch):
    """A terminal of another encoding, and none at all."""
    written = io.BytesIO()
    monkeypatch.setitem(cli.COMMANDS, "inspect", lambda folder: print(folder))
    for stream in (io.TextIOWrapper(written, encoding="ascii"), None):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        assert cli.main(["inspect", "é"]) == 0
    assert written.getvalue() == rb"\xe9" + b"\n"
