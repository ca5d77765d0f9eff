"""The chat templates that TRL ships, each with a tokenizer that has its tokens, and what becomes of
chats of every kind; ``python -m tests.finetune.families`` writes the table of docs/templates.md."""

import re
from pathlib import Path

import numpy as np
import trl
from transformers import PreTrainedTokenizerFast

from losia_kernels.finetune.data import Encoder
from losia_kernels.finetune.options import FinetuneOptions, InputError
from losia_kernels.finetune.rows import Row
from losia_kernels.finetune.trainer import sft_config
from tests.integrations.tiny_llama import make_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "templates.md"
SHIPPED = Path(trl.__file__).parent / "chat_templates"
FAMILIES = sorted(
    path.stem for path in SHIPPED.glob("*.jinja") if not path.stem.endswith("_training")
)
TOKENS = (
    r"<\|[^|<>\s{}]+\|>|<｜[^<>\s{}]+｜>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]|<end_of_utterance>|"
    r"\[gMASK\]|<sop>|<\|?(?:turn|channel|tool_call|tool_response|tool)\|?>"
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
}
CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}}
TOOL = {"name": "weather", "description": "of now", "parameters": CITY}
CHATS = {
    "one turn": {"messages": [user("Qone"), assistant("Aone")]},
    "several turns": {
        "messages": [user("Qone"), assistant("Aone"), user("Qtwo"), assistant("Atwo")]
    },
    "system": {
        "messages": [{"role": "system", "content": "Sone"}, user("Qone"), assistant("Aone")]
    },
    "tool calls": {
        "messages": [
            user("Qone"),
            assistant(None, tool_calls=[CALL]),
            {"role": "tool", "name": "weather", "tool_call_id": "c1", "content": "rainy"},
            assistant("Aone"),
        ]
    },
    "reasoning": {"messages": [user("Qone"), assistant("Aone", reasoning_content="Rone")]},
    "reasoning in every turn": {
        "messages": [
            user("Qone"),
            assistant("Aone", reasoning_content="Rone"),
            user("Qtwo"),
            assistant("Atwo", reasoning_content="Rtwo"),
        ]
    },
}
CHATS["tools"] = {**CHATS["tool calls"], "tools": [{"type": "function", "function": TOOL}]}


def template_of(family: str) -> str:
    return (SHIPPED / f"{family}.jinja").read_text(encoding="utf-8")


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """A token a byte, and the special tokens that templates write."""
    every = "".join(path.read_text(encoding="utf-8") for path in SHIPPED.glob("*.jinja"))
    tokenizer = make_tokenizer()
    tokens = sorted(set(re.findall(TOKENS, every)))
    tokenizer.add_special_tokens({"additional_special_tokens": tokens, "bos_token": "<s>"})
    tokenizer.chat_template = template_of(family)
    return tokenizer


def encoder_of(tokenizer) -> Encoder:
    return Encoder(tokenizer, sft_config(FinetuneOptions(model="", data="", output="")))


def learned_turns(encoder: Encoder, values: dict) -> list[str]:
    """What is learned of a chat, one text for each stretch of it."""
    ids, learned = encoder.encode(Row(values, "sample"))
    edges = np.flatnonzero(np.diff(learned.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [encoder.tokenizer.decode(ids[start:stop]) for start, stop in edges]


def table() -> str:
    """A row for each family: what works, and in which words the rest is refused."""
    kinds = ["one turn", "several turns", "system", "tools", "tool calls"]
    kinds += ["reasoning", "reasoning in every turn"]
    notes: list[str] = []
    lines = [
        f"| family | {' | '.join(kinds)} | a turn ends with |",
        "| --- " * (len(kinds) + 2) + "|",
    ]
    for family in FAMILIES:
        encoder = encoder_of(tokenizer_of(family))
        cells = []
        for kind in kinds:
            try:
                learned_turns(encoder, CHATS[kind])
                cells.append("yes")
            except InputError as error:
                words = str(error).removeprefix("sample: ")
                notes += [] if words in notes else [words]
                cells.append(f"no ({notes.index(words) + 1})")
        end = learned_turns(encoder, CHATS["one turn"])[-1].rpartition("Aone")[2]
        cells.append(f"`{end}`".replace("|", "\\|"))
        lines.append(f"| {family} | {' | '.join(cells)} |")
    words = [f"{number}. {text}" for number, text in enumerate(notes, start=1)]
    return "\n".join([*lines, "", *words])


if __name__ == "__main__":
    print(table())
