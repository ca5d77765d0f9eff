"""What a row says: a chat, or a prompt and its completion; and what is not understood, by name."""

import copy
import json
from typing import Any

from trl import SFTConfig
from trl.data_utils import is_conversational_from_value, maybe_convert_to_chatml

from .chat import REASONING, Chat
from .options import InputError
from .rows import Row

FORMS = "{'prompt', 'completion'}, {'messages'} or {'text'}"
SPEAKERS = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
BESIDE_CHATS = {"tools", "system", "chat_template_kwargs"}
# Columns of other formats, and what to write instead.
OTHER_FORMATS = {
    (
        "instruction",
        "input",
        "output",
    ): "write 'instruction' and 'input' as one 'prompt', rename 'output' to 'completion' (Alpaca)",
    (
        "instruction",
        "output",
    ): "rename 'instruction' to 'prompt' and 'output' to 'completion' (Alpaca)",
    ("instruction", "response"): "rename 'instruction' to 'prompt' and 'response' to 'completion'",
    ("question", "answer"): "rename 'question' to 'prompt' and 'answer' to 'completion'",
    ("prompt", "response"): "rename 'response' to 'completion'",
    ("input", "output"): "rename 'input' to 'prompt' and 'output' to 'completion'",
    (
        "chosen",
        "rejected",
    ): "of preferences only the answer to learn counts: rename 'chosen' to 'completion' or "
    "'messages'",
    ("content",): "rename 'content' to 'text'",
}


def read_chat(row: Row, unread: set[str]) -> Chat | None:
    """The row's chat, if it is one, ``unread`` getting the columns that do not count.

    Raises:
        InputError: for what is malformed, or would be lost.
    """
    values, where = row
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected an object, {FORMS}; got {type(values).__name__}")
    _check_characters(values, where)
    if "conversations" in values and "messages" not in values:
        if not is_conversational_from_value(values) and not _are_messages(values["conversations"]):
            raise InputError(f"{where}: 'conversations' must be a list of {{'from', 'value'}}")
        values = maybe_convert_to_chatml(copy.deepcopy(values))
    prompt, completion = values.get("prompt"), values.get("completion")
    if "messages" in values:
        if "prompt" in values:
            raise InputError(f"{where}: expected exactly one of {FORMS}; got {sorted(values)}")
        before, messages, said = [], values["messages"], {"messages"}
    elif isinstance(prompt, list) and isinstance(completion, list):
        before, messages, said = prompt, completion, {"prompt", "completion"}
    else:
        return None
    unread |= values.keys() - BESIDE_CHATS - said
    if not isinstance(messages, list) or not messages:
        raise InputError(
            f"{where}: 'messages' must be a list of {{'role', 'content'}}, got {messages!r:.80}"
        )
    read = [_read_message(each, where) for each in [*before, *messages]]
    system = values.get("system")
    if system:
        if not isinstance(system, str) or read[0]["role"] == "system":
            raise InputError(f"{where}: 'system' must be a string, and the only system message")
        read.insert(0, {"role": "system", "content": system})
    first = len(read) - len(messages)
    learned = [
        message["role"] == "assistant" and turn >= first and message.get("weight", 1) == 1
        for turn, message in enumerate(read)
    ]
    if all(message["role"] != "assistant" for message in read):
        roles = ", ".join(sorted({message["role"] for message in read}))
        raise InputError(
            f"{where}: no message has the role 'assistant': nothing to learn (there are: {roles})"
        )
    if not any(learned):
        raise InputError(
            f"{where}: every message of the assistant has the weight 0: nothing to learn"
        )
    return Chat(
        read,
        _read_tools(values.get("tools"), where),
        learned,
        values.get("chat_template_kwargs") or {},
    )


def read_text(row: Row, config: SFTConfig, unread: set[str]) -> tuple[str, str]:
    """The row's prompt, empty of a plain text, and what follows it.

    Raises:
        InputError: for what is malformed, would be lost, or is of another format.
    """
    values, where = row
    field = config.dataset_text_field
    if ("prompt" in values) == (field in values) or (
        "prompt" in values and "completion" not in values
    ):
        for columns, advice in OTHER_FORMATS.items():
            if values.keys() >= set(columns):
                raise InputError(
                    f"{where}: the columns {', '.join(map(repr, columns))} are not known: {advice}"
                )
    if ("prompt" in values) == (field in values):
        raise InputError(f"{where}: expected exactly one of {FORMS}; got {sorted(values)}")
    keys = ("prompt", "completion") if "prompt" in values else (field,)
    for key in keys:
        if not isinstance(values.get(key), str):
            raise InputError(f"{where}: {key!r} must be a string, got {values.get(key)!r:.80}")
        if not values[key] and key != "prompt":
            raise InputError(f"{where}: {key!r} is empty: nothing to learn")
    for key in ("tools", "system"):
        if values.get(key):
            raise InputError(
                f"{where}: {key!r} beside {keys[0]!r} would be lost: write a chat, 'messages'"
            )
    unread |= values.keys() - {*keys, "tools", "system"}
    return (values["prompt"], values["completion"]) if len(keys) == 2 else ("", values[field])


def _read_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError(
            f"{where}: a message must have 'role' and 'content' strings, got {message!r:.80}"
        )
    message = {**message, "role": SPEAKERS.get(message["role"], message["role"])}
    content = message.get("content")
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        message["content"] = content = "".join(part["text"] for part in content)
    if isinstance(content, list):
        kinds = [
            part.get("type") if isinstance(part, dict) else type(part).__name__ for part in content
        ]
        raise InputError(f"{where}: of a message's content only text can be learned, got {kinds}")
    says = any(message.get(key) for key in ("tool_calls", *REASONING))
    if not (
        isinstance(content, str) or (content is None and message["role"] == "assistant" and says)
    ):
        raise InputError(
            f"{where}: a message must have 'role' and 'content' strings, got {message!r:.80}"
        )
    if message.get("weight", 1) not in (0, 1):
        raise InputError(f"{where}: a message's 'weight' is 0 or 1, got {message['weight']!r}")
    if message.get("tool_calls"):
        message["tool_calls"] = [_read_call(call, where) for call in message["tool_calls"]]
    else:
        message.pop("tool_calls", None)
    return message


def _is_text_part(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and isinstance(part.get("text"), str)
        and part.get("type", "text") == "text"
    )


def _read_call(call: Any, where: str) -> dict[str, Any]:
    """A tool call with its arguments as an object, which servers write as a string of JSON."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(f"{where}: a tool call must have a function with a name, got {call!r:.80}")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        raise InputError(
            f"{where}: the arguments of {function['name']} must be an object, or a string of one in JSON, got "
            f"{function['arguments']!r:.80}"
        )
    rest = (
        {} if function is call else {key: value for key, value in call.items() if key != "function"}
    )
    return {"type": "function", **rest, "function": {**function, "arguments": arguments}}


def _read_tools(tools: Any, where: str) -> list | None:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise InputError(f"{where}: 'tools' is not valid JSON: {error}") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(map(_is_tool, tools)):
        raise InputError(
            f"{where}: 'tools' must be a list of functions with names, got {tools!r:.80}"
        )
    return tools


def _is_tool(tool: Any) -> bool:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _are_messages(messages: Any) -> bool:
    return isinstance(messages, list) and all(
        isinstance(message, dict) and "role" in message for message in messages
    )


def _check_characters(values: dict, where: str) -> None:
    """JSON can say half of a character beyond 0xffff, as in a text that was cut there; no tokenizer
    takes it."""
    text = json.dumps(values, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise InputError(
            f"{where}: it has half of a character, {half}, after {text[: error.start][-20:]!r}"
        ) from None
