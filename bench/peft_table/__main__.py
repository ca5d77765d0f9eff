"""Run LoSiA in PEFT's own method comparison (MetaMathQA), by PEFT's own script.

    python -m bench.peft_table PEFT                     the default entry
    python -m bench.peft_table PEFT llama-3.2-3B-paper  another
    python -m bench.peft_table PEFT --list              what there is, with the values that each trains

PEFT is a checkout of huggingface/peft that is installed from there (pip install -e PEFT): the
harness asks it for its branch. Results are where the harness puts them, a JSON file in its folder
results/ (on the branch main) or temporary_results/.
"""

import argparse
import os
import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import losia_kernels.integrations.peft  # noqa: F401 - so that PEFT knows the method
from losia_kernels import LoSiAAdamW

EXPERIMENTS = Path(__file__).parent / "experiments"
ENTRIES = sorted(each.name for each in (EXPERIMENTS / "losia").iterdir())
DEFAULT = "llama-3.2-3B-wide"
HARNESS = Path("method_comparison") / "MetaMathQA"
# of meta-llama/Llama-3.2-3B, whose config cannot be downloaded without an account
LLAMA = {
    **{"vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192},
    **{"num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8},
    **{"head_dim": 128, "tie_word_embeddings": True},
}


def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m bench.peft_table", description=__doc__, formatter_class=raw
    )
    parser.add_argument("peft", type=Path, metavar="PEFT", help="a checkout of huggingface/peft")
    parser.add_argument("entry", nargs="?", choices=ENTRIES, default=DEFAULT, metavar="ENTRY")
    parser.add_argument("--list", action="store_true", help="say what there is, and stop")
    arguments = parser.parse_args(argv)
    if arguments.list:
        for name in ENTRIES:
            print(f"{name}: {trained_values(name):,} values trained")
        return 0
    if not (arguments.peft / HARNESS / "run.py").is_file():
        found = arguments.peft / HARNESS / "run.py"
        parser.error(f"argument PEFT: expected a checkout of huggingface/peft, found no {found}")
    if sys.version_info < (3, 12):
        parser.error("PEFT's harness needs Python 3.12: with an older one it cannot save adapters")
    run(arguments.peft, arguments.entry)
    return 0


def run(checkout: Path, entry: str) -> None:
    """Put the entries among the harness's own and run one of them with its ``run.py``."""
    harness = (checkout / HARNESS).resolve()
    shutil.copytree(EXPERIMENTS, harness / "experiments", dirs_exist_ok=True)
    os.chdir(harness)  # where its experiments' paths have to begin
    sys.path.insert(0, str(harness))
    import utils

    add_optimizer(utils)
    sys.argv = ["run.py", "-v", "--clean", f"experiments/losia/{entry}"]
    runpy.run_path("run.py", run_name="__main__")


def add_optimizer(utils: ModuleType) -> None:
    """Let the harness make a LoSiAAdamW: it looks ``optimizer_type`` up in torch.optim and gives
    what it finds the parameters, where LoSiAAdamW needs the model and the number of steps."""
    torch.optim.LoSiAAdamW = LoSiAAdamW  # a name that its check of the settings finds
    make = utils.get_optimizer_and_scheduler

    def get_optimizer_and_scheduler(model: Any, *, max_steps: int, **others: Any) -> Any:
        def of_model(parameters: Any, **kwargs: Any) -> LoSiAAdamW:
            return LoSiAAdamW(model, total_steps=max_steps, **kwargs)

        torch.optim.LoSiAAdamW = of_model
        return make(model, max_steps=max_steps, **others)

    utils.get_optimizer_and_scheduler = get_optimizer_and_scheduler


def trained_values(entry: str) -> int:
    """Of Llama-3.2-3B, counted on tensors without contents."""
    from peft import PeftConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = PeftConfig.from_pretrained(EXPERIMENTS / "losia" / entry)
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(LlamaConfig(**LLAMA)), config)
    return model.get_nb_trainable_parameters()[0]


if __name__ == "__main__":
    raise SystemExit(main())
