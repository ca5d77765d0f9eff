"""The documents: links lead somewhere, every page is in the index, the reference is what the
docstrings say."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

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
    """Targets of ``[text](target)`` outside of fenced code, without those on the web."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^()\s]+)\)", re.sub(r"`[^`\n]*`(?!\])", "", prose)):
        if not target.startswith(("http://", "https://", "mailto:")):
            yield target


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
