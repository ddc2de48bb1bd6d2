"""Rows of every kind of input, where they can be read from, and what is said of those that are wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.corpora import jsonl, paint, png
from vlm2vec.data import items as module
from vlm2vec.data.items import Corpus, Row, item_of, scan
from vlm2vec.errors import DataError, PathError

RED, BLUE = (200, 0, 0), (0, 0, 200)


def corpus(source: Path, **options: Any) -> Corpus:
    return scan(source, source.parent / "listing.jsonl", **options)


def rows(found: Corpus, *wanted: range) -> list[Row]:
    return list(found.read(wanted or [range(len(found))]))


def ids(found: Corpus, *wanted: range) -> list[str | int]:
    return [row.id for row in rows(found, *wanted)]


def parquet(file: Path, groups: int = 1, **columns: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    pq.write_table(table, file, row_group_size=-(-len(table) // groups))
    return file


# -- kinds of input ----------------------------------------------------------------------------------------------------------------------


def test_lines_of_text_pictures_and_strings(tmp_path: Path) -> None:
    lines = [
        {"text": "a", "id": "first", "instruction": "Own:"},
        "just text",
        {"image": "red.png", "other": [1]},
        {"text": "two", "image": ["red.png", "sub/blue.png"]},
        {"text": "struct", "image": {"path": "red.png", "bytes": None}, "id": 7},
    ]
    found = corpus(jsonl(tmp_path / "items.jsonl", lines))
    made = [item_of(row, tmp_path, "Given:") for row in rows(found)]
    assert ids(found) == ["first", 1, 2, 3, 7]
    assert [item.text for item in made] == ["a", "just text", "", "two", "struct"]
    assert [item.instruction for item in made] == ["Own:", *["Given:"] * 4]
    pictures = [[image.source.relative_to(tmp_path).as_posix() for image in item.images] for item in made]
    assert pictures == [[], [], ["red.png"], ["red.png", "sub/blue.png"], ["red.png"]]
    assert made[2].images[0].label == f"{tmp_path / 'items.jsonl'} row 2 (line 3): image 'red.png'"


def test_columns_of_parquet_with_pictures_inside(tmp_path: Path) -> None:
    picture = [{"bytes": png(RED), "path": "in/side.png"}, {"bytes": None, "path": "out.png"}, None]
    file = parquet(tmp_path / "p.parquet", caption=["a", "b", "c"], image=picture, key=[3, 4, 5])
    found = corpus(file, columns={"text": "caption", "id": "key"})
    made = [item_of(row, tmp_path) for row in rows(found)]
    assert ids(found) == [3, 4, 5] and [item.text for item in made] == ["a", "b", "c"]
    assert made[0].images[0].source == png(RED) and made[0].images[0].label == f"{file} row 0: image 'in/side.png'"
    assert made[1].images[0].source == tmp_path / "out.png" and made[2].images == ()


def test_lists_of_pictures_in_parquet(tmp_path: Path) -> None:
    inside = pa.array([[{"bytes": png(RED), "path": None}, {"bytes": png(BLUE), "path": None}], []])
    table = pa.table({"image": inside, "text": ["two", "none"]})
    pq.write_table(table, tmp_path / "p.parquet")
    two, none = [item_of(row, tmp_path) for row in rows(corpus(tmp_path / "p.parquet"))]
    assert [image.source for image in two.images] == [png(RED), png(BLUE)] and none.images == ()


def test_a_folder_of_shards_counts_rows_over_all_files(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    parquet(folder / "b.parquet", groups=2, text=["c", "d"])
    parquet(folder / "a.parquet", groups=2, text=["a", "b"])
    (folder / "readme.txt").write_text("x")
    found = corpus(folder)
    assert [(row.id, row.values["text"], row.place) for row in rows(found)] == [
        (0, "a", f"{folder / 'a.parquet'} row 0"), (1, "b", f"{folder / 'a.parquet'} row 1"),
        (2, "c", f"{folder / 'b.parquet'} row 0"), (3, "d", f"{folder / 'b.parquet'} row 1"),
    ]  # fmt: skip


def test_pictures_of_a_folder_by_content_in_order_of_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    for name in ("z.png", "a/b/c.PNG", "a/x.jpg", "no-suffix", "a.dat"):
        paint(folder / name, RED)
    (folder / "notes.txt").write_text("BMW and other words")
    (folder / "page.jpg").write_text("<html>")  # called a picture: decoding says what it is
    paint(folder / ".hidden.png", RED)
    paint(folder / ".thumbnails" / "t.png", RED)
    found = corpus(folder)
    assert ids(found) == ["a/b/c.PNG", "a/x.jpg", "a.dat", "no-suffix", "page.jpg", "z.png"]
    assert found.kind == "pictures" and found.ignored == 1
    first = rows(found)[0]
    assert item_of(first, Path(found.images)).images[0].source == folder / str(first.id)


@pytest.mark.parametrize("name", ["pairs.jsonl", "metadata.jsonl", "captions.jsonl", "pairs.parquet", "metadata.parquet"])
def test_tables_about_pictures_do_not_make_them_rows(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "photos"
    paint(folder / "album" / "a.png", RED)
    row = {"file_name": "album/a.png", "text": "a caption"}
    table = parquet(folder / name, **{key: [value] for key, value in row.items()}) if "parquet" in name else jsonl(folder / name, [row])
    found = corpus(folder)
    assert (found.kind, ids(found), found.ignored) == ("pictures", ["album/a.png"], 1)
    assert [row.values for row in rows(corpus(table, columns={"image": "file_name"}))] == [{"text": "a caption", "image": "album/a.png"}]


def test_rows_beside_pictures_are_refused_and_above_them_are_read(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "corpus" / "items.jsonl", [{"image": "images/a.png"}])
    paint(tmp_path / "corpus" / "images" / "a.png", RED)
    assert corpus(tmp_path / "corpus").kind == "jsonl"
    paint(tmp_path / "corpus" / "b.PNG", RED)
    with pytest.raises(DataError, match=r"corpus holds pictures \(b.PNG\) and rows \(items.jsonl\), and either could be meant"):
        corpus(tmp_path / "corpus")
    assert corpus(file).kind == "jsonl"


# -- ranges ------------------------------------------------------------------------------------------------------------------------------

RANGES = [[range(0, 23)], [range(0, 5), range(5, 9)], [range(3, 4), range(9, 17)], [range(22, 23)], [range(6, 12), range(18, 21)]]


@pytest.mark.parametrize("wanted", RANGES, ids=str)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_any_ranges_are_read_and_nothing_else(tmp_path: Path, kind: str, wanted: list[range], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MARK", 4)
    words = [f"w{index}" for index in range(23)]
    if kind == "jsonl":
        lines = "\n\n".join(json.dumps({"text": word}) for word in words)  # blank lines between, none after the last
        (tmp_path / "c.jsonl").write_bytes(b"\xef\xbb\xbf\n" + lines.encode())
        found = corpus(tmp_path / "c.jsonl")
    elif kind == "parquet":
        found = corpus(parquet(tmp_path / "c.parquet", groups=5, text=words))
    else:
        parquet(tmp_path / "c" / "1.parquet", groups=2, text=words[:7])
        parquet(tmp_path / "c" / "2.parquet", text=words[7:8])
        parquet(tmp_path / "c" / "3.parquet", groups=3, text=words[8:])
        found = corpus(tmp_path / "c")
    found = Corpus.from_json(json.loads(json.dumps(found.to_json())))  # as another rank gets it
    assert [(row.number, row.values["text"]) for row in rows(found, *wanted)] == [(n, words[n]) for part in wanted for n in part]


def test_the_line_is_right_behind_a_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MARK", 2)
    (tmp_path / "c.jsonl").write_text('"a"\n\n"b"\n\n\n"c"\n"d"\n"e"\n')
    found = corpus(tmp_path / "c.jsonl")
    assert [row.place.partition("(")[2] for row in rows(found)] == [f"line {n})" for n in (1, 3, 6, 7, 8)]
    assert [piece.first for piece in found.pieces] == [0, 2, 4]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(b'\xef\xbb\xbf"a"\n"b"\n')
    assert [row.values for row in rows(corpus(tmp_path / "c.jsonl"))] == [{"text": "a"}, {"text": "b"}]


# -- identity ----------------------------------------------------------------------------------------------------------------------------


def test_the_digest_knows_content_order_and_names_but_not_the_place(tmp_path: Path) -> None:
    one = corpus(jsonl(tmp_path / "one" / "c.jsonl", ["a", "b"]))
    assert corpus(jsonl(tmp_path / "two" / "c.jsonl", ["a", "b"])).digest == one.digest
    assert corpus(jsonl(tmp_path / "three" / "c.jsonl", ["a", "c"])).digest != one.digest
    assert corpus(jsonl(tmp_path / "four" / "d.jsonl", ["a", "b"])).digest != one.digest


@pytest.mark.parametrize("kind", ["parquet", "pictures"])
def test_a_changed_file_of_equal_size_is_another_input(tmp_path: Path, kind: str) -> None:
    file = parquet(tmp_path / "in" / "c.parquet", text=["a"]) if kind == "parquet" else paint(tmp_path / "in" / "c.png", RED)
    before = corpus(tmp_path / "in").digest
    assert corpus(tmp_path / "in").digest == before
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))
    assert corpus(tmp_path / "in").digest != before


# -- refusals ----------------------------------------------------------------------------------------------------------------------------


def test_inputs_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("a")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1...")
    (tmp_path / "nothing").mkdir()
    jsonl(tmp_path / "both" / "a.jsonl", ["a"])
    parquet(tmp_path / "both" / "b.parquet", text=["b"])
    parquet(tmp_path / "wide.parquet", txt=["b"])
    for name, words in {
        "missing": "not found",
        "c.csv": "expected a .jsonl or .parquet file",
        "empty.jsonl": "no rows",
        "torn.parquet": "torn.parquet: truncated or not a parquet file",
        "nothing": "holds no pictures and no .jsonl or .parquet",
        "both": "holds .jsonl and .parquet",
        "wide.parquet": "neither a column 'text' nor 'image', but txt; columns \\(--columns text=NAME\\)",
    }.items():
        with pytest.raises(DataError, match=words):
            corpus(tmp_path / name)
    with pytest.raises(DataError, match="no column 'capton', but"):
        corpus(parquet(tmp_path / "named.parquet", caption=["b"]), columns={"text": "capton"})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", r"bad.jsonl row 1 \(line 2\): not valid JSON"),
        (b"[1]", "expected an object or a string, got list"),
        (b'{"txt": "a"}', "neither text nor image, but txt; columns "),
        (b'{"text": 3}', "text must be a string, got int"),
        (b'{"text": "a", "instruction": ["b"]}', "instruction must be a string, got list"),
        (b'{"text": "a", "id": 1.5}', "id must be a string or a whole number, got float"),
        (b'{"text": "a", "id": true}', "id must be a string or a whole number, got bool"),
        (b'{"text": " ", "image": ""}', "both are empty"),
        (b'{"image": 3}', "image must be a path, a struct of bytes and path, or a list of them, got int"),
        (b'{"text": "\\ud800"}', "text is not valid UTF-8"),
        (b'{"text": "\xff"}', "not valid UTF-8"),
    ],
)
def test_a_wrong_line_is_named_and_the_next_is_read(tmp_path: Path, line: bytes, words: str) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b'"a"\n' + line + b'\n"c"\n')
    before, bad, after = rows(corpus(tmp_path / "bad.jsonl"))
    with pytest.raises(DataError, match=words):
        item_of(bad, tmp_path)
    assert bad.id == 1 and item_of(before, tmp_path).text == "a" and item_of(after, tmp_path).text == "c"


@pytest.mark.parametrize("path", ["/etc/hostname", "../up.png", "out/link.png"])
def test_a_picture_elsewhere_is_refused(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "in"
    paint(tmp_path / "up.png", RED)
    (folder / "out").mkdir(parents=True)
    (folder / "out" / "link.png").symlink_to(tmp_path / "up.png")
    with pytest.raises(PathError, match=r"c.jsonl row 0 \(line 1\): image '.*': path leaves root"):
        item_of(rows(corpus(jsonl(folder / "c.jsonl", [{"image": path}])))[0], folder)


def test_a_text_that_is_not_utf8_in_parquet_costs_its_row_only(tmp_path: Path) -> None:
    damaged = pa.StringArray.from_buffers(3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc"))
    pq.write_table(pa.table({"text": damaged}), tmp_path / "p.parquet")
    first, bad, last = rows(corpus(tmp_path / "p.parquet"))
    assert (item_of(first, tmp_path).text, item_of(last, tmp_path).text) == ("a", "c")
    with pytest.raises(DataError, match="p.parquet row 1: text must be a string, got damaged UTF-8"):
        item_of(bad, tmp_path)
