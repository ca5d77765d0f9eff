"""The command line: ``python -m losia_kernels`` or ``losia-kernels``.

Exit codes: 0 done; 1 training broke off; 2 a mistake in the arguments or the data, said in one line;
130 interrupted; 141 nobody reads the output any more. A command imports what it needs when it runs, so
that help comes at once.
"""

import argparse
import difflib
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import Field, fields
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

from . import NonFiniteScoreError, __version__
from .finetune.declare import Help
from .finetune.left import check_output, first_cause, how_to_go_on, what_is_missing
from .finetune.options import PICTURES, FinetuneOptions, InputError, with_config


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    _settle_streams()
    arguments = vars(command_parser().parse_args(argv))
    command = arguments.pop("command")
    warnings.showwarning = _show_warning
    problem: object
    try:
        COMMANDS[command](**arguments)
        sys.stdout.flush()
        return 0
    except InputError as error:
        code, problem = 2, error
    except (ImportError, RuntimeError) as error:
        cause = first_cause(error)
        if not isinstance(error, ImportError) and not isinstance(cause, ImportError):
            raise
        code, problem = 2, f"{command} {what_is_missing(cause)}"
    except (FloatingPointError, NonFiniteScoreError) as error:
        code, problem = 1, error
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") != "0":
            return 130  # the first process says it for all
        code, problem = 130, f"interrupted{how_to_go_on(command, arguments)}"
    except BrokenPipeError:  # whoever reads the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if command != "finetune":
            return 141
        code, problem = 141, f"whoever reads the output is gone{how_to_go_on(command, arguments)}"
    with suppress(BrokenPipeError):
        print(f"losia-kernels: {problem}", file=sys.stderr)
    return code


def _settle_streams() -> None:
    """What a terminal's encoding has not is written as escapes; of a closed stream nothing is
    missed. No word that is printed ends a run."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # it writes what has been printed before
                stream.reconfigure(errors="backslashreplace")


def _finetune(**given: Any) -> None:
    from .finetune.checks import check_options

    given = with_config(given)
    if given.get("resume") and "output" in given:
        from .finetune.folder import resumed_options

        options = resumed_options(given)
    else:
        needed = ("output",) if given.get("resume") else ("model", "data", "output")
        missing = ", ".join(f"--{name}" for name in needed if name not in given)
        if missing:
            raise InputError(f"finetune needs {missing} (see losia-kernels finetune --help)")
        options = FinetuneOptions(**given)
    check_options(options)  # before the imports, which take seconds
    from .finetune.run import finetune

    finetune(options)


def _export(checkpoint: str, output: str) -> None:
    with _as_input_errors():
        check_output(output)
        if (Path(checkpoint) / "run.json").exists():
            from .finetune.result import export_run

            checkpoint = str(export_run(Path(checkpoint), Path(output), _track))
        else:
            from .checkpoint.export import export_checkpoint

            export_checkpoint(Path(checkpoint), Path(output), _track)
    print(f"model of {checkpoint} in {output}")


def _inspect(folder: str) -> None:
    describe: Callable[[Path], str]
    with _as_input_errors():
        if (Path(folder) / "delta.json").exists():
            from .checkpoint.delta import describe_delta as describe
        elif (Path(folder) / "lora_error.json").exists():
            from .checkpoint.lora import describe_lora as describe
        elif (Path(folder) / "run.json").exists():
            from .finetune.result import describe_run as describe
        elif Path(folder).name == "model" and Path(folder).with_name("model.json").exists():
            from .finetune.result import describe_model as describe
        else:
            from .checkpoint.export import describe_checkpoint as describe
        print(describe(Path(folder)))


def _delta(action: str, **folders: Any) -> None:
    from .checkpoint import delta

    with _as_input_errors():
        check_output(folders.get("output", "new"))
        if action == "make":
            delta.make_delta(**folders, track=_track)
            print(delta.describe_delta(folders["output"]))
        elif action == "verify":
            digest = delta.verify_delta(**folders, track=_track)
            print(f"{folders['base']} is the base of {folders['delta']}: sha256 {digest}")
        else:
            convert: Callable[..., None] = {
                "apply": delta.apply_delta,
                "subtract": delta.subtract_delta,
            }[action]
            convert(**folders, track=_track)
            print(f"model in {folders['output']}")


def _lora(base: str, trained: str, output: str, rank: int | None) -> None:
    from .checkpoint.lora import describe_lora, export_lora

    with _as_input_errors():
        check_output(output)
        export_lora(base, trained, output, rank, _track)
        print(describe_lora(output))


def _estimate(**options: Any) -> None:
    from .finetune.fit import describe_fit

    with _as_input_errors():
        print(describe_fit(**options))


def _plot(run: str, **options: Any) -> None:
    from .finetune.plots import plot_run

    plot_run(Path(run), **options)


OPTIONS = {field.name: field for field in fields(FinetuneOptions)}  # in the order of the help
COMMANDS: dict[str, Callable[..., None]] = {
    "finetune": _finetune,
    "plot": _plot,
    "export": _export,
    "inspect": _inspect,
    "delta": _delta,
    "lora": _lora,
    "estimate": _estimate,
}


@contextmanager
def _as_input_errors() -> Iterator[None]:
    """For work on folders alone, where a ValueError or OSError is about what the user named."""
    try:
        yield
    except BrokenPipeError:  # of the output
        raise
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from None


def _track(names: Iterable[str], doing: str) -> Iterable[str]:
    """``names``, with a bar on stderr of how far through them it is; in a log a line every half
    minute."""
    from tqdm import tqdm

    often = 0.2 if sys.stderr.isatty() else 30
    return tqdm(names, doing, unit=" tensors", leave=False, delay=often, mininterval=often)


def _show_warning(message: Warning | str, *where: Any, **options: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--\S+)", message)
        if unknown:
            known = [f"--{name.replace('_', '-')}" for name in OPTIONS]
            near = difflib.get_close_matches(unknown[1], known, 1)
            message += f"; did you mean {near[0]}?" if near else ""
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def command_parser() -> argparse.ArgumentParser:
    """All commands with their arguments; `docs/make_reference.py` reads it too."""
    parser = _Parser(prog="losia-kernels", description="LoSiA fine-tuning (arXiv 2507.04487).")
    parser.add_argument("--version", action="version", version=f"losia-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_finetune(commands)
    _add_plot(commands)
    _add_export_and_inspect(commands)
    _add_delta(commands)
    _add_lora(commands)
    _add_estimate(commands)
    return parser


def _add_finetune(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "finetune",
        help="fine-tune a causal language model",
        formatter_class=Help,
        description="Fine-tune a causal language model. OUTPUT gets model/ (an ordinary transformers folder), "
        "checkpoints/, log.jsonl, subnets.jsonl, loss_curve.png and run.json. Needed are --model, --data and "
        "--output; to go on with a run, --resume and --output.",
    )
    for title, options in groupby(OPTIONS.values(), lambda field: field.metadata["group"]):
        group = parser.add_argument_group(title)
        for exclusive, together in groupby(options, lambda field: field.metadata["exclusive"]):
            container = group.add_mutually_exclusive_group() if exclusive else group
            for field in together:
                _add_option(container, field)


def _add_option(container: argparse._ActionsContainer, field: Field) -> None:
    """What is not given is left out, so that a config file or the run that is resumed may say it;
    its default stands in the dataclass and, for the reader, in the help."""
    argument = dict(field.metadata["argument"])
    default = argument.pop("default", None)
    argument["required"] = False
    if default is not None and default is not False:
        argument["help"] += f" (default: {default})"
    container.add_argument(
        f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, **argument
    )


def _add_plot(commands: argparse._SubParsersAction) -> None:
    add = commands.add_parser(
        "plot",
        help="draw what a run did: its loss, where its subnets were, what they changed",
        formatter_class=Help,
        description="Pictures of a finetune run, as PNG files in RUN/plots/.",
    ).add_argument
    add("run", metavar="RUN", help="the output folder of a finetune run")
    add(
        "--only",
        nargs="+",
        choices=tuple(PICTURES),
        metavar="PICTURE",
        help=f"{'; '.join(f'{name}: {what}' for name, what in PICTURES.items())}; the last two load the model "
        "(default: all that the run's files allow)",
    )
    add(
        "--vectors",
        type=int,
        default=500,
        metavar="COUNT",
        help="how many of each weight's first singular vectors the picture of them compares",
    )
    add(
        "--base",
        metavar="MODEL",
        help="the model before training, for the last two, if it is no longer where run.json says",
    )


def _add_export_and_inspect(commands: argparse._SubParsersAction) -> None:
    export = commands.add_parser(
        "export", help="write the plain model of a run or of one of its checkpoints"
    )
    _add_folders(
        export,
        checkpoint="the folder of a run, of which the model or else the newest checkpoint is taken, "
        "or one OUTPUT/checkpoints/checkpoint-STEP",
        output="the new folder",
    )
    inspect = commands.add_parser(
        "inspect", help="say what a run, a checkpoint, a model, a delta or a LoRA folder holds"
    )
    _add_folders(inspect, folder="such as the output folder of a finetune run")


def _add_delta(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "delta",
        help="what a training changed, exactly: make it, apply it, verify it, subtract it",
        description="Models are save_pretrained folders; a delta is a folder of the size of what the "
        "training touched.",
    )
    add = parser.add_subparsers(dest="action", required=True, metavar="ACTION").add_parser
    base, delta, output = "the model before the training", "the delta", "the new folder"
    make = add("make", help="write trained - base")
    _add_folders(make, base=base, trained="and after", output=output)
    apply = add("apply", help="write base + delta: the trained model")
    _add_folders(apply, base=base, delta=delta, output=output)
    subtract = add("subtract", help="write trained - delta: the base")
    _add_folders(subtract, trained="the trained model", delta=delta, output=output)
    verify = add("verify", help="say whether a delta is of this base")
    _add_folders(verify, base=base, delta=delta)


def _add_lora(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "lora", help="write what a training changed as a LoRA adapter", formatter_class=Help
    )
    _add_folders(
        parser,
        base="the model before the training",
        trained="and after",
        output="the new adapter folder",
    )
    parser.add_argument(
        "--rank",
        type=int,
        metavar="R",
        help="at most this in every layer, the best approximation "
        "where that is too little; without it the adapter is exact",
    )


def _add_estimate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "estimate",
        help="say which rank factor, batch and context fit a GPU",
        formatter_class=Help,
        description="Arithmetic on the model's config.json: no weights are loaded, nothing is run.",
    )
    add = parser.add_argument
    add("--model", required=True, help="a local folder or a name on the hub")
    add("--memory", required=True, type=float, metavar="GIB", help="of the GPU")
    add(
        "--context",
        type=int,
        metavar="TOKENS",
        help="length of a sample (default: 2048, or what the model was made for if that is less)",
    )
    for name in (
        "shape",
        "output_dim_factor",
        "moves",
        "importance",
        "moments",
        "master",
        "in_backward",
    ):
        _add_option(parser, OPTIONS[name])
    add(
        "--reserve",
        type=float,
        default=1.0,
        metavar="GIB",
        help="left to the CUDA context and the allocator",
    )


def _add_folders(parser: argparse.ArgumentParser, **folders: str) -> None:
    for name, text in folders.items():
        parser.add_argument(name, help=text)
