"""Scores of a plain model on items: what its answers cost, and how many of their lines it would have said by itself."""

from dataclasses import astuple, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from .items import Encoded, Item, collate, encode

TOKENS_AT_ONCE = 1024


@dataclass(frozen=True)
class ItemScore:
    """``nll``: sum over the completion's ``tokens``, in nats; ``hits``: those that were most likely; ``right`` of its
    ``lines`` (blank ones do not count)."""

    nll: float
    tokens: int
    hits: int
    right: int
    lines: int


@torch.no_grad()
def score_items(model: nn.Module, tokenizer, items: list[Item], max_length: int) -> list[ItemScore]:
    """One forward pass over each completion that counts as right.

    A line is right when each of its tokens is the most likely one after the right text before it: greedy decoding would
    have said it, up to the newline. Of several right completions any may match; the cost is that of the first."""
    model.eval()
    texts = []
    for number, item in enumerate(items):
        texts += [(number, text) for text in (item.completion, *item.also_right)]
    encoded = [encode(tokenizer, items[number].prompt, text, max_length) for number, text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i].ids))
    found: dict[int, ItemScore] = {}
    while order:
        taken = 1
        while taken < len(order) and (taken + 1) * len(encoded[order[taken]].ids) <= TOKENS_AT_ONCE:
            taken += 1
        chosen, order = order[:taken], order[taken:]
        scored = _score(model, [encoded[i] for i in chosen], [texts[i][1] for i in chosen])
        found |= zip(chosen, scored, strict=True)
    scores: list[ItemScore] = []
    for i, (number, _) in enumerate(texts):
        if number == len(scores):
            scores.append(found[i])
        elif found[i].right > scores[number].right:
            scores[number] = replace(scores[number], right=found[i].right)
    return scores


def _score(model: nn.Module, encoded: list[Encoded], texts: list[str]) -> list[ItemScore]:
    batch = collate(encoded, model.device)
    # [batch, t - 1]: logits are made only where something is learned
    predicts = batch["labels"][:, 1:] >= 0
    hidden = model.get_decoder()(input_ids=batch["input_ids"]).last_hidden_state[:, :-1][predicts]
    logits = model.get_output_embeddings()(hidden).float()  # [learned tokens, vocabulary]
    targets = batch["labels"][:, 1:][predicts]
    losses = F.cross_entropy(logits, targets, reduction="none").double().tolist()
    hits = (logits.argmax(-1) == targets).tolist()
    scores, start = [], 0
    for sample, text in zip(encoded, texts, strict=True):
        lines = [line for line in sample.line[1:] if line >= 0]
        mine = slice(start, start + len(lines))
        start = mine.stop
        missed = {line for line, hit in zip(lines, hits[mine], strict=True) if not hit}
        written = text.split("\n")
        counted = {line for line in lines if written[line].strip()}
        right = len(counted - missed), len(counted)
        scores.append(ItemScore(sum(losses[mine]), len(lines), sum(hits[mine]), *right))
    return scores


def summary(items: list[Item], scores: list[ItemScore]) -> dict[str, dict[str, float]]:
    """By group ("" is all items without one): lines ``right`` and ``tokens`` right in percent, ``nll`` in nats a token,
    ``items``."""
    groups: dict[str, list[ItemScore]] = {}
    for item, score in zip(items, scores, strict=True):
        groups.setdefault(item.group, []).append(score)
    found = {}
    for group, members in groups.items():
        nll, tokens, hits, right, lines = (sum(c) for c in zip(*map(astuple, members), strict=True))
        shares = {"right": 100 * right / max(1, lines), "tokens": 100 * hits / tokens}
        found[group] = {**shares, "nll": nll / tokens, "items": len(members)}
    return found
