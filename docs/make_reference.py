"""Write docs/reference.md from the docstrings, the signatures and the command line's parser: ``make
docs``.

Needs the extras ``hf`` and ``peft``, whose adapters it imports.
"""

import argparse
import ast
import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from types import FunctionType, ModuleType

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reference.md"
SECTIONS = ("Args:", "Attributes:", "Returns:", "Raises:")
ENTRY = re.compile(r"(\w[\w, ]*): (.*)")

# The modules in reading order; the names are those of ``__all__`` where the module has one.
MODULES: dict[str, tuple[str, ...]] = {
    "losia_kernels": (),
    "losia_kernels.checkpoint": ("save_checkpoint", "load_checkpoint", "full_state_dict"),
    "losia_kernels.checkpoint.delta": (
        "make_delta",
        "verify_delta",
        "apply_delta",
        "subtract_delta",
    ),
    "losia_kernels.checkpoint.lora": ("export_lora",),
    "losia_kernels.checkpoint.export": ("export_checkpoint",),
    "losia_kernels.integrations.transformers": (
        "LoSiAOptimizerFactory",
        "LoSiACallback",
        "losia_timeline",
    ),
    "losia_kernels.integrations.peft": (),
    "losia_kernels.finetune.run": ("finetune",),
    "losia_kernels.finetune.options": ("FinetuneOptions",),
    "losia_kernels.ops": (),
}


def reference() -> str:
    """The whole page."""
    modules = {importlib.import_module(name): names for name, names in MODULES.items()}
    sections = [line for module, names in modules.items() for line in module_section(module, names)]
    head = [
        "# Reference",
        "",
        "Made by `make docs` from the docstrings; see the [tutorial](tutorial.md) for how the "
        "pieces go together. Order is always (out, in).",
        "",
    ]
    return "\n".join([*head, *sections, *command_line()]).rstrip() + "\n"


def module_section(module: ModuleType, names: tuple[str, ...]) -> Iterator[str]:
    yield from (f"## `{module.__name__}`", "", *markdown(module.__doc__))
    for name in names or module.__all__:
        public = getattr(module, name)
        yield from (
            f"### `{name}`",
            "",
            *signature(name, public),
            *markdown(inspect.getdoc(public)),
        )
        if isinstance(public, type):
            for member, value in members(public).items():
                yield from member_section(public, member, value)


def members(public: type) -> dict[str, object]:
    """What a class has from this package: its own first, then its bases'."""
    found: dict[str, object] = {}
    for owner in public.__mro__:
        if owner.__module__.startswith("losia_kernels"):
            found = {**found, **{k: v for k, v in vars(owner).items() if k not in found}}
    return found


def member_section(owner: type, name: str, value: object) -> Iterator[str]:
    """A method or property that says something of itself."""
    text = getattr(value, "__doc__", None)
    if (
        name.startswith("_")
        or not text
        or not isinstance(value, (FunctionType, classmethod, staticmethod, property))
    ):
        return
    yield from (f"#### `{owner.__name__}.{name}`", "")
    if not isinstance(value, property):
        yield from signature(name, getattr(owner, name))
    yield from markdown(inspect.cleandoc(text))


def signature(name: str, public: object) -> Iterator[str]:
    """``name(parameters) -> result`` in a fence, one parameter a line where they are many."""
    if isinstance(public, type) and issubclass(public, Exception):
        return
    found = inspect.signature(public)
    result = (
        ""
        if found.return_annotation is found.empty
        else " -> " + short(str(found).rpartition(" -> ")[2])
    )
    parameters: list[str] = []
    for each in found.parameters.values():
        if each.kind is each.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        if each.name != "self":
            parameters.append(short(str(each)))
    line = f"{name}({', '.join(parameters)}){result}"
    if len(line) > 100:
        line = "\n".join([f"{name}(", *(f"    {each}," for each in parameters), f"){result}"])
    yield from ("```python", line, "```", "")


def short(annotation: str) -> str:
    """``torch.nn.modules.module.Module`` -> ``Module``; a function as default -> its name; a
    factory -> ``...``."""
    annotation = re.sub(r"\b(?:\w+\.)+(?=[A-Z])", "", annotation).replace("'", '"')
    return re.sub(r"<function (\w+) at \w+>", r"\1", annotation).replace("<factory>", "...")


def markdown(docstring: str | None) -> Iterator[str]:
    """A docstring as Markdown: a section gets a bold name, ``name: meaning`` in an indented block
    becomes a list, other indented lines are code."""
    for paragraph in re.split(r"\n\s*\n", docstring or ""):
        section = ""
        for indented, group in groupby(paragraph.replace("``", "`").splitlines(), is_indented):
            lines = [line.removeprefix("    ") for line in group]
            if not indented:
                section = lines[0].removesuffix(":") if lines[0] in SECTIONS else section or "text"
                yield from [f"**{section}**"] if lines[0] in SECTIONS else lines
            elif section == "Returns":
                yield from lines
            elif section and ENTRY.match(lines[0]):
                yield from map(entry, lines)
            else:
                yield from (f"```{language(lines)}", *lines, "```")
            if lines:
                yield ""


def is_indented(line: str) -> bool:
    return line.startswith("    ")


def entry(line: str) -> str:
    """A line of a list: the first of an entry, or one that goes on."""
    found = ENTRY.match(line)
    return f"- **{found[1]}**: {found[2]}" if found else f"  {line.strip()}"


def language(code: list[str]) -> str:
    """Of a fence: Python if it is, else none."""
    try:
        ast.parse("\n".join(code))
    except SyntaxError:
        return ""
    return "python"


def command_line() -> Iterator[str]:
    from losia_kernels.cli import command_parser

    yield from (
        "## Command line",
        "",
        "`losia-kernels COMMAND ...` or `python -m losia_kernels COMMAND ...`.",
        "",
    )
    yield from commands(command_parser())


def commands(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Each command below ``parser``: what it is for, then a table of its arguments."""
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        said = {each.dest: each.help or "" for each in action._choices_actions}
        for name, command in action.choices.items():
            text = said[name][:1].upper() + said[name][1:] + "."
            if command.description:
                text += f" {command.description}"
            yield from (f"### `{command.prog}`", "", text, "")
            yield from argument_table(command)
            yield from commands(command)


def argument_table(command: argparse.ArgumentParser) -> Iterator[str]:
    plain = (argparse._HelpAction, argparse._SubParsersAction)
    actions = [action for action in command._actions if not isinstance(action, plain)]
    if not actions:
        return
    yield from ("| argument | default | |", "| --- | --- | --- |")
    for action in actions:
        value = action.metavar or (
            "{" + ",".join(map(str, action.choices)) + "}" if action.choices else ""
        )
        if action.option_strings and action.nargs != 0:
            name = f"{action.option_strings[-1]} {value or action.dest.upper()}"
        else:
            name = action.option_strings[-1] if action.option_strings else value or action.dest
        default = command.get_default(action.dest)
        said = action.help
        if default is argparse.SUPPRESS:  # left out if not given: what it is stands in the help
            said, _, default = said.removesuffix(")").partition(" (default: ")
            default = default or None
        silent = default is None or default is False or default is dataclasses.MISSING
        yield f"| `{name.replace('|', chr(92) + '|')}` | {'' if silent else f'`{default}`'} | {said} |"
    yield ""


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(reference())
