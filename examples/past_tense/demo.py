"""Fine-tune SmolLM2-135M on the past tense with LoSiA and with PEFT's LoRA, and compare.

python examples/past_tense/demo.py [--cache FOLDER] [--output FOLDER]
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import smollm
import task
import torch
from train import BATCH, LEARNING_RATE, STEPS
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

SHOWN = 8  # generations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache"), help="where the converted model is kept"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="results; replaced if it is there"
    )
    arguments = parser.parse_args()
    started = time.perf_counter()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    model_folder = smollm.model_folder(arguments.cache)
    shutil.rmtree(arguments.output, ignore_errors=True)
    arguments.output.mkdir(parents=True)

    results = {"before": score_untrained(model_folder)}
    for method in LEARNING_RATE:
        print(f"\n--- {method}, lr {LEARNING_RATE[method]:g}", flush=True)
        script = Path(__file__).with_name("train.py")
        subprocess.run([sys.executable, script, model_folder, method, arguments.output], check=True)
        results[method] = json.loads((arguments.output / f"{method}.json").read_text())

    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"\nSmolLM2-135M, past tense, {STEPS} steps of {BATCH}, float32, {device}\n\n{table(results)}\n"
    )
    print(generations(results))
    shutil.copy(arguments.output / "losia" / "loss_curve.png", arguments.output / "loss_curve.png")
    print(f"\nloss curve    {arguments.output / 'loss_curve.png'}")
    print(f"model         {arguments.output / 'losia' / 'model'}")
    print(f"all of it in {time.perf_counter() - started:.0f} s")


def score_untrained(model_folder: Path) -> dict:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return task.score(model, AutoTokenizer.from_pretrained(model_folder), task.split_verbs())


def table(results: dict[str, dict]) -> str:
    """One method a line."""
    lines = [
        f"{'':14}{'exact match, held-out verbs':>29}{'s / step':>10}{'peak memory':>13}{'trained':>13}",
        f"{'':14}{f'{task.HELD_OUT} of all':>15}{f'{task.HELD_OUT_IRREGULAR} irregular':>14}"
        f"{'median':>10}{'GiB':>13}{'values':>13}",
    ]
    names = {
        "before": "untrained",
        "losia": "LoSiA",
        "lora-8": "LoRA r=8",
        "lora-64": "LoRA r=64",
    }
    for method, result in results.items():
        line = f"{names[method]:14}{result['exact_match']:13.1f} %{result['exact_match_irregular']:12.1f} %"
        if method != "before":
            line += f"{result['seconds_per_step']:10.2f}{result['peak_memory_gib']:13.2f}{result['trained_values']:13,}"
        lines.append(line)
    return "\n".join(lines)


def generations(results: dict[str, dict]) -> str:
    """What was said about a few held-out verbs, half of them irregular."""
    split = task.split_verbs()
    verbs = split.held_out[: SHOWN // 2] + split.irregular[: SHOWN - SHOWN // 2]
    lines = [f"{'verb':16}{'untrained':24}{'LoSiA':20}{'LoRA r=64':20}right"]
    for verb in verbs:
        said = [results[method]["answers"][verb.lemma] for method in ("before", "losia", "lora-64")]
        lines.append(
            f"{verb.lemma:16}{said[0]:24.22}{said[1]:20.18}{said[2]:20.18}{' / '.join(verb.pasts)}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    logging.disable_progress_bar()
    main()
