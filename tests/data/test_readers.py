"""Files of a split and their rows: every shape that real data comes in, and an error that says where for every shape that it must not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlm2vec.data.readers import TEXT, TEXTS, Column, find_files, read_rows
from vlm2vec.errors import DataError

ONE, MANY, MAYBE = Column("q"), Column("t", many=True), Column("n", many=True, required=False)


def write_jsonl(file: Path, *rows: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_parquet(file: Path, **columns: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)
    return file


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


# -- files -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "split", "found"),
    [
        (["original-00000-of-00001.parquet", "diverse_instruction-00000-of-00001.parquet"], "original", "original-00000-of-00001.parquet"),
        (["original-0-of-1.parquet", "diverse_instruction-0-of-1.parquet"], "diverse_instruction", "diverse_instruction-0-of-1.parquet"),
        (["train-0-of-2.parquet", "train-1-of-2.parquet"], "train", "train-0-of-2.parquet train-1-of-2.parquet"),
        (["train.jsonl"], "train", "train.jsonl"),
        (["train-2.jsonl", "train-10.jsonl"], "train", "train-2.jsonl train-10.jsonl"),  # by number, not by letter
        (["my-split-00000-of-00001.parquet"], "my-split", "my-split-00000-of-00001.parquet"),
        (["train.jsonl", "._train.jsonl", "README.md", "trainer.jsonl"], "train", "train.jsonl"),
    ],
)
def test_find_files(tmp_path: Path, names: list[str], split: str, found: str) -> None:
    touch(tmp_path / "OK-VQA", *names)
    assert find_files(tmp_path, "OK-VQA", split) == [tmp_path / "OK-VQA" / name for name in found.split()]


def test_a_path_may_name_a_file(tmp_path: Path) -> None:
    touch(tmp_path, "mine/pairs.jsonl")
    assert find_files(tmp_path, "mine/pairs.jsonl", "original") == [tmp_path / "mine/pairs.jsonl"]


@pytest.mark.parametrize(
    ("names", "path", "split", "message"),
    [
        (["A/train.jsonl"], "A", "original", r"A has no split 'original'; available: train$"),
        (["A/original.jsonl", "A/test.jsonl"], "A", "orginal", r"available: original, test; did you mean original\?"),
        (["A/notes.txt"], "A", "train", "available: nothing"),
        (["SUN_397/a.jsonl", "CIRR/a.jsonl", "images/x.png"], "SUN-397", "a", "not found .* holds CIRR, SUN_397; did you mean SUN_397"),
        ([f"{index:03d}/a.jsonl" for index in range(33)], "A", "a", "029 and 3 more"),
        (["A/a-00000-of-00003.parquet", "A/a-00002-of-00003.parquet"], "A", "a", "split 'a' should have 3 shards; missing: 1"),
        (["A/a-00000-of-00001.parquet", "A/a.jsonl"], "A", "a", "more than once .*keep one"),
        (["A/a-00000-of-00001.parquet", "A/a-00000-of-00002.parquet"], "A", "a", "more than once"),
    ],
)  # fmt: skip
def test_files_that_are_not_there(tmp_path: Path, names: list[str], path: str, split: str, message: str) -> None:
    touch(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        find_files(tmp_path, path, split)


def test_a_root_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data folder .*nowhere does not exist"):
        find_files(tmp_path / "nowhere", "A", "train")


# -- rows --------------------------------------------------------------------------------------------------------------------------------


def test_parquet_and_jsonl_give_the_same_rows(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"q": "ä\n", "t": ["a", None]}, {"q": None, "t": []}, {"q": "", "t": None}]
    columns = {"q": pa.array([row["q"] for row in rows]), "t": pa.array([row["t"] for row in rows], pa.list_(pa.string()))}
    files = [write_jsonl(tmp_path / "a.jsonl", *rows), write_parquet(tmp_path / "a.parquet", **columns)]
    tables = [read_rows([file], [ONE, MANY, MAYBE]) for file in files]
    assert tables[0].schema == tables[1].schema == pa.schema({"q": TEXT, "t": TEXTS, "n": TEXTS})
    assert tables[0].to_pylist() == tables[1].to_pylist()
    assert tables[0].to_pydict() == {"q": ["ä\n", "", ""], "t": [["a", ""], [], []], "n": [[], [], []]}


@pytest.mark.parametrize(
    "stored",
    [
        pa.array(["a", "b"]),
        pa.array(["a", "b"], pa.large_string()),
        pa.array(["a", "b"], pa.string_view()),
        pa.array(["a", "b"]).dictionary_encode(),
    ],
)
def test_text_in_any_arrow_form(tmp_path: Path, stored: pa.Array) -> None:
    file = write_parquet(tmp_path / "a.parquet", q=stored)
    assert read_rows([file], [ONE]).column("q").to_pylist() == ["a", "b"]
    assert read_rows([file], [Column("q", many=True)]).column("q").to_pylist() == [["a"], ["b"]]


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.string()), pa.large_list(pa.large_string()), pa.list_(pa.string(), 2), pa.list_(pa.dictionary(pa.int32(), pa.string()))],
)
def test_lists_in_any_arrow_form(tmp_path: Path, kind: pa.DataType) -> None:
    file = write_parquet(tmp_path / "a.parquet", t=pa.array([["a", "b"], ["c", "d"]], pa.list_(pa.string())).cast(kind))
    assert read_rows([file], [MANY]).column("t").to_pylist() == [["a", "b"], ["c", "d"]]


def test_a_column_of_nulls_is_a_column_of_absent_texts(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", q=pa.nulls(2), t=pa.nulls(2))
    assert read_rows([file], [ONE]).to_pylist() == [{"q": ""}, {"q": ""}]


def test_shards_follow_each_other_and_other_columns_are_not_read(tmp_path: Path) -> None:
    files = [write_parquet(tmp_path / f"a-{shard}.parquet", q=[f"{shard}{row}" for row in "ab"], other=[1, 2]) for shard in range(3)]
    assert read_rows(files, [ONE]).to_pydict() == {"q": ["0a", "0b", "1a", "1b", "2a", "2b"]}


def test_jsonl_with_byte_order_mark_blank_lines_and_windows_ends(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"q": "a"}\r\n\r\n\n{"q": "b", "t": "single"}')
    table = read_rows([file], [ONE, Column("t", many=True, required=False)])
    assert table.to_pydict() == {"q": ["a", "b"], "t": [[], ["single"]]}


def test_more_rows_than_a_batch(tmp_path: Path) -> None:
    rows = [{"q": str(index), "t": [str(index)] * (index % 3)} for index in range(20_000)]
    columns = {name: [row[name] for row in rows] for name in "qt"}
    for file in (write_jsonl(tmp_path / "a.jsonl", *rows), write_parquet(tmp_path / "a.parquet", **columns)):
        assert read_rows([file], [ONE, MANY]).to_pylist() == rows


# -- what must not be ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"q": "a", "t": []}\n{"q": "b", "t": ["x"]\n', r"a.jsonl:2: not valid JSON \(.*\): '{\"q\": \"b\", \"t\": \[\"x\"\]'"),
        (b'{"q": "' + b"x" * 500 + b"\n", r"a.jsonl:1: not valid JSON .*'{\"q\": \"x{73}'$"),
        (b"[" * 100_000, "a.jsonl:1: not valid JSON .*nesting too deep"),
        (b'{"q": ' + b"9" * 5000 + b"}", "a.jsonl:1: not valid JSON .*number too long"),
        (b'["q"]\n', "a.jsonl:1: expected an object .*got list"),
        (b'\n\n{"q": "\xff", "t": []}\n', "a.jsonl:3: not valid UTF-8 .*0xff at position 7"),
        (b'{"q": "a", "t": []}\n{"q": 3, "t": []}\n', "a.jsonl:2: row 1: q must be string, got int"),
        (b'{"q": "a", "t": 3}\n', "a.jsonl:1: row 0: t must be a list of strings, got int"),
        (b'{"q": "a", "t": ["x", 3]}\n', "a.jsonl:1: row 0: t must be a list of strings, got int"),
        (b'{"q": "a", "tt": []}\n', r"a.jsonl:1: row 0: t is missing; the line has q, tt"),
        (b'{"q": "\\ud800", "t": []}\n', "a.jsonl:1: row 0: q is not valid UTF-8 .*lone surrogate"),
        (b"\n\n", "a.jsonl: no rows"),
        (b"", "a.jsonl: no rows"),
    ],
)
def test_bad_jsonl(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows([file], [ONE, MANY])


def invalid_utf8(values: list[bytes]) -> pa.Array:
    """A string column that holds these bytes, as a careless writer leaves it."""
    offsets = pa.array([sum(map(len, values[:count])) for count in range(len(values) + 1)], pa.int32())
    return pa.StringArray.from_buffers(len(values), offsets.buffers()[1], pa.py_buffer(b"".join(values)))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"q": ["a"]}, "column 't' is missing; it has q"),
        ({"q": ["a"], "T": [["b"]], "tt": [["b"]]}, r"column 't' is missing; it has q, T, tt; did you mean tt\?"),
        ({"q": [3], "t": [["a"]]}, "column 'q' must be string, got int"),
        ({"q": [["a"]], "t": [["a"]]}, "column 'q' must be string, got list"),
        ({"q": ["a"], "t": [[3]]}, "column 't' must be a list of strings, got int"),
        ({"q": [b"a"], "t": [["a"]]}, "column 'q' must be string, got binary"),
        ({"q": pa.array([], pa.string()), "t": pa.array([], pa.list_(pa.string()))}, "no rows"),
        ({"q": invalid_utf8([b"fine", b"\xed\xa0\x80"]), "t": [["a"], ["b"]]}, "row 1: q is not valid UTF-8"),
        (
            {"q": ["a"] * 9000, "t": pa.ListArray.from_arrays([*range(9000), 9001], invalid_utf8([b"x"] * 9000 + [b"\xff"]))},
            "row 8999: t is not valid UTF-8",
        ),
        ({"q": ["a"] * 3, "t": pa.ListArray.from_arrays([0, 1, 2, 3], invalid_utf8([b"x", b"\xff", b"x"]))}, "row 1: t is not valid UTF-8"),
    ],
)
def test_bad_parquet(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"a.parquet: {message}"):
        read_rows([write_parquet(tmp_path / "a.parquet", **columns)], [ONE, MANY])


def test_parquet_cut_short_anywhere(tmp_path: Path) -> None:
    whole = write_parquet(tmp_path / "whole.parquet", q=[f"text {index}" for index in range(500)]).read_bytes()
    cut = tmp_path / "cut.parquet"
    for size in range(0, len(whole), max(1, len(whole) // 40)):
        cut.write_bytes(whole[:size])
        with pytest.raises(DataError, match="cut.parquet: truncated or not a parquet file"):
            read_rows([cut], [ONE])


def test_parquet_damaged_inside(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", q=[f"text {index}" for index in range(500)])
    data = bytearray(file.read_bytes())
    data[10:200] = b"\xff" * 190
    file.write_bytes(data)
    with pytest.raises(DataError, match="a.parquet: "):
        read_rows([file], [ONE])


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(DataError, match="Git-LFS pointer"):
        read_rows([file], [ONE])


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_a_file_that_cannot_be_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=f"{name}: cannot be read: Is a directory"):
        read_rows([tmp_path / name], [ONE])
