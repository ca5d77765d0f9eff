"""Who may import whom, how large a file gets, what an import starts, what is documented."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import pytest

import losia_kernels
from losia_kernels.training.timeline import Timeline

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "losia_kernels"

# A folder imports from those before it; a file of the top level is a folder of its own.
ORDER = [
    "config",
    "kernels",
    "ops",
    "parallel",
    "layers",
    "training",
    "checkpoint",
    "__init__",
    "integrations",
    "finetune",
    "cli",
    "__main__",
]


def module_of(parts: list[str]) -> str:
    """The file that a dotted path inside the package names: itself, or the module that holds the
    name."""
    for length in range(len(parts), 0, -1):
        path = "/".join(parts[:length])
        if (PACKAGE / f"{path}.py").exists():
            return path
        if (PACKAGE / path).is_dir():
            return f"{path}/__init__"
    return "__init__"


def imported(file: Path, package: str = "losia_kernels") -> Iterator[str]:
    """Every module of the package that ``file`` imports, inside functions too."""
    here = list(file.relative_to(ROOT).parent.parts)[1:]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == package:
                    yield module_of(alias.name.split(".")[1:])
        elif isinstance(node, ast.ImportFrom):
            source = (node.module or "").split(".") if node.module else []
            if node.level:
                source = here[: len(here) - node.level + 1] + source
            elif source[:1] == [package]:
                source = source[1:]
            else:
                continue
            for alias in node.names:
                yield module_of([*source, alias.name])


def package_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    return str(file.relative_to(PACKAGE).with_suffix(""))


def test_imports_go_strictly_down_between_folders():
    upward = []
    for file in package_files():
        here = name_of(file).partition("/")[0]
        assert here in ORDER, f"losia_kernels/{here} has no place in this test's ORDER"
        for other in imported(file):
            there = other.partition("/")[0]
            if there != here and ORDER.index(there) > ORDER.index(here):
                upward.append(f"{name_of(file)} imports {other}")
    assert not upward


def test_no_circle_inside_a_folder():
    graph = {name_of(file): set(imported(file)) - {name_of(file)} for file in package_files()}
    open_, done = [], set()

    def visit(name: str) -> None:
        assert name not in open_, f"a circle: {' -> '.join([*open_[open_.index(name) :], name])}"
        if name not in done:
            open_.append(name)
            for other in sorted(graph[name]):
                visit(other)
            done.add(open_.pop())

    for name in graph:
        visit(name)


def test_the_reader_of_imports_sees_every_form():
    """What the tests above rest on."""
    assert set(imported(PACKAGE / "ops" / "importance.py")) >= {
        "ops/registry",
        "kernels/importance",
    }
    assert "ops/__init__" in set(imported(PACKAGE / "layers" / "cross_entropy.py"))
    assert set(imported(PACKAGE / "__main__.py")) == {"cli"}
    assert "__init__" in set(imported(PACKAGE / "cli.py"))
    assert set(imported(PACKAGE / "training" / "optimizer.py")) >= {
        "ops/adamw",
        "training/timeline",
        "layers/convert",
    }


def test_contributing_says_the_order():
    sentence = " < ".join(f"`{name}`" for name in ORDER if not name.startswith("__"))
    assert sentence in (ROOT / "CONTRIBUTING.md").read_text().replace("\n", " ")


def top_level_imports(folder: Path) -> set[str]:
    """First components of all absolute imports below ``folder``."""
    found = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
    return found


def test_package_and_oracle_are_independent():
    assert "csrc_ref" not in top_level_imports(PACKAGE)
    assert not {"losia_kernels", "tests", "bench"} & top_level_imports(ROOT / "csrc_ref")
    third_party = top_level_imports(ROOT / "csrc_ref") - sys.stdlib_module_names
    assert third_party <= {"torch", "numpy"}


def test_nothing_in_the_package_imports_tests_or_bench():
    assert not {"tests", "bench", "tiny", "tolerance"} & top_level_imports(PACKAGE)


@pytest.mark.parametrize("folder", ["losia_kernels", "csrc_ref", "tests", "bench", "examples"])
def test_no_file_is_longer_than_400_lines(folder):
    long = {
        str(file.relative_to(ROOT)): count
        for file in (ROOT / folder).rglob("*.py")
        if (count := len(file.read_text().splitlines())) > 400
    }
    assert not long


# What an import starts ----------------------------------------------------------------------------


def run_python(script: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr


def test_import_is_lean():
    run_python("""
import sys, torch
before = set(sys.modules)
import losia_kernels
added = {name.split(".")[0] for name in set(sys.modules) - before}
heavy = added & {"triton", "transformers", "matplotlib", "accelerate", "datasets", "peft", "pandas", "tqdm"}
assert not heavy, heavy
assert "triton" not in sys.modules and "transformers" not in sys.modules
assert not torch.cuda.is_initialized()
""")


def test_import_changes_nothing_in_the_process():
    """The first layer does: writes to subnets are counted from then on."""
    run_python("""
import warnings
import torch
from torch.nn.modules import module
from torch.optim import optimizer

def state():
    hooks = [value for kept in (module, optimizer) for name, value in sorted(vars(kept).items())
             if name.startswith("_global") and "hooks" in name]
    return [list(kept.values()) for kept in hooks], list(warnings.filters), torch.is_grad_enabled()

before = state()
assert len(before[0]) > 5
import losia_kernels
assert state() == before
layer = losia_kernels.LoSiALinear(8, 8)
assert state() != before
""")


def test_it_trains_without_triton_transformers_and_cuda():
    run_python("""
import sys
for name in ("triton", "transformers", "matplotlib", "accelerate", "datasets", "peft"):
    sys.modules[name] = None  # as if not installed: torch itself may look for one, and goes without
import torch
torch.cuda._lazy_init = None  # whoever starts CUDA fails
from torch import nn
from losia_kernels import LoSiAAdamW, LoSiAConfig, apply_losia, calibrate, export_state_dict
model = apply_losia(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), LoSiAConfig(rank_factor=0.5, period=1))
calibrate(model, [torch.ones(2, 8)], loss_fn=lambda model, x: model(x).square().mean())
optimizer = LoSiAAdamW(model, lr=0.1)
for _ in range(3):
    model(torch.randn(2, 8)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
assert list(export_state_dict(model)) == ["0.weight", "0.bias", "1.weight", "1.bias"]
""")


# What is documented -------------------------------------------------------------------------------

PUBLIC = {name: getattr(losia_kernels, name) for name in losia_kernels.__all__} | {
    "Timeline": Timeline
}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring(name):
    public = PUBLIC[name]
    assert public.__doc__ and not public.__doc__.startswith(f"{name}("), (
        "a dataclass writes that one by itself"
    )
    if isinstance(public, type):
        for member, value in vars(public).items():
            if not member.startswith("_") and isinstance(
                value, (FunctionType, classmethod, property)
            ):
                assert inspect.getdoc(getattr(public, member)), f"{name}.{member}"


def test_every_op_has_a_docstring():
    assert all(
        inspect.getdoc(getattr(losia_kernels.ops, name)) for name in losia_kernels.ops.__all__
    )


@pytest.mark.parametrize("file", package_files(), ids=name_of)
def test_every_file_says_what_it_is(file):
    text = file.read_text()
    assert not text.strip() or file.name == "__main__.py" or ast.get_docstring(ast.parse(text))
