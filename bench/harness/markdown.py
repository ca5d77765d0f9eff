"""Tables in Markdown, and the places in a page that hold one."""

import re
from collections.abc import Callable, Iterable

MARKER = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench:\2 -->)", re.DOTALL)


def table(head: str | Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """``head``: names, or "one | two"; the first column to the left, the others to the right. Empty without a body."""
    head = head.split(" | ") if isinstance(head, str) else list(head)
    body = list(map(list, body))
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if body else ""


def number(value: float, digits: int = 4) -> str:
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e" in text or float(text) >= 10 ** (digits - 1) else text


def fill_markers(text: str, content: Callable[[str], str]) -> str:
    """``text`` with ``content(NAME)`` between each ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->``."""
    return MARKER.sub(lambda found: f"{found[1]}{content(found[2])}\n{found[3]}", text)
