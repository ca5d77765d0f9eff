"""A chat as its template writes it, and which part of that the assistant is to learn.

For most models' templates TRL has a training template: it writes every turn the same whatever
follows, and marks what the assistant says. A template that has marks of its own is taken as it is.
With any other the turns are told apart by writing the chat up to each of them, which works if what
is written once stays.
"""

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import prepare_multimodal_messages

from .options import InputError

REASONING = ("reasoning_content", "thinking", "reasoning")  # the names that templates know
# What each message may have; of anything else it is said that nothing reads it.
KEYS = {"role", "content", "tool_calls", "tool_call_id", "name", "weight", "type", *REASONING}


class Chat(NamedTuple):
    """Messages in the form that templates take, the tools, and which of the messages are learned."""

    messages: list[dict[str, Any]]
    tools: list | None
    learned: list[bool]
    kwargs: dict[str, Any]


class ChatWriter:
    """Writes chats with a tokenizer's template.

    ``unread``: keys of messages that nothing has read so far.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        self.template, self.unread = template, set()
        if template is None:
            return
        try:
            self.template = get_training_chat_template(tokenizer) or template
        except Exception:  # TRL tries the template out, which may raise anything
            pass
        self.marked = has_generation_markers(self.template)
        added = tokenizer.added_tokens_decoder.values()
        special = [token.content for token in added if token.special]
        ends = "|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)"
        # a turn's end: special tokens, after which there is nothing but space and such tokens
        self._end = re.compile(rf"(?:{ends})+(?P<rest>(?:\s+(?:{ends})*)*)\Z")

    def write(self, chat: Chat, where: str) -> tuple[str, list[tuple[int, int]], list[bool]]:
        """The text up to the end of the last turn that is learned; where in it the assistant's
        turns are that are learned, each with its end; whether each ends with a token of its own.

        Raises:
            InputError: if the template refuses the chat, leaves part of it out, or does not let
                its turns be told apart.
        """
        if self.template is None:
            raise InputError(f"{where}: a chat needs a chat template, and the tokenizer has none")
        first: InputError | None = None
        for form in _forms(chat, self.template):
            try:
                text, spans = self._render(form, where)
                _check_nothing_lost(form, text, where)
                break
            except InputError as error:
                first = first or error
        else:
            assert first is not None
            raise first
        ended = []
        for number, (start, stop) in enumerate(spans):
            end = self._end.search(text, start, stop)
            spans[number] = (start, end.start("rest") if end else len(text[:stop].rstrip()))
            ended.append(end is not None)
        turns = [turn for turn, each in enumerate(chat.messages) if each["role"] == "assistant"]
        if len(spans) != len(turns):
            raise InputError(
                f"{where}: the chat template marks {len(spans)} turns of the assistant's {len(turns)}"
            )
        kept = [index for index, turn in enumerate(turns) if chat.learned[turn]]
        for index in kept:
            if not ended[index] and index != len(turns) - 1:
                raise InputError(
                    f"{where}: the chat template ends the assistant's turns with no token of their own, so message "
                    f"{turns[index] + 1} would not teach where to stop; give one sample for each answer, with "
                    f'"weight": 0 on those before it'
                )
        last = spans[kept[-1]][1]
        return text[:last], [spans[index] for index in kept], [ended[index] for index in kept]

    def _render(self, chat: Chat, where: str) -> tuple[str, list[tuple[int, int]]]:
        """The whole chat, and the spans of all the assistant's turns."""
        if not self.marked:
            return self._render_turn_by_turn(chat, where)
        text, marks = self._apply(
            chat, where, len(chat.messages), return_assistant_tokens_mask=True
        )
        spans: list[tuple[int, int]] = []
        turns = sum(message["role"] == "assistant" for message in chat.messages)
        for start, stop in marks:  # some mark the end of a turn apart
            if len(marks) > turns and spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], stop)
            else:
                spans.append((start, stop))
        return text, spans

    def _render_turn_by_turn(self, chat: Chat, where: str) -> tuple[str, list[tuple[int, int]]]:
        messages = chat.messages
        text, spans = self._apply(chat, where, len(messages))[0], []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            through = self._apply(chat, where, turn + 1)[0]
            if turn:
                before, found = self._apply(chat, where, turn, add_generation_prompt=True)[0], "yes"
            else:  # what the template itself begins with, maybe a system prompt, is not learned
                before, found, _ = through.rpartition(_text_of(message).strip() or "\0")
            if not (found and text.startswith(through) and through.startswith(before)):
                raise InputError(
                    f"{where}: the chat template writes message {turn + 1} another way when others follow, and TRL has "
                    f"no training template for it, so what the assistant said cannot be told apart; give "
                    f"'prompt' and 'completion', or a template with {{% generation %}} (chat_template_path)"
                )
            spans.append((len(before), len(through)))
        return text, spans

    def _apply(self, chat: Chat, where: str, upto: int, **kwargs) -> tuple[str, list]:
        try:
            texts, marks = render_jinja_template(
                conversations=[chat.messages[:upto]],
                tools=chat.tools,
                chat_template=self.template,
                **{"add_generation_prompt": False, **self.tokenizer.special_tokens_map},
                **{**chat.kwargs, **kwargs},
            )
        except Exception as error:  # whatever a template raises, jinja2's errors and its own
            raise InputError(f"{where}: the chat template refuses this sample: {error}") from None
        return texts[0], marks[0] if marks else []

    def note_unread(self, chat: Chat) -> None:
        """Remember the keys of messages that neither this command nor the template looks at."""
        for message in chat.messages:
            self.unread.update(key for key in message.keys() - KEYS if key not in self.template)

    def warn_unread(self, data: str) -> None:
        """Say which keys of messages did not count."""
        if self.unread:
            keys = ", ".join(map(repr, sorted(self.unread)))
            warnings.warn(f"{data}: of messages nothing reads {keys}", stacklevel=2)


def _text_of(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _forms(chat: Chat, template: str) -> Iterator[Chat]:
    """The chat in the forms that templates want it in, the usual first.

    They differ in what an empty content is, in whether a tool call's arguments are an object, in
    whether contents are lists, and in what they call reasoning.
    """
    name = next((name for name in REASONING if name in template), REASONING[0])
    for empty in ("", None):
        for as_text in (False, True):
            yield chat._replace(
                messages=[_formed(message, empty, as_text, name) for message in chat.messages]
            )
    usual = [_formed(message, "", False, name) for message in chat.messages]
    if all(message["role"] in ("system", "user", "assistant", "tool") for message in usual):
        yield chat._replace(messages=prepare_multimodal_messages(usual))


def _formed(message: dict, empty: str | None, as_text: bool, reasoning: str) -> dict[str, Any]:
    formed = {key: value for key, value in message.items() if key not in ("weight", *REASONING)}
    formed["content"] = message.get("content") or empty
    thought = next((message[name] for name in REASONING if message.get(name)), None)
    if thought is not None:
        formed[reasoning] = thought
    if as_text and "tool_calls" in message:
        formed["tool_calls"] = [
            {
                **call,
                "function": {
                    **call["function"],
                    "arguments": json.dumps(call["function"]["arguments"]),
                },
            }
            for call in message["tool_calls"]
        ]
    return formed


def _check_nothing_lost(chat: Chat, text: str, where: str) -> None:
    """Raises InputError for what the chat has and the text has not, or not as often."""
    wanted = Counter()
    origin = {}
    for number, message in enumerate(chat.messages, start=1):
        for key, piece in _pieces(message):
            wanted[piece] += 1
            origin.setdefault(piece, (number, key))
    for tool in chat.tools or []:
        name = tool.get("function", tool).get("name")
        wanted[name] += 1
        origin.setdefault(name, (0, "tools"))
    for piece, times in wanted.items():
        written = {piece, json.dumps(piece)[1:-1], json.dumps(piece, ensure_ascii=False)[1:-1]}
        if sum(text.count(each) for each in written) < times:
            number, key = origin[piece]
            whose = f"message {number}'s {key!r}" if number else f"{key!r}"
            raise InputError(
                f"{where}: the chat template leaves out {whose} ({piece!r:.60}), which would be lost without a word"
            )


def _pieces(message: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The strings of a message that must be found in the text, with the key they stand under."""
    for key in ("content", *REASONING):
        value = message.get(key) or ""
        parts = [value] if isinstance(value, str) else [part["text"] for part in value]
        for part in parts:  # templates write the thought apart, in lines of its own
            for piece in re.split(r"</?think>", part):
                if piece.strip():
                    yield key, piece.strip()
    for call in message.get("tool_calls") or []:
        function = call["function"]
        yield "tool_calls", function["name"]
        arguments = function["arguments"]
        yield from (("tool_calls", piece) for piece in _leaves(arguments))


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(key)
            yield from _leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each)
    elif isinstance(value, str) and value.strip():
        yield value.strip()
