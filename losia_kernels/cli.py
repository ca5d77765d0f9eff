"""The command line: ``python -m losia_kernels`` or ``losia-kernels``.

Exit codes: 0 done; 1 training broke off; 2 a mistake in the arguments or the data, told in one
line.
"""

import argparse
import dataclasses
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .config import IMPORTANCES
from .finetune.options import PICTURES, FinetuneOptions, InputError
from .training.selection import NonFiniteScoreError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    arguments = vars(command_parser().parse_args(argv))
    command = arguments.pop("command")
    warnings.showwarning = _show_warning
    try:
        COMMANDS[command](**arguments)
    except InputError as error:
        print(f"losia-kernels: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(
            f"losia-kernels: {command} needs {error.name}: pip install 'losia-kernels[hf]'",
            file=sys.stderr,
        )
        return 2
    except (FloatingPointError, NonFiniteScoreError) as error:
        print(f"losia-kernels: {error}", file=sys.stderr)
        return 1
    return 0


def _finetune(**values: Any) -> None:
    options = FinetuneOptions(**values)
    options.check()  # before the imports, which take seconds
    from .finetune.run import finetune

    finetune(options)


def _export(checkpoint: str, output: str) -> None:
    from .finetune.folder import export_checkpoint

    with _told_in_one_line():
        export_checkpoint(Path(checkpoint), Path(output), _track)
    print(f"model in {output}")


def _inspect(folder: str) -> None:
    describe: Callable[[Path], str]
    with _told_in_one_line():
        if (Path(folder) / "delta.json").exists():
            from .checkpoint.delta import describe_delta as describe
        elif (Path(folder) / "lora_error.json").exists():
            from .checkpoint.lora import describe_lora as describe
        else:
            from .finetune.folder import describe_checkpoint as describe
        print(describe(Path(folder)))


def _delta(action: str, **folders: Any) -> None:
    from .checkpoint import delta

    with _told_in_one_line():
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

    with _told_in_one_line():
        export_lora(base, trained, output, rank, _track)
        print(describe_lora(output))


def _estimate(**options: Any) -> None:
    from .finetune.estimate import describe_fit

    with _told_in_one_line():
        print(describe_fit(**options))


def _plot(run: str, **options: Any) -> None:
    from .finetune.plots import plot_run

    plot_run(Path(run), **options)


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
def _told_in_one_line() -> Iterator[None]:
    """For work on folders alone, where a ValueError or OSError is about what the user named."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from None


def _track(names: Iterable[str], doing: str) -> Iterator[str]:
    """Yields ``names`` and says on stderr how far it is: one line, rewritten; in a log a line every
    half minute."""
    names = list(names)
    terminal = sys.stderr.isatty()
    start = "\r\033[K" if terminal else ""  # back to the start of the line, and clear it
    started = said = time.perf_counter()
    for done, name in enumerate(names):
        now = time.perf_counter()
        if done and now - said > (0.2 if terminal else 30):
            left = timedelta(seconds=round((now - started) / done * (len(names) - done)))
            text = f"{start}{doing} {done}/{len(names)}  left {left}"
            print(text, end="" if terminal else "\n", file=sys.stderr, flush=True)
            said = now
        yield name
    if terminal:
        print(start, end="", file=sys.stderr, flush=True)


def _show_warning(message: Warning | str, *where: Any, **options: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults behind every option that has one worth saying."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or action.required
        return action.help if silent else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def _fraction(text: str) -> float:
    """A number, or a fraction such as 1/8."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(
            f"expected a number or a fraction such as 1/8, got {text!r}"
        ) from None


def _period(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number of steps or 'auto', got {text!r}"
        ) from None


def command_parser() -> argparse.ArgumentParser:
    """All commands with their arguments; `docs/make_reference.py` reads it too."""
    parser = _Parser(prog="losia-kernels", description="LoSiA fine-tuning (arXiv 2507.04487).")
    parser.add_argument("--version", action="version", version=f"losia-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_finetune(
        commands.add_parser(
            "finetune",
            help="fine-tune a causal language model on a JSONL file",
            formatter_class=_Help,
            description="Fine-tune a causal language model. OUTPUT gets model/ (an ordinary transformers folder), "
            "checkpoints/, log.jsonl, subnets.jsonl and loss_curve.png.",
        )
    )
    _add_plot(
        commands.add_parser(
            "plot",
            help="draw what a run did: its loss, where its subnets were, what they changed",
            formatter_class=_Help,
            description="Pictures of a finetune run, as PNG files in RUN/plots/.",
        )
    )
    export = commands.add_parser(
        "export", help="write the plain model of a checkpoint of a LoSiA run"
    )
    export.add_argument("checkpoint", help="a folder OUTPUT/checkpoints/checkpoint-STEP")
    export.add_argument("output", help="the new folder")
    inspect = commands.add_parser(
        "inspect", help="say what a checkpoint, a model, a delta or a LoRA folder holds"
    )
    inspect.add_argument("folder", help="such as OUTPUT/checkpoints/checkpoint-STEP")
    _add_delta(
        commands.add_parser(
            "delta",
            help="what a training changed, exactly: make it, apply it, verify it, subtract it",
            description="Models are save_pretrained folders; a delta is a folder of the size of what the "
            "training touched.",
        )
    )
    lora = commands.add_parser(
        "lora", help="write what a training changed as a LoRA adapter", formatter_class=_Help
    )
    _add_folders(
        lora,
        base="the model before the training",
        trained="and after",
        output="the new adapter folder",
    )
    lora.add_argument(
        "--rank",
        type=int,
        metavar="R",
        help="at most this in every layer, the best approximation "
        "where that is too little; without it the adapter is exact",
    )
    estimate = commands.add_parser(
        "estimate",
        help="say which rank factor, batch and context fit a GPU",
        formatter_class=_Help,
        description="Arithmetic on the model's config.json: nothing is loaded, nothing is run.",
    )
    estimate.add_argument(
        "--model", required=True, metavar="FOLDER", help="a folder with a config.json"
    )
    estimate.add_argument("--memory", required=True, type=float, metavar="GIB", help="of the GPU")
    estimate.add_argument(
        "--context", type=int, default=2048, metavar="TOKENS", help="length of a sample"
    )
    estimate.add_argument(
        "--output-dim-factor",
        type=_fraction,
        default=0.0,
        metavar="P",
        help="share of the vocabulary whose output weights are trained; 0: none, 1: all",
    )
    _add_memory(estimate, moments="float32", master="float32")
    estimate.add_argument(
        "--reserve",
        type=float,
        default=1.0,
        metavar="GIB",
        help="left to the CUDA context and the allocator",
    )
    return parser


def _add_folders(parser: argparse.ArgumentParser, **folders: str) -> None:
    for name, text in folders.items():
        parser.add_argument(name, help=text)


def _add_memory(group: argparse._ActionsContainer, **defaults: str) -> None:
    """What is kept for each trained value; ``docs/memory.md`` has the bytes."""
    group.add_argument(
        "--moments",
        choices=("float32", "bfloat16", "int8"),
        help="how the optimizer keeps its moments",
    )
    group.add_argument(
        "--master",
        choices=("float32", "remainder", "none"),
        help="how the trained values are kept: in float32, in bfloat16 with the missing bits beside "
        "them, in bfloat16 alone with stochastic rounding",
    )
    group.add_argument(
        "--in-backward", action="store_true", help="update inside the backward, keep no gradients"
    )
    group.set_defaults(**defaults)


def _add_delta(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add, base, delta, output = (
        actions.add_parser,
        "the model before the training",
        "the delta",
        "the new folder",
    )
    _add_folders(
        add("make", help="write trained - base"), base=base, trained="and after", output=output
    )
    _add_folders(
        add("apply", help="write base + delta: the trained model"),
        base=base,
        delta=delta,
        output=output,
    )
    _add_folders(
        add("subtract", help="write trained - delta: the base"),
        trained="the trained model",
        delta=delta,
        output=output,
    )
    _add_folders(add("verify", help="say whether a delta is of this base"), base=base, delta=delta)


def _add_plot(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", metavar="RUN", help="the output folder of a finetune run")
    add(
        "--only",
        nargs="+",
        choices=PICTURES,
        metavar="PICTURE",
        help=f"of {', '.join(PICTURES)} (default: all that the run's files allow; the last two load the model)",
    )
    add(
        "--vectors",
        type=int,
        default=500,
        metavar="COUNT",
        help="singular vectors of each weight to compare",
    )
    add(
        "--base",
        metavar="MODEL",
        help="the model before training, if it is no longer where run.json says",
    )


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and data")
    add = group.add_argument
    add("--model", required=True, help="a local folder or a name on the hub")
    add(
        "--data",
        required=True,
        metavar="FILE",
        help='JSONL, one {"prompt", "completion"}, {"messages": [{"role", '
        '"content"}, ...]} or {"text"} a line; learned are completions, the assistant\'s turns, all of the text',
    )
    add("--eval-data", metavar="FILE", help="JSONL of the same forms, for the evaluation loss")
    add("--output", required=True, metavar="FOLDER", help="a new folder for the run")
    add("--max-length", type=int, metavar="TOKENS", help="longer samples lose their end")
    batching = group.add_mutually_exclusive_group()
    batching.add_argument(
        "--packing", action="store_true", help="join short samples into rows of up to --max-length"
    )
    batching.add_argument(
        "--group-by-length", action="store_true", help="batch samples of similar length"
    )
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        help="of the weights; auto: bfloat16 on a GPU that has it, else float32",
    )

    add = parser.add_argument_group("LoSiA").add_argument
    add(
        "--rank-factor",
        type=_fraction,
        metavar="P",
        help="share of a layer's outputs and of its inputs that is trained, such as 1/8",
    )
    add(
        "--output-dim-factor",
        type=_fraction,
        metavar="P",
        help="share of the vocabulary whose output weights are trained; 0: none, 1: all",
    )
    add(
        "--period",
        type=_period,
        metavar="STEPS",
        help="steps until the next group of layers moves its subnets; auto: "
        "the paper's 100, or in a short run as many as give every group two turns",
    )
    add(
        "--importance",
        choices=IMPORTANCES,
        help="what subnets are chosen by; sensitivity_bfloat16 keeps it in half "
        "the memory, marginal needs none of the weights' size",
    )
    add(
        "--init-subnet",
        choices=("calibrated", "random"),
        help="place the first subnets by the first 4 batches, or at random as in the paper",
    )
    add(
        "--alignment",
        type=int,
        metavar="NEURONS",
        help="choose runs of so many neighbours: 16 makes gathers read only the memory they need; 1 is the paper",
    )

    _add_memory(parser.add_argument_group("memory of the optimizer"))
    add = parser.add_argument_group("training").add_argument
    add(
        "--lr",
        type=float,
        help="peak learning rate (the paper: 5e-5 to 2e-4 for bfloat16 models of 2B "
        "to 13B; for a float32 model of 135M 3e-4 to 5e-4 was best: search)",
    )
    add(
        "--lr-scheduler",
        choices=("cosine", "linear", "constant", "constant_with_warmup"),
        help="over the whole run",
    )
    add(
        "--warmup-ratio",
        type=float,
        metavar="SHARE",
        help="share of the steps in which the rate rises",
    )
    add("--epochs", type=float, help="passes over the data")
    add("--steps", type=int, help="optimizer steps, instead of --epochs")
    add("--batch-size", type=int, metavar="SAMPLES", help="samples (packed: rows) of one forward")
    add(
        "--gradient-accumulation", type=int, metavar="BATCHES", help="batches of one optimizer step"
    )
    add("--weight-decay", type=float, help="decoupled, on the subnets")
    add("--max-grad-norm", type=float, metavar="NORM", help="clip gradients to this norm; 0: never")
    add(
        "--gradient-checkpointing",
        action="store_true",
        help="recompute activations: less memory, more time",
    )
    add("--seed", type=int, help="of the order of the data, the first subnets, dropout")

    add = parser.add_argument_group("progress").add_argument
    add(
        "--print-every",
        type=int,
        metavar="STEPS",
        help="a line on the terminal; log.jsonl has every step",
    )
    add(
        "--report-to",
        metavar="NAME",
        help="where the Trainer reports to as well: tensorboard, wandb, ...",
    )
    add(
        "--eval-steps",
        type=int,
        metavar="STEPS",
        help="between evaluations; the last step has one too",
    )
    add(
        "--save-steps", type=int, metavar="STEPS", help="between checkpoints, two are kept; 0: none"
    )
    add(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in --output, with the same options",
    )

    options = dataclasses.fields(FinetuneOptions)
    parser.set_defaults(
        **{
            field.name: field.default
            for field in options
            if field.default is not dataclasses.MISSING
        }
    )
