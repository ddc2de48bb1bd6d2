"""Bad rows of every kind are found with file and line, counts are exact, and one process says what several say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.corpora import jsonl, paint, png
from vlm2vec.cli import main
from vlm2vec.data.own.report import POINTS, percentiles
from vlm2vec.data.own.validate import validate

LINES: list[tuple[Any, str]] = [  # a line, and the kind of its problem
    ({"query": "fine", "positive": {"image": "red.png"}, "id": 1, "group": "a"}, ""),
    ('{"query": "torn', "unreadable row"),
    ("[1, 2]", "unreadable row"),
    (b'{"query": "\xff", "positive": "b"}', "unreadable row"),
    ({"query": "a", "positive": "b", "socre": 1}, "unknown key"),
    ({"query": "a"}, "missing key"),
    ({"query": "a", "positive": 7}, "wrong type"),
    ({"query": "a", "positive": "b", "score": -1}, "score"),
    ({"query": " ", "positive": "b"}, "empty item"),
    ({"query": "a", "positive": {"image": "absent.png"}}, "missing picture"),
    ({"query": "a", "positive": {"image": "folder/absent.png"}}, "missing picture"),
    ({"query": "a", "positive": {"image": "../red.png"}}, "path outside the root"),
    ({"query": "a", "positive": {"image": "folder"}}, "path outside the root"),
    ({"query": {"image": "torn.png"}, "positive": "b"}, "unreadable picture"),
    ({"query": {"image": "page.png"}, "positive": "b"}, "unreadable picture"),
    ({"query": {"image": "huge.png"}, "positive": "b"}, "unreadable picture"),
    ({"query": "same", "positive": "same"}, "query is its positive"),
    ({"query": "a", "positive": ["b", "b"]}, "repeated positive"),
    ({"query": "a", "positive": "b", "negatives": ["c", "b"]}, "positive is a negative"),
    ({"query": "another", "positive": "b", "id": "1"}, "duplicate id"),
]


def raw(line: Any) -> bytes:
    return line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else json.dumps(line).encode()


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    paint(tmp_path / "red.png", (200, 0, 0))
    (tmp_path / "torn.png").write_bytes(png((1, 2, 3))[:40])
    (tmp_path / "page.png").write_text("<!doctype html><html>not found</html>")
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b"\n\n".join(raw(line) for line, _ in LINES))
    return file


def test_bad_rows_of_every_kind(bad: Path) -> None:
    report = validate([bad], workers=1)
    expected: dict[str, list[int]] = {}
    for index, (_, kind) in enumerate(LINES):
        if kind:
            expected.setdefault(kind, []).append(2 * index + 1)  # a blank line stands between two rows
    found = {kind: [int(example.split(":")[1]) for example in each.examples] for kind, each in report.problems.items()}
    assert found == expected and {kind: each.count for kind, each in report.problems.items()} == {k: len(v) for k, v in expected.items()}
    assert report.problems["duplicate id"].examples == [f"{bad}:39: id: was used before, at {bad}:1"]
    assert "9000x9000 = 81,000,000 pixels" in report.problems["unreadable picture"].examples[2]
    assert "query: image 'page.png': not an image (looks like HTML" in report.problems["unreadable picture"].examples[1]
    assert report.statistics["rows"] == len(LINES)


def test_without_pictures_none_is_opened(bad: Path) -> None:
    assert not {"missing picture", "unreadable picture", "path outside the root"} & validate([bad], pictures=False).problems.keys()


def test_several_processes_say_the_same(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"query": f"q{row % 300}", "positive": {"image": f"{row % 3}.png"}} for row in range(600)]
    rows = [{**values, "id": row % 590, "group": f"g{row % 7}"} for row, values in enumerate(rows)]
    for number in range(2):
        paint(tmp_path / f"{number}.png", (number, 0, 0))
    file = jsonl(tmp_path / "many.jsonl", rows)
    one, two = (validate([file], workers=workers) for workers in (1, 2))
    assert one.as_dict() == two.as_dict()
    assert one.problems["missing picture"].count == 200 and one.problems["duplicate id"].count == 10
    made = one.statistics
    assert (made["rows"], made["groups"], made["largest group"], made["rows with id"]) == (600, 7, 86, 600)
    assert made["different"]["query"] == {"count": 300, "most rows on one": 2, "at": made["different"]["query"]["at"]}
    assert made["different"]["positive"]["count"] == 3 and made["different"]["positive"]["most rows on one"] == 200
    assert made["repeated rows"] == 300  # 300 is a multiple of 3: row and row + 300 say the same
    assert made["spread"]["picture width"] == dict.fromkeys(POINTS, 6)
    assert made["sides"]["query"]["characters"] == {"min": 2, "median": 4, "p95": 4, "max": 4}


def test_parquet_rows_and_pictures_inside_them(tmp_path: Path) -> None:
    kind = pa.struct({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()})})
    rows = [{"image": {"bytes": png((1, 1, 1)), "path": "x"}}, {"image": {"bytes": png((1, 1, 1))[:30], "path": "y.png"}}]
    pq.write_table(pa.table({"query": ["a", "b"], "positive": pa.array(rows, kind)}), tmp_path / "own.parquet")
    report = validate([tmp_path / "own.parquet"])
    assert list(report.problems) == ["unreadable picture"]
    assert report.problems["unreadable picture"].examples[0].startswith(f"{tmp_path / 'own.parquet'} row 1: positive: image 'y.png': ")


def test_what_two_splits_share_is_told_and_what_shards_share_is_not(tmp_path: Path) -> None:
    paint(tmp_path / "x.png", (1, 1, 1))
    rows = [{"query": "a", "positive": {"image": "x.png"}, "group": "g"}, {"query": "b", "positive": "c", "group": "h"}]
    train, held = jsonl(tmp_path / "train.jsonl", rows), jsonl(tmp_path / "eval.jsonl", rows[:1])
    report = validate([train, held])
    assert {kind: found.examples for kind, found in report.problems.items()} == {
        "group in two splits": [f"{held}:1: its group is also in {train}:1"],
        "picture in two splits": [f"{held}:1: a picture of its query or positive is also in {train}:1"],
    }
    assert validate([jsonl(tmp_path / f"t-{shard}.jsonl", rows) for shard in (0, 1)]).ok


@given(st.lists(st.integers(0, 30), min_size=1))
def test_percentiles_are_those_of_numpy(values: list[int]) -> None:
    counter = {value: values.count(value) for value in values}
    expected = {name: int(np.percentile(values, 100 * share, method="inverted_cdf")) for name, share in POINTS.items()}
    assert percentiles(counter) == expected


def test_the_command_shows_some_counts_all_and_fails(bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "validate", str(bad), "--show", "2", "--json", str(tmp_path / "report.json"), "--workers", "1"]) == 2
    said = capsys.readouterr()
    assert "unreadable row: 3\n" in said.out and "  and 1 more\n" in said.out and "--root names another one" in said.err
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["ok"] is False and stored["problems"]["unreadable row"]["count"] == 3 and stored["rows"] == len(LINES)
    good = jsonl(tmp_path / "good.jsonl", [{"query": "a word", "positive": "b", "score": 2}])
    assert main(["data", "validate", str(good)]) == 0 and "nothing wrong in 1 rows" in capsys.readouterr().out
    assert main(["data", "validate", str(tmp_path / "absent.jsonl")]) == 2 and "not found" in capsys.readouterr().err
