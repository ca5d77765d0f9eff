"""The task: the past tense of English verbs, from lemminflect's word list, split by verb."""

import csv
import gzip
import importlib.util
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch

HELD_OUT, HELD_OUT_IRREGULAR = 200, 60
LONGEST_ANSWER = 8  # tokens; no right answer has more than 5 and the end


@dataclass(frozen=True)
class Verb:
    lemma: str
    pasts: tuple[str, ...]  # all that count as right; the first one is taught

    @property
    def irregular(self) -> bool:
        stem = self.lemma
        regular = {stem + "ed", stem + "d", stem[:-1] + "ied", stem + stem[-1] + "ed", stem + "ked"}
        return regular.isdisjoint(self.pasts)

    @property
    def prompt(self) -> str:
        return f"Verb: {self.lemma}\nPast tense:"


@dataclass(frozen=True)
class Split:
    """``held_out``: verbs of all kinds; ``irregular``: more held-out verbs, all irregular;
    ``train``: the others."""

    train: list[Verb]
    held_out: list[Verb]
    irregular: list[Verb]


def read_verbs() -> list[Verb]:
    """Every lower-case verb of one word with its past tenses."""
    folder = Path(importlib.util.find_spec("lemminflect").submodule_search_locations[0])
    verbs = []
    with gzip.open(folder / "resources" / "infl_lu.csv.gz", "rt") as file:
        for entry in csv.reader(file):
            if entry[1] != "verb" or len(entry) < 3:
                continue
            words = entry[0], *entry[2].split("/")
            if all(word.isascii() and word.isalpha() and word.islower() for word in words):
                verbs.append(Verb(words[0], words[1:]))
    return verbs


def split_verbs(seed: int = 0) -> Split:
    verbs = read_verbs()
    random.Random(seed).shuffle(verbs)
    held_out, rest = verbs[:HELD_OUT], verbs[HELD_OUT:]
    irregular = [verb for verb in rest if verb.irregular][:HELD_OUT_IRREGULAR]
    return Split([verb for verb in rest if verb not in set(irregular)], held_out, irregular)


def write_training_file(verbs: list[Verb], path: Path) -> None:
    lines = [
        json.dumps({"prompt": verb.prompt, "completion": f" {verb.pasts[0]}"}) for verb in verbs
    ]
    path.write_text("\n".join(lines) + "\n")


@torch.no_grad()
def answers(model, tokenizer, verbs: list[Verb], batch_size: int = 130) -> list[str]:
    """What the model says, greedily, up to the end of its line."""
    tokenizer.padding_side = "left"
    said = []
    for start in range(0, len(verbs), batch_size):
        prompts = [verb.prompt for verb in verbs[start : start + batch_size]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
        tokens = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        texts = tokenizer.batch_decode(
            tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        said += [text.strip().split("\n")[0].strip() for text in texts]
    return said


def score(model, tokenizer, split: Split) -> dict:
    """Exact match on the held-out verbs, in percent, and what was said."""
    model.eval()
    said = answers(model, tokenizer, split.held_out + split.irregular)

    def percent(verbs: list[Verb], answers: list[str]) -> float:
        return (
            100
            * sum(answer in verb.pasts for verb, answer in zip(verbs, answers, strict=True))
            / len(verbs)
        )

    first, more = said[: len(split.held_out)], said[len(split.held_out) :]
    return {
        "exact_match": percent(split.held_out, first),
        "exact_match_irregular": percent(split.irregular, more),
        "answers": dict(
            zip((verb.lemma for verb in split.held_out + split.irregular), said, strict=True)
        ),
    }
