"""Every layout of captions gives the same rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.corpora import jsonl, paint
from vlm2vec.data.own.folder import write_pairs
from vlm2vec.errors import DataError

CAPTIONS = {"a.png": "a red thing, and small", "sub/b.png": 'a "blue" one'}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in CAPTIONS:
        paint(tmp_path / name, (1, 2, 3))
    return tmp_path


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_table(folder: Path, kind: str) -> None:
    if kind == "beside":
        for name, caption in CAPTIONS.items():
            (folder / name).with_suffix(".txt").write_text(f" {caption}\n")
    elif kind.endswith("jsonl"):
        jsonl(folder / kind, [{"file_name": name, "text": caption} for name, caption in CAPTIONS.items()])
    else:
        lines = ["image,caption", 'a.png,"a red thing, and small"', 'sub/b.png,"a ""blue"" one"']
        (folder / kind).write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())


@pytest.mark.parametrize("kind", ["metadata.jsonl", "captions.csv", "beside"])
def test_every_layout(folder: Path, kind: str) -> None:
    write_table(folder, kind)
    expected = [{"query": {"text": caption}, "positive": {"image": name}} for name, caption in CAPTIONS.items()]
    assert write_pairs(folder) == (folder / "pairs.jsonl", 2) and rows(folder / "pairs.jsonl") == expected
    assert write_pairs(folder)[1] == 2  # again is no error
    with pytest.raises(DataError, match="holds something else"):
        write_pairs(folder, "image")


def test_pictures_as_queries_with_an_instruction_and_groups(folder: Path) -> None:
    jsonl(folder / "captions.jsonl", [{"path": "a.png", "caption": "red", "group": 3}])
    file, _ = write_pairs(folder, "image", "Name it:")
    assert rows(file) == [{"group": "3", "query": {"image": "a.png", "instruction": "Name it:"}, "positive": {"text": "red"}}]


def test_what_is_missing_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"a\.png: no caption; a\.txt is not there"):
        write_pairs(folder)
    jsonl(folder / "captions.jsonl", [{"path": "a.png", "caption": ""}])
    with pytest.raises(DataError, match=r"captions\.jsonl row 0: caption is empty"):
        write_pairs(folder)
    (folder / "captions.csv").write_text("file,title\na.png,red\n")
    with pytest.raises(DataError, match="keep one of them"):
        write_pairs(folder)
    (folder / "captions.jsonl").unlink()
    with pytest.raises(DataError, match=r"captions\.csv:2: none of the columns text, caption, but file, title"):
        write_pairs(folder)
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="no captions; expected one of"):
        write_pairs(folder / "empty")
