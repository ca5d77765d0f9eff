"""Data in every format: the same rows, whatever file, folder or compression they come in; what cannot
be read is named."""

import bz2
import gzip
import json
import lzma
import os
import zipfile

import datasets
import pytest

from losia_kernels.finetune.options import InputError
from losia_kernels.finetune.rows import NEEDED, is_local, read_rows

ROWS = [{"prompt": f"{n}+1=", "completion": f"{n + 1}"} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """Tables are cached where nobody else looks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def read(data, **changes):
    return list(read_rows(str(data), **changes))


def values(data, **changes):
    return [row.values for row in read(data, **changes)]


def table() -> datasets.Dataset:
    return datasets.Dataset.from_list(ROWS)


def parquet(path) -> bytes:
    table().to_parquet(path)
    return path.read_bytes()


def zipped(path, *names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, LINES)


WRITERS = {
    "d.jsonl": lambda path: path.write_text(LINES),
    "d.ndjson": lambda path: path.write_bytes(
        b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode()
    ),
    "d.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "lines.json": lambda path: path.write_text(LINES),
    "d.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "d.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(LINES.encode())),
    "d.json.xz": lambda path: path.write_bytes(lzma.compress(json.dumps(ROWS).encode())),
    "d.csv": lambda path: table().to_csv(path),
    "d.csv.gz": lambda path: path.write_bytes(
        gzip.compress(
            ("prompt,completion\n" + "".join(",".join(r.values()) + "\n" for r in ROWS)).encode()
        )
    ),
    "d.tsv": lambda path: table().to_csv(path, sep="\t"),
    "d.parquet": lambda path: table().to_parquet(path),
    "d.parquet.gz": lambda path: path.write_bytes(gzip.compress(parquet(path))),
    "d[1].csv": lambda path: table().to_csv(path),
    "d*?.tsv": lambda path: table().to_csv(path, sep="\t"),
    "d[1].jsonl": lambda path: path.write_text(LINES),
    "d.jsonl.zip": lambda path: zipped(path, "d.jsonl", "__MACOSX/._d.jsonl"),
    "saved": lambda path: table().save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_rows_are_those_of_the_lines(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert values(tmp_path / name) == ROWS


def test_in_a_csv_everything_is_text(tmp_path):
    (tmp_path / "d.csv").write_text('prompt,completion\n007,NA\n"a\nb",\n')
    assert values(tmp_path / "d.csv") == [
        {"prompt": "007", "completion": "NA"},
        {"prompt": "a\nb", "completion": ""},
    ]


def test_a_field_of_a_csv_may_be_long(tmp_path):
    long = "x" * 200_000
    (tmp_path / "d.csv").write_text(f"prompt,completion\n{long},a\n")
    assert values(tmp_path / "d.csv") == [{"prompt": long, "completion": "a"}]


@pytest.mark.parametrize("name", ["d.csv", "d.csv.gz", "d.parquet", "d.parquet.gz", "folder"])
def test_what_stands_in_a_file_now_is_read_whatever_its_time(tmp_path, name):
    """Files that were copied or unpacked have their times from elsewhere; ``datasets`` takes one of
    the same name and time for the same."""
    for word in ("before", "after!"):
        file = tmp_path / name
        if name == "folder":
            file = tmp_path / name / "train.csv"
            file.parent.mkdir(exist_ok=True)
        rows = datasets.Dataset.from_list([{"prompt": "a", "completion": word}])
        rows.to_parquet(file) if "parquet" in name else rows.to_csv(file)
        if name.endswith(".gz"):
            file.write_bytes(gzip.compress(file.read_bytes()))
        os.utime(file, (1e9, 1e9))
        assert values(tmp_path / name) == [{"prompt": "a", "completion": word}]


def test_a_folder_is_read_split_by_split(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.jsonl").write_text(LINES)
    (tmp_path / "train" / "b.jsonl").write_text(LINES)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "c.jsonl").write_text('{"text": "held out"}\n')
    with pytest.warns(UserWarning, match="test is not read, only train"):
        assert values(tmp_path) == ROWS + ROWS
    assert values(tmp_path, split="test") == [{"text": "held out"}]
    with pytest.raises(InputError, match="has no split 'validation', only "):
        values(tmp_path, split="validation")


def test_a_chat_in_a_table_has_only_the_keys_that_it_was_given(tmp_path):
    """A table's columns give every message the keys of all."""
    chats = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "assistant", "content": "c", "weight": 0}]},
    ]
    datasets.Dataset.from_list(chats).to_parquet(tmp_path / "d.parquet")
    assert values(tmp_path / "d.parquet") == chats


def test_tools_of_different_shapes_stay_as_they_are(tmp_path):
    """In columns one type would have to fit all: then each has the properties of all."""
    tools = [
        [{"function": {"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}}}],
        [
            {
                "function": {
                    "name": "g",
                    "parameters": {"properties": {"y": {"enum": [1, "a", None]}}},
                }
            }
        ],
    ]
    calls = [{"y": "1"}, '{"y": 2}']
    rows = [
        {"messages": [{"tool_calls": call}], "tools": tool}
        for call, tool in zip(calls, tools, strict=True)
    ]
    (tmp_path / "d.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    assert values(tmp_path / "d.jsonl") == rows
    assert [row.where.rpartition(":")[2] for row in read(tmp_path / "d.jsonl")] == ["1", "3"]
    text = [{"tools": json.dumps(tool)} for tool in tools]
    datasets.Dataset.from_list(text).to_parquet(tmp_path / "d.parquet")
    assert [row["tools"] for row in values(tmp_path / "d.parquet")] == tools


def test_a_name_is_passed_on_to_the_hub(monkeypatch):
    asked = []

    def load(path, **how):
        asked.append((path, how))
        return table()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert values("someone/somedata", config="small", split="train[:3]") == ROWS
    assert asked == [("someone/somedata", {"name": "small", "split": "train[:3]"})]
    assert not is_local("someone/somedata") and is_local("somewhere/data.jsonl")


def test_what_the_hub_says_is_told_in_a_line(monkeypatch):
    def load(path, **how):
        raise ConnectionError("Couldn't reach 'someone/somedata'\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(InputError) as error:
        values("someone/somedata")
    assert str(error.value) == (
        "cannot read someone/somedata as a data set of the hub (there is no such file or folder): "
        "Couldn't reach 'someone/somedata'"
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.jsonl.gz", b"not compressed", "cannot read .*d.jsonl.gz: "),
        ("d.json", b'[{"text": "a"},', r"d.json: not valid JSON: .*"),
        ("d.json", b"[" * 100_000, r"d.json: not valid JSON: nested too deep"),
        ("d.json", b'[{"text": "a"}, 3]', None),
        ("d.parquet", b"PAR1 and no more", "cannot read .*d.parquet: "),
        ("d.jsonl", LINES.encode("utf-16"), "d.jsonl is UTF-16: write it as UTF-8"),
        ("d.jsonl", b'{"a": "1", "b": [{"c": 1, "c": 2}]}', "d.jsonl:1: .* 'c' stands twice"),
        ("d.json", b'[{"text": "1", "text": "2"}]', "d.json: .* key 'text' stands twice"),
        ("d.jsonl.zip", b"PK and no more", "cannot read .*d.jsonl.zip: "),
        ("d.csv", b'prompt,completion\na,b\n"c,d\n', "cannot read .*d.csv: "),
        ("d.docx", b"", "the name does not say what it holds; known are .json, .jsonl"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    if words is None:
        assert [row.where[-8:] for row in read(tmp_path / name)] == ["sample 1", "sample 2"]
        return
    with pytest.raises(InputError, match=words) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_an_archive_of_several_files_is_refused(tmp_path):
    """Of which the first alone would be read."""
    zipped(tmp_path / "d.jsonl.zip", "a.jsonl", "b.jsonl")
    with pytest.raises(InputError, match="d.jsonl.zip holds 2 files, expected one"):
        values(tmp_path / "d.jsonl.zip")


@pytest.mark.parametrize(("suffix", "library"), NEEDED.items())
def test_what_an_unpacking_needs_is_named(tmp_path, monkeypatch, suffix, library):
    monkeypatch.setattr("losia_kernels.finetune.rows.infer_compression", lambda name: None)
    for name in (f"d.jsonl{suffix}", f"d.csv{suffix}"):
        (tmp_path / name).write_bytes(b"packed")
        with pytest.raises(InputError, match=f"{suffix} needs {library}, which is not installed"):
            values(tmp_path / name)


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.csv", "absent.parquet"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(InputError, match=f"cannot read .*{name}: No such file"):
        read(tmp_path / name)


def test_a_row_longer_than_the_header_is_refused(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("prompt,completion\nHello, you,hi\nBye,bye\n")
    with pytest.raises(InputError, match="row 2 has 3 fields, the header 2"):
        list(read_rows(str(path)))


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    (folder / "c.csv").write_text("text\nc\n")
    with pytest.warns(UserWarning, match="is not read"):
        assert len(list(read_rows(str(folder)))) == 1


@pytest.mark.parametrize("name", ["train.jsnl", "Train.jsonl", "trian.jsonl", "train.json"])
def test_a_name_that_is_nearly_a_files_is_not_asked_of_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("it was asked"))
    (tmp_path / "train.jsonl").write_text(LINES)
    for given in (name, str(tmp_path / name)):
        with pytest.raises(InputError, match=r"there is no|No such file") as error:
            read(given)
        assert "did you mean" in str(error.value) and "train.jsonl?" in str(error.value)


def test_a_stream_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ("-", "/dev/stdin", "/dev/fd/63", tmp_path / "pipe.jsonl"):
        with pytest.raises(InputError, match="is a stream: data is read more than once"):
            read(name)


def test_one_object_over_several_lines_is_told_apart_from_broken_json(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps(ROWS[0], indent=2))
    with pytest.raises(InputError, match="one object over several lines; expected one object a"):
        read(path)
    path.write_text(json.dumps(ROWS[0], indent=2)[:-3])
    with pytest.raises(InputError, match="d.json:1: not valid JSON"):
        read(path)


def test_names_of_columns_alone_are_no_rows(tmp_path):
    (tmp_path / "d.csv").write_text("prompt,completion\n")
    assert read(tmp_path / "d.csv") == []
