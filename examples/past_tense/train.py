"""Fine-tune with one method in a process of its own, so that its memory is its own, and write what
was measured.

python train.py MODEL_FOLDER METHOD WORK_FOLDER      METHOD: losia, lora-8, lora-64
"""

import json
import statistics
import sys
import threading
import time
import warnings
from pathlib import Path

import peft
import psutil
import task
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging

from losia_kernels.finetune.data import load_data
from losia_kernels.finetune.model import load_model, load_tokenizer
from losia_kernels.finetune.options import FinetuneOptions
from losia_kernels.finetune.run import finetune
from losia_kernels.finetune.trainer import FinetuneTrainer, sft_config

STEPS, BATCH = 30, 16
# Each the best found on the same task with another split; LoSiA's, which is full fine-tuning's, of
# 2e-5 to 2e-4. LoRA's alpha is twice its rank.
LEARNING_RATE = {"losia": 5e-5, "lora-8": 1e-3, "lora-64": 2e-4}


class Meter(TrainerCallback):
    """Seconds of each step, and peak memory while training: the GPU's tensors, else the process's
    resident size."""

    def __init__(self):
        self.seconds, self.peak, self._done = [], 0, threading.Event()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.trained_values = sum(p.numel() for p in model.parameters() if p.requires_grad)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        process = psutil.Process()
        while not self._done.wait(0.01):
            self.peak = max(self.peak, process.memory_info().rss)

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._started)

    def on_train_end(self, args, state, control, **kwargs):
        self._done.set()

    def result(self) -> dict:
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else self.peak
        return {
            "seconds_per_step": statistics.median(self.seconds),
            "peak_memory_gib": peak / 2**30,
            "trained_values": self.trained_values,
        }


def train_lora(options: FinetuneOptions, rank: int, meter: Meter):
    """PEFT's LoRA on all linears, with the Trainer, data, batches, seed and schedule of LoSiA's
    run."""
    config = sft_config(options, options.steps)
    tokenizer, model = load_tokenizer(options, config), load_model(options, config)
    samples = load_data(options, config, tokenizer).train
    torch.manual_seed(options.seed)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    )
    trainer = FinetuneTrainer(
        model,
        config,
        processing_class=tokenizer,
        train_dataset=samples,
        callbacks=[meter],
    )
    trainer.train()
    return model.merge_and_unload(), tokenizer


def main(model_folder: str, method: str, work: Path) -> None:
    split = task.split_verbs()
    work.mkdir(parents=True, exist_ok=True)
    data = work / "train.jsonl"
    task.write_training_file(split.train, data)
    options = FinetuneOptions(
        model=model_folder,
        data=str(data),
        output=str(work / method),
        steps=STEPS,
        batch_size=BATCH,
        max_length=64,
        lr=LEARNING_RATE[method],
        lr_scheduler="constant",
        warmup_ratio=0.0,
        dtype="float32",
        save_steps=0,
    )
    meter = Meter()
    if method == "losia":
        folder = finetune(options, callbacks=(meter,))
        # what it leaves is an ordinary model: nothing below knows of LoSiA
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(folder),
            AutoTokenizer.from_pretrained(folder),
        )
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    else:
        model, tokenizer = train_lora(options, int(method.removeprefix("lora-")), meter)
    started = time.perf_counter()
    result = {"method": method, **meter.result(), **task.score(model, tokenizer, split)}
    print(f"{method}: evaluated in {time.perf_counter() - started:.0f} s", flush=True)
    (work / f"{method}.json").write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    logging.disable_progress_bar()
    # PEFT uses older names
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
