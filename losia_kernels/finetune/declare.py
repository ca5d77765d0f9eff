"""How an option of the command is declared, how its text is read and its help written.

Free of heavy imports, so that the command line can ask for help at once.
"""

import argparse
import json
import os
import textwrap
from dataclasses import MISSING, Field, field
from fractions import Fraction
from typing import Any


class InputError(ValueError):
    """A mistake in the user's input that one line can say: the command line prints it and exits
    with code 2."""


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults behind every option that has one worth saying; names of options stay whole where lines
    are short."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        bare = action.default is None or action.default is False or action.required
        return action.help if bare else super()._get_help_string(action)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.indent("\n".join(self._split_lines(text, width - len(indent))), indent)


def parse_fraction(text: str) -> float:
    """A number, or a fraction such as 1/8."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"expected a number or a fraction such as 1/8, got {text!r}"
        ) from None


def parse_config(path: str) -> dict[str, Any]:
    """``read_config`` for the command line, which shows the errors of this kind alone."""
    try:
        return read_config(path)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def read_config(path: str) -> dict[str, Any]:
    """The settings of a YAML file, each under an option's name or TRL's for it; the environment
    variables of ``env`` in it are set, as in TRL's command.

    Raises:
        InputError: if it cannot be read, or holds no settings.
    """
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            tree = yaml.compose(file, yaml.SafeLoader)
            settings = None if tree is None else yaml.SafeLoader("").construct_document(tree)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise InputError(f"{path}: expected settings, one 'name: value' a line")
    names = [key.value.replace("-", "_") for key, _ in tree.value]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:  # of which YAML takes the last
        raise InputError(f"{path}: {', '.join(twice)} stands there twice")
    env = settings.pop("env", None) or {}
    if not isinstance(env, dict):
        raise InputError(f"{path}: 'env' must hold names and values, got {env!r:.80}")
    env = {str(name): str(value) for name, value in env.items()}
    os.environ.update(env)
    settings = {name.replace("-", "_"): value for name, value in settings.items()}
    if env:
        settings["env"] = env
    return json.loads(json.dumps(settings, default=str))  # dates are text


def parse_period(text: str) -> int | str:
    """A number of steps, or "auto"."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number of steps or 'auto', got {text!r}"
        ) from None


def option(
    group: str,
    help: str,
    default: Any = MISSING,
    exclusive: str | None = None,
    trl: str | None = None,
    **argument: Any,
) -> Any:
    """A field that is an option of the command line too.

    ``group``: under which heading its help stands; of neighbours there with the same ``exclusive``,
    which is the reason, one may be given. ``trl``: what TRL's command calls
    it, which a config file may, too. ``argument``: what else argparse's ``add_argument`` takes;
    without a default the option is required, and a number's type is its default's.
    """
    if default is MISSING:
        argument["required"] = True
    else:
        argument["default"] = default
    if default is False:
        argument["action"] = "store_true"
    elif isinstance(default, (int, float)):
        argument.setdefault("type", type(default))
    metadata = {
        "group": group,
        "exclusive": exclusive,
        "trl": trl,
        "argument": {"help": help, **argument},
    }
    return field(default=default, metadata=metadata)


def option_value(declared: Field, value: Any, where: str) -> Any:
    """The value of an option in a config file, read as the command line reads its text.

    Raises:
        InputError: naming ``where``, the option and what it takes.
    """
    argument = declared.metadata["argument"]
    if value is None and declared.default is None:
        return None
    if argument.get("action") == "store_true":
        if isinstance(value, bool):
            return value
        raise InputError(f"{where}: {declared.name} must be true or false, got {value!r:.80}")
    if isinstance(value, (dict, list, bool)):
        raise InputError(f"{where}: {declared.name} must be a single value, got {value!r:.80}")
    try:
        read = argument.get("type", str)(str(value))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise InputError(f"{where}: {declared.name}: {error}") from None
    choices = argument.get("choices")
    if choices and read not in choices:
        raise InputError(
            f"{where}: {declared.name} must be one of {', '.join(choices)}; got {read!r}"
        )
    return read
