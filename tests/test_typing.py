"""The public names are annotated in full, and mypy agrees with the package and with a user's
file."""

import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {
    "losia_kernels": (),
    "losia_kernels.ops": (),
    "losia_kernels.training.timeline": ("Timeline",),
    "losia_kernels.checkpoint": ("save_checkpoint", "load_checkpoint", "full_state_dict"),
    "losia_kernels.checkpoint.delta": (
        "make_delta",
        "verify_delta",
        "apply_delta",
        "subtract_delta",
        "describe_delta",
    ),
    "losia_kernels.checkpoint.lora": ("export_lora", "describe_lora"),
    "losia_kernels.checkpoint.export": ("export_checkpoint", "describe_checkpoint"),
    "losia_kernels.finetune.estimate": ("estimate",),
    "losia_kernels.finetune.fit": ("describe_fit",),
}


def public_functions(module: str, names: tuple[str, ...]) -> Iterator[tuple[str, FunctionType]]:
    namespace = importlib.import_module(module)
    for name in names or namespace.__all__:
        public = getattr(namespace, name)
        members = vars(public).items() if isinstance(public, type) else [("", public)]
        for member, value in members:
            value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if isinstance(value, FunctionType) and (
                not member.startswith("_") or member == "__init__"
            ):
                yield f"{name}.{member}".rstrip("."), inspect.unwrap(value)


@pytest.mark.parametrize("module", MODULES)
def test_public_functions_are_annotated_in_full(module):
    found = dict(public_functions(module, MODULES[module]))
    assert found
    for name, function in found.items():
        signature = inspect.signature(function)
        bare = [
            each.name for each in signature.parameters.values() if each.annotation is each.empty
        ]
        assert not set(bare) - {"self", "cls"}, f"{module}: {name} leaves {bare} without a type"
        assert name.endswith(".__init__") or signature.return_annotation is not signature.empty, (
            f"{module}: {name}"
        )


@pytest.mark.slow
def test_mypy_agrees():
    """With the configuration of pyproject.toml, which says what it leaves out."""
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy"]  # its cache is warm where make lint ran before
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
