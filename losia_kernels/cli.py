"""The command line: ``python -m losia_kernels`` or ``losia-kernels``.

Exit codes: 0 done; 1 training broke off; 2 a mistake in the arguments or the data, told in one line.
"""

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from . import __version__
from .integrations.options import FinetuneOptions, InputError
from .selection import NonFiniteScoreError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    arguments = vars(_parser().parse_args(argv))
    command = arguments.pop("command")
    warnings.showwarning = _show_warning
    try:
        COMMANDS[command](**arguments)
    except InputError as error:
        print(f"losia-kernels: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"losia-kernels: {command} needs {error.name}: pip install 'losia-kernels[hf]'", file=sys.stderr)
        return 2
    except (FloatingPointError, NonFiniteScoreError) as error:
        print(f"losia-kernels: {error}", file=sys.stderr)
        return 1
    return 0


def _finetune(**options) -> None:
    from .integrations.finetune import finetune

    finetune(FinetuneOptions(**options))


def _export(checkpoint: str, output: str) -> None:
    from .integrations.checkpoints import export_checkpoint

    export_checkpoint(Path(checkpoint), Path(output))
    print(f"model in {output}")


def _inspect(checkpoint: str) -> None:
    from .integrations.checkpoints import describe_checkpoint

    print(describe_checkpoint(Path(checkpoint)))


def _estimate(**options) -> None:
    from .memory import describe_fit

    try:
        print(describe_fit(**options))
    except ValueError as error:
        raise InputError(str(error)) from None


COMMANDS = {"finetune": _finetune, "export": _export, "inspect": _inspect, "estimate": _estimate}


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"warning: {message}", file=sys.stderr)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults behind every option that has one worth saying."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False or action.required
        return action.help if silent else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def _fraction(text: str) -> float:
    """A number, or a fraction such as 1/8."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"expected a number or a fraction such as 1/8, got {text!r}") from None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="losia-kernels", description="LoSiA fine-tuning (arXiv 2507.04487).")
    parser.add_argument("--version", action="version", version=f"losia-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_finetune(commands.add_parser(
        "finetune", help="fine-tune a causal language model on a JSONL file", formatter_class=_Help,
        description="Fine-tune a causal language model. OUTPUT gets model/ (an ordinary transformers folder), "
        "checkpoints/, log.jsonl and loss_curve.png.",
    ))
    export = commands.add_parser("export", help="write the plain model of a checkpoint of a LoSiA run")
    export.add_argument("checkpoint", help="a folder OUTPUT/checkpoints/checkpoint-STEP")
    export.add_argument("output", help="the new folder")
    inspect = commands.add_parser("inspect", help="say what a checkpoint of a LoSiA run holds")
    inspect.add_argument("checkpoint", help="a folder OUTPUT/checkpoints/checkpoint-STEP")
    estimate = commands.add_parser(
        "estimate", help="say which rank factor, batch and context fit a GPU", formatter_class=_Help,
        description="Arithmetic on the model's config.json: nothing is loaded, nothing is run.",
    )
    estimate.add_argument("--model", required=True, metavar="FOLDER", help="a folder with a config.json")
    estimate.add_argument("--memory", required=True, type=float, metavar="GIB", help="of the GPU")
    estimate.add_argument("--context", type=int, default=2048, metavar="TOKENS", help="length of a sample")
    estimate.add_argument("--output-dim-factor", type=_fraction, default=0.0, metavar="P",
                          help="share of the vocabulary whose output weights are trained; 0: none, 1: all")
    estimate.add_argument("--reserve", type=float, default=1.0, metavar="GIB",
                          help="left to the CUDA context and the allocator")
    return parser


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and data")
    add = group.add_argument
    add("--model", required=True, help="a local folder or a name on the hub")
    add("--data", required=True, metavar="FILE", help='JSONL, one {"prompt", "completion"}, {"messages": [{"role", '
        '"content"}, ...]} or {"text"} a line; learned are completions, the assistant\'s turns, all of the text')
    add("--eval-data", metavar="FILE", help="JSONL of the same forms, for the evaluation loss")
    add("--output", required=True, metavar="FOLDER", help="a new folder for the run")
    add("--max-length", type=int, metavar="TOKENS", help="longer samples lose their end")
    batching = group.add_mutually_exclusive_group()
    batching.add_argument("--packing", action="store_true", help="join short samples into rows of up to --max-length")
    batching.add_argument("--group-by-length", action="store_true", help="batch samples of similar length")
    add("--dtype", choices=("auto", "float32", "bfloat16"),
        help="of the weights; auto: bfloat16 on a GPU that has it, else float32")

    add = parser.add_argument_group("LoSiA").add_argument
    add("--rank-factor", type=_fraction, metavar="P",
        help="share of a layer's outputs and of its inputs that is trained, such as 1/8")
    add("--output-dim-factor", type=_fraction, metavar="P",
        help="share of the vocabulary whose output weights are trained; 0: none, 1: all")
    add("--period", type=int, metavar="STEPS", help="steps until the next group of layers moves its subnets (default: "
        "the paper's 100, or in a short run the most that gives every group a turn)")
    add("--importance", choices=("sensitivity", "gradient", "marginal"),
        help="what subnets are chosen by; marginal needs no memory of the weights' size")
    add("--init-subnet", choices=("calibrated", "random"),
        help="place the first subnets by the first 4 batches, or at random as in the paper")

    add = parser.add_argument_group("training").add_argument
    add("--lr", type=float, help="peak learning rate (the paper: 5e-5 to 2e-4 for bfloat16 models of 2B "
        "to 13B; for a float32 model of 135M 3e-4 to 5e-4 was best: search)")
    add("--lr-scheduler", choices=("cosine", "linear", "constant", "constant_with_warmup"),
        help="over the whole run")
    add("--warmup-ratio", type=float, metavar="SHARE", help="share of the steps in which the rate rises")
    add("--epochs", type=float, help="passes over the data")
    add("--steps", type=int, help="optimizer steps, instead of --epochs")
    add("--batch-size", type=int, metavar="SAMPLES", help="samples (packed: rows) of one forward")
    add("--gradient-accumulation", type=int, metavar="BATCHES", help="batches of one optimizer step")
    add("--weight-decay", type=float, help="decoupled, on the subnets")
    add("--max-grad-norm", type=float, metavar="NORM", help="clip gradients to this norm; 0: never")
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, more time")
    add("--seed", type=int, help="of the order of the data, the first subnets, dropout")

    add = parser.add_argument_group("progress").add_argument
    add("--print-every", type=int, metavar="STEPS", help="a line on the terminal; log.jsonl has every step")
    add("--eval-steps", type=int, metavar="STEPS", help="between evaluations; the last step has one too")
    add("--save-steps", type=int, metavar="STEPS", help="between checkpoints, two are kept; 0: none")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output, with the same options")

    options = dataclasses.fields(FinetuneOptions)
    parser.set_defaults(**{field.name: field.default for field in options if field.default is not dataclasses.MISSING})
