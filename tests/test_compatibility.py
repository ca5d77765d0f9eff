"""The table of what works with what: every row names a test that exists, and refuses in words that
the package has."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "compatibility.md"


def rows(page: Path) -> list[list[str]]:
    """The cells of each row of its tables, without their heads."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[-1] != "held by" and not set(row[0]) <= {"-", " "}]


def words(folder: Path) -> list[str]:
    """All strings of the code in ``folder``, with ``{}`` for what an f-string puts in."""
    found = []
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "{}" for p in node.values]
                found.append("".join(parts))
    return found


@pytest.mark.parametrize("row", rows(PAGE), ids=lambda row: row[0][:40])
def test_a_row_names_tests_that_exist(row):
    tests = re.findall(r"`(tests/[\w/.]+)::(\w+)`", row[-1])
    assert tests or row[1].startswith("not tried"), f"{row[0]}: no test holds it"
    for path, name in tests:
        file = ROOT / path
        assert file.exists() and re.search(rf"^def {name}\(", file.read_text(), re.M), (path, name)


def test_refusals_are_quoted_as_the_package_has_them():
    said = words(ROOT / "losia_kernels")
    refused = 0
    for what, outcome, _ in rows(PAGE):
        quoted = re.findall(r'"([^"]+)"', outcome)
        assert bool(quoted) == bool(re.search("refused|warn", outcome)), what
        for quote in quoted:
            assert any(quote in text for text in said), f"{what}: nothing says {quote!r}"
        refused += bool(quoted)
    assert refused > 10


def test_every_trainer_of_the_table_is_in_the_test_that_holds_it():
    pytest.importorskip("trl")
    from tests.integrations.test_trl_trainers import TRAINERS

    held = [row[0] for row in rows(PAGE) if "test_one_line_is_enough" in row[-1]]
    named = re.findall(r"\w+", " ".join(cell.partition(":")[2] for cell in held))
    assert sorted(named) == sorted(TRAINERS)
