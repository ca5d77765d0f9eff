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
THOUGHT = re.compile(r"\s*<think>(?P<thought>.*?)</think>\s*", re.DOTALL)
# What each message may have; of anything else it is said that nothing reads it.
KEYS = {"role", "content", "tool_calls", "tool_call_id", "name", "weight", "type", *REASONING}


class Chat(NamedTuple):
    """Messages in the form that templates take, the tools, and which of the messages are learned."""

    messages: list[dict[str, Any]]
    tools: list | None
    learned: list[bool]
    kwargs: dict[str, Any]


class Part(NamedTuple):
    """Characters of a text that are learned; whether they end with the token of a turn's end;
    whether they are the chat's last."""

    start: int
    stop: int
    ended: bool
    last: bool


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
        self._source = re.sub(r"\{#.*?#\}", "", self.template, flags=re.DOTALL)
        added = tokenizer.added_tokens_decoder.values()
        self._ends = [
            _end_pattern([token.content for token in added if token.special or not only_special])
            for only_special in (True, False)
        ]
        known = {token.content for token in added if token.special} | {tokenizer.eos_token}
        own = [
            re.escape(each) for each in known if each in self._source or each == tokenizer.eos_token
        ]
        self._own_end = re.compile(rf"(?:\s*(?:{'|'.join(own)}))+\s*\Z")

    def write(self, chat: Chat, where: str) -> tuple[str, list[Part]]:
        """The text up to the end of the last turn that is learned, and the parts of it that are.

        Raises:
            InputError: if the template refuses the chat, leaves part of it out, or does not let
                its turns be told apart.
        """
        if self.template is None:
            raise InputError(
                f"{where}: 'messages' need a chat template, and the tokenizer has none"
            )
        chat = self._without_own_ends(chat)
        text, spans = self._render_whole(chat, where)
        turns = [turn for turn, each in enumerate(chat.messages) if each["role"] == "assistant"]
        learned = [chat.learned[turn] for turn in turns]
        if len(spans) != len(turns):
            if not all(learned):
                raise InputError(
                    f"{where}: the chat template marks {len(spans)} parts of the assistant's {len(turns)} messages, so "
                    f"which of them has the weight 0 cannot be told"
                )
            turns, learned = [turns[-1]] * len(spans), [True] * len(spans)
        parts = []
        for index, (start, stop) in enumerate(spans):
            stop, ended = self._find_end(text, start, stop)
            if not learned[index]:
                continue
            if not ended and index != len(spans) - 1:
                raise InputError(
                    f"{where}: the chat template ends the assistant's turns with no token of their own, so message "
                    f"{turns[index] + 1} would not teach where to stop; give one sample for each answer, with "
                    f'"weight": 0 on those before it'
                )
            parts.append(Part(start, stop, ended, last=index == len(spans) - 1))
        return text[: parts[-1].stop], parts

    def _without_own_ends(self, chat: Chat) -> Chat:
        """Contents of the assistant's without an end of the turn that they bring along, as chats that
        were written out do: the template writes it."""
        messages = [
            {**message, "content": self._own_end.sub("", message["content"])}
            if message["role"] == "assistant" and message.get("content")
            else message
            for message in chat.messages
        ]
        return chat._replace(messages=messages)

    def _find_end(self, text: str, start: int, stop: int) -> tuple[int, bool]:
        """Where a turn ends, and whether it does with a token of its own."""
        for pattern in self._ends:
            end = pattern.search(text, start, stop)
            if end:
                return end.start("rest"), True
        return len(text[:stop].rstrip()), False

    def _render_whole(self, chat: Chat, where: str) -> tuple[str, list[tuple[int, int]]]:
        """The chat in the first form of which nothing is lost."""
        lost: list[tuple[str, str]] | None = None
        refusal: InputError | None = None
        for form in _forms(chat, self._source):
            try:
                text, spans = self._render(form, where)
            except InputError as error:
                refusal = refusal or error
                continue
            missing = _find_lost(chat, text)
            if (
                chat.tools
                and not missing
                and self._apply(form._replace(tools=None), where)[0] == text
            ):
                missing = [("'tools'", chat.tools[0].get("function", chat.tools[0])["name"])]
            missing = missing or self._find_unwritten_calls(form, text, where)
            if not missing:
                return text, spans
            lost = missing if lost is None or len(missing) < len(lost) else lost
        if lost is None:
            assert refusal is not None
            raise refusal
        key, piece = lost[0]
        raise InputError(
            f"{where}: the chat template leaves out {key} ({piece!r:.60}), which would be lost without a word"
        )

    def _render(self, chat: Chat, where: str) -> tuple[str, list[tuple[int, int]]]:
        """The whole chat, and the spans of all the assistant's turns."""
        if not self.marked:
            return self._render_turn_by_turn(chat, where)
        text, marks = self._apply(chat, where, return_assistant_tokens_mask=True)
        spans: list[tuple[int, int]] = []
        turns = sum(message["role"] == "assistant" for message in chat.messages)
        marks = [(start, stop) for start, stop in marks if start < stop]
        for start, stop in marks:  # some mark the end of a turn apart
            if len(marks) > turns and spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], stop)
            else:
                spans.append((start, stop))
        return text, spans

    def _find_unwritten_calls(self, chat: Chat, text: str, where: str) -> list[tuple[str, str]]:
        """Calls without which the text is the same: what they say may stand elsewhere in it, in the
        tools' descriptions or the question."""
        for number, message in enumerate(chat.messages):
            if message.get("tool_calls"):
                without = {key: value for key, value in message.items() if key != "tool_calls"}
                others = [*chat.messages[:number], without, *chat.messages[number + 1 :]]
                called = message["tool_calls"][0]["function"]["name"]
                try:
                    same = self._apply(chat._replace(messages=others), where)[0] == text
                except InputError:  # a template may want one or the other
                    same = False
                if same:
                    return [(f"message {number + 1}'s 'tool_calls'", called)]
        return []

    def _render_turn_by_turn(self, chat: Chat, where: str) -> tuple[str, list[tuple[int, int]]]:
        messages = chat.messages
        text, spans = self._apply(chat, where)[0], []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            through = self._apply(chat, where, turn + 1)[0]
            if turn:
                before = self._apply(chat, where, turn, add_generation_prompt=True)[0]
            elif words := _words(message):
                before = through.rpartition(words)[0]  # maybe a system prompt of the template's own
            else:
                raise InputError(
                    f"{where}: message 1, the assistant's, is empty: it cannot be told apart"
                )
            if not (text.startswith(through) and through.startswith(before)):
                raise InputError(
                    f"{where}: the chat template writes message {turn + 1} another way when others follow, and TRL has "
                    f"no training template for it, so what the assistant said cannot be told apart; give "
                    f"'prompt' and 'completion', or a template with {{% generation %}} (chat_template_path)"
                )
            spans.append((len(before), len(through)))
        return text, spans

    def _apply(
        self, chat: Chat, where: str, upto: int | None = None, **kwargs: Any
    ) -> tuple[str, list]:
        try:
            texts, marks = render_jinja_template(
                conversations=[chat.messages[:upto]],
                tools=chat.tools,
                chat_template=self.template,
                **(self.tokenizer.special_tokens_map | chat.kwargs | kwargs),
            )
        except Exception as error:  # whatever a template raises, jinja2's errors and its own
            raise InputError(f"{where}: the chat template refuses this sample: {error}") from None
        return texts[0], marks[0] if marks else []

    def note_unread(self, chat: Chat) -> None:
        """Remember the keys of messages that neither this command nor the template looks at."""
        for message in chat.messages:
            self.unread.update(key for key in message.keys() - KEYS if key not in self._source)

    def warn_unread(self, data: str) -> None:
        """Say which keys of messages did not count."""
        if self.unread:
            keys = ", ".join(map(repr, sorted(self.unread)))
            warnings.warn(f"{data}: of messages nothing reads {keys}", stacklevel=2)


def _words(message: dict[str, Any]) -> str:
    content = message["content"] or ""
    return (content if isinstance(content, str) else content[0]["text"]).strip()


def _end_pattern(tokens: list[str]) -> re.Pattern:
    """A turn's end: such tokens, after which there is nothing but space and more of them."""
    end = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)"
    return re.compile(rf"(?:{end})+(?P<rest>(?:\s+(?:{end})*)*)\Z")


def _forms(chat: Chat, template: str) -> Iterator[Chat]:
    """The chat in the forms that templates want it in, the usual first.

    They differ in what an empty content is, in whether a tool call's arguments are an object, in
    whether contents are lists, and in what they call reasoning.
    """
    reasoning = next((name for name in REASONING if name in template), None)
    for empty in ("", None):
        for as_text in (False, True):
            yield chat._replace(
                messages=[_formed(message, empty, as_text, reasoning) for message in chat.messages]
            )
    usual = [_formed(message, "", False, reasoning) for message in chat.messages]
    if all(message["role"] in ("system", "user", "assistant", "tool") for message in usual):
        yield chat._replace(messages=prepare_multimodal_messages(usual))


def _formed(
    message: dict[str, Any], empty: str | None, as_text: bool, reasoning: str | None
) -> dict[str, Any]:
    formed = {key: value for key, value in message.items() if key not in ("weight", *REASONING)}
    content = message.get("content") or ""
    thought = next((message[name] for name in REASONING if message.get(name)), None)
    inline = THOUGHT.match(content) if message["role"] == "assistant" else None
    if reasoning and inline and thought is None:
        thought, content = inline["thought"].strip("\n"), content[inline.end() :].lstrip("\n")
    if reasoning and thought is not None:
        formed[reasoning] = thought
    formed["content"] = content or empty
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


def _find_lost(chat: Chat, text: str) -> list[tuple[str, str]]:
    """What the chat has and the text has not, or not as often, with the key it stands under."""
    wanted: Counter[str] = Counter()
    origin: dict[str, str] = {}
    for number, message in enumerate(chat.messages, start=1):
        for key, piece in _pieces(message):
            wanted[piece] += 1
            origin.setdefault(piece, f"message {number}'s {key!r}")
    lost = []
    for piece, times in wanted.items():
        written = {piece, json.dumps(piece)[1:-1], json.dumps(piece, ensure_ascii=False)[1:-1]}
        if sum(text.count(each) for each in written) < times:
            lost.append((origin[piece], piece))
    return lost


def _pieces(message: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The strings of a message that must be found in the text, with the key they stand under."""
    for key in ("content", *REASONING):
        # templates write a thought apart, in lines of its own
        for piece in re.split(r"</?think>", message.get(key) or ""):
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
