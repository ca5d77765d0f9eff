"""What the model answers to a few prompts while it is trained, on demand."""

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback

from ..integrations.history import append_log, read_log, rewind_log
from .data import IGNORE

NEW_TOKENS, PROMPT_TOKENS = 128, 32


class SampleCallback(TrainerCallback):
    """Lets the model answer the first ``count`` samples of ``data``, greedily, at each evaluation and
    at the end; each answer becomes a line of ``samples.jsonl`` and is printed.

    A sample is shown up to the last part that is learned; a plain text up to its first tokens.
    """

    def __init__(self, folder: Path, data: Dataset, count: int, tokenizer):
        self.path, self.tokenizer = folder / "samples.jsonl", tokenizer
        self.samples = [
            cut_prompt(np.array(row["input_ids"]), np.array(row["labels"]))
            for row in data.select(range(min(count, len(data))))
        ]
        self.answered_at = -1

    def on_train_begin(self, args, state, control, **kwargs):
        rewind_log(self.path, state.global_step)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self._answer(model, state.global_step)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._answer(model, state.global_step)

    def complete(self, model, step: int) -> None:
        """Ask again what the end of a run, at ``step``, was interrupted in."""
        if sum(entry["step"] == step for entry in read_log(self.path)) < len(self.samples):
            rewind_log(self.path, step - 1)
            self._answer(model, step)

    def _answer(self, model, step: int) -> None:
        if step == self.answered_at:
            return
        self.answered_at, training = step, model.training
        model.eval()
        for prompt, expected in self.samples:
            answer = generate(model, prompt, max(NEW_TOKENS, len(expected)))
            entry = {
                "step": step,
                "prompt": self.tokenizer.decode(prompt),
                "expected": self.tokenizer.decode(expected),
                "answer": self.tokenizer.decode(answer),
            }
            append_log(self.path, [entry])
            print(
                f"step {step}  {entry['prompt'][-60:]!r} -> {entry['answer'][:200]!r}", flush=True
            )
        model.train(training)


def cut_prompt(ids: np.ndarray, labels: np.ndarray) -> tuple[list[int], list[int]]:
    """What of a sample is shown, and what is learned to follow."""
    learned = labels != IGNORE
    stop = int(np.flatnonzero(learned)[-1]) + 1
    unlearned = np.flatnonzero(~learned[:stop])
    start = int(unlearned[-1]) + 1
    if start <= 1:  # a plain text, whose first token alone is not learned
        start = max(1, min(PROMPT_TOKENS, stop // 2))
    return ids[:start].tolist(), ids[start:stop].tolist()


@torch.no_grad()
def generate(model, prompt: list[int], limit: int) -> list[int]:
    """The most likely continuation, to its end or ``limit`` tokens."""
    ids = torch.tensor([prompt], device=model.device)
    ends = model.generation_config.eos_token_id
    filler = ends[0] if isinstance(ends, list) else ends
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=limit,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=filler,
    )
    return output[0, len(prompt) :].tolist()
