"""The documents: links lead somewhere, every page is in the index, the reference is what the
docstrings say."""

import importlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import losia_kernels

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(
            page
            for folder in ("docs", "examples", "bench", "tests")
            for page in (ROOT / folder).rglob("*.md")
        ),
    ]
)


def links(page: Path) -> Iterator[str]:
    """Targets of ``[text](target)`` and ``[label]: target`` outside of fenced code, without those on
    the web."""
    text = prose(page)
    inline = re.findall(r"\]\(([^()\s]+)\)", re.sub(r"`[^`\n]*`(?!\])", "", text))
    for target in [*inline, *labels(text).values()]:
        if not target.startswith(("http://", "https://", "mailto:")):
            yield target


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def labels(text: str) -> dict[str, str]:
    """Where ``[text][label]`` leads."""
    return dict(re.findall(r"^\[([^\]]+)\]: (\S+)$", text, flags=re.M))


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert target.is_relative_to(ROOT), f"{page.name} links out of the repository: {link}"
        assert not anchor or anchor in anchors(target), (
            f"{page.name} links to {link}: no such heading"
        )


def test_the_reader_of_links_finds_them():
    assert {"docs/tutorial.md", "examples", "losia_kernels/kernels"} <= set(
        links(ROOT / "README.md")
    )


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_label_is_defined_and_used(page):
    text = prose(page)
    used = set(re.findall(r"\]\[([^\]]+)\]", re.sub(r"`[^`]*`(?!\])", "", text)))
    assert used == set(labels(text))


def test_the_figures_of_the_readme_are_those_that_were_measured():
    text = (ROOT / "examples" / "past_tense" / "results-cpu.json").read_text()
    results = json.loads(text)["results"]
    rows = {
        "untrained": results["untrained"],
        "LoSiA": results["losia"],
        "LoRA r = 8": results["lora-8"],
        "LoRA r = 64": results["lora-64"],
    }
    formats = {
        "exact_match": "{:.1f} %",
        "exact_match_irregular": "{:.1f} %",
        "seconds_per_step": "{:.2f}",
        "peak_memory_gib": "{:.2f}",
        "trained_values": "{:,}",
    }
    readme = (ROOT / "README.md").read_text()
    for name, row in rows.items():
        cells = [form.format(row[key]) if key in row else "" for key, form in formats.items()]
        assert re.sub(" +", " ", f"| {name} | {' | '.join(cells)} |") in readme


NAMES = re.compile(
    r"^from (losia_kernels[\w.]*) import ([\w, ]*\w)|`(losia_kernels(?:\.\w+)*)", re.M
)


def find(path: str) -> object:
    """What a dotted path names; skips where what it needs is not installed."""
    found = losia_kernels
    for part in path.split(".")[1:]:
        if not hasattr(found, part):
            try:
                importlib.import_module(f"{found.__name__}.{part}")
            except ModuleNotFoundError as error:
                assert not error.name.startswith("losia_kernels"), f"there is no {path}"
                pytest.skip(f"{path} needs {error.name}")
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], ids=lambda page: page.name
)
def test_what_a_page_names_of_the_package_is_there(page):
    for module, names, dotted in NAMES.findall(page.read_text()):
        for name in names.split(", ") if names else [""]:
            find(dotted or f"{module}.{name}")


def test_the_index_names_every_page():
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert {link for link in links(ROOT / "docs" / "index.md") if "/" not in link} == pages


def reference_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "make_reference", ROOT / "docs" / "make_reference.py"
    )
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_reference_is_what_the_docstrings_say():
    pytest.importorskip("peft", reason="its adapter is part of the reference")
    script = reference_script()
    assert script.PAGE.read_text() == script.reference(), (
        "docs/reference.md is not up to date: make docs"
    )


def test_a_docstring_becomes_markdown():
    text = "What ``f`` does.\n\nSize\n    rank, p: a share\n        of all.\n\n    code(1)\n\nEnd."
    assert list(reference_script().markdown(text)) == [
        "What `f` does.",
        "",
        "Size",
        "",
        "- **rank, p**: a share",
        "  of all.",
        "",
        "```python",
        "code(1)",
        "```",
        "",
        "End.",
        "",
    ]


def test_sections_of_a_docstring_become_markdown():
    text = """What it does.

Args:
    x: ``[t, n]``, which
        may be empty.
    out_idx, in_idx: where.

Returns:
    A tensor: ``[t, k]``,
    contiguous.

Raises:
    ValueError: no.

A tree:
    file.py   what it: holds
"""
    assert (
        "\n".join(reference_script().markdown(text))
        == """What it does.

**Args**

- **x**: `[t, n]`, which
  may be empty.
- **out_idx, in_idx**: where.

**Returns**

A tensor: `[t, k]`,
contiguous.

**Raises**

- **ValueError**: no.

A tree:

```
file.py   what it: holds
```
"""
    )


def test_the_reference_has_what_a_class_inherits():
    script = reference_script()
    names = script.members(losia_kernels.LoSiALinear)
    assert {"from_linear", "write_back_", "set_subnet_"} <= names.keys()
    assert names["forward"] is losia_kernels.LoSiALinear.forward
    assert "extra_repr" in names and "requires_grad_" not in names  # torch has its own reference
