"""An index: the right items for every query, whatever happened to the input, the folder or the process in between."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.corpora import Hashing, jsonl, paint, png, texts
from vlm2vec import bulk, dist, io
from vlm2vec.errors import DataError, EnvError, InputError, Interrupted, ManifestError, RunLockedError
from vlm2vec.index import Index, build_index
from vlm2vec.signals import StopSignal

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def build(source: Path, to: Path, encoder: Hashing | None = None, **options: Any) -> dict[str, Any]:
    return build_index(encoder or Hashing(), source, to, **options)


def kept(folder: Path) -> dict[str | int, tuple[str, list[str], bytes]]:
    """What an index holds: text, pictures and row of every item."""
    index = Index.open(folder)
    rows = np.fromfile(folder / index.meta["file"], "<f4").reshape(-1, index.meta["dims"])
    with closing(sqlite3.connect(folder / "index.sqlite")) as connection:
        found = connection.execute("select id, text, images, row from items join vectors using (key)").fetchall()
    assert len(found) == len(index) and all(row < index.meta["rows"] for *_, row in found)
    return {json.loads(id): (text, json.loads(images), rows[row].tobytes()) for id, text, images, row in found}


def ids(folder: Path, text: str, top: int = 3, **options: Any) -> list[str | int]:
    index = Index.open(folder)
    return [hit.id for hit in index.search(index.embed(Hashing(), [text]), top, **options)[0]]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "WINDOW_ITEMS", 4)


# -- searching ---------------------------------------------------------------------------------------------------------------------------


def test_items_come_in_the_order_of_float64_scores(tmp_path: Path) -> None:
    build(texts(tmp_path / "c.jsonl", 50), tmp_path / "i")
    index, encoder = Index.open(tmp_path / "i"), Hashing()
    queries = [f"question {number}" for number in range(20)]
    rows = np.asarray(encoder.encode([f"text {number}" for number in range(50)])).astype(np.float64)
    for query, hits in zip(queries, index.search(index.embed(encoder, queries), 50), strict=True):
        scores = rows @ np.asarray(encoder.encode([query])).astype(np.float64)[0]
        assert [hit.id for hit in hits] == [f"t{number}" for number in np.argsort(-scores)]
        assert np.allclose([hit.score for hit in hits], np.sort(scores)[::-1], atol=1e-15)
    assert index.search(index.embed(encoder, ["text 7"]), 1)[0][0].text == "text 7"


def test_instructions_of_both_sides(tmp_path: Path) -> None:
    encoder = Hashing()
    encoder.query_instruction, encoder.target_instruction = "Find:", "Say:"
    rows = [{"text": "a"}, {"text": "a", "instruction": "Own:"}]
    build(jsonl(tmp_path / "c.jsonl", rows), tmp_path / "i", encoder)
    index = Index.open(tmp_path / "i")
    assert index.meta["instruction"] == "Say:" and [hit.instruction for hit in index.search(index.embed(encoder, ["a"]))[0]] != ["", ""]
    assert np.array_equal(index.embed(encoder, ["a"]), np.asarray(encoder.encode(["a"], "Find:")))
    assert index.search(index.embed(encoder, ["a"], "Say:"), 1)[0][0].score == pytest.approx(1, abs=1e-6)
    assert index.search(index.embed(encoder, ["a"], "Own:"), 1)[0][0].number == 1
    made = build(tmp_path / "c.jsonl", tmp_path / "i", encoder, instruction="Tell:")
    assert (made["changed"], made["encoded"]) == (1, 1), "the item with an instruction of its own stays"


def test_equal_items_are_encoded_once_and_found_together(tmp_path: Path) -> None:
    rows = [{"text": text, "id": number} for number, text in enumerate(["a", "b", "a", "c", "a", "a"])]
    encoder = Hashing()
    build(jsonl(tmp_path / "c.jsonl", rows), tmp_path / "i", encoder)
    assert encoder.encoded == 3 and ids(tmp_path / "i", "a", 4) == [0, 2, 4, 5] and ids(tmp_path / "i", "a", 2) == [0, 2]


def test_shorter_rows(tmp_path: Path) -> None:
    made = build(texts(tmp_path / "c.jsonl", 9), tmp_path / "i", dims=10)
    index = Index.open(tmp_path / "i")
    assert index.search(index.embed(Hashing(), ["text 3"]), 1)[0][0].score == pytest.approx(1, abs=1e-6), "at unit length again"
    assert made["dims"] == 10 and index.embed(Hashing(), ["text 3"]).shape == (1, 10) and ids(tmp_path / "i", "text 3", 1) == ["t3"]
    with pytest.raises(InputError, match="dims: expected 1 to 24"):
        build(tmp_path / "c.jsonl", tmp_path / "other", dims=25)


def test_pictures_by_path_and_inside_parquet(tmp_path: Path) -> None:
    paint(tmp_path / "in" / "sub" / "r.png", RED)
    build(tmp_path / "in", tmp_path / "i")
    [hits] = Index.open(tmp_path / "i").search(np.ones((1, 24)) / 24**0.5, 1)
    assert hits[0].id == "sub/r.png" and hits[0].images == (tmp_path / "in" / "sub" / "r.png",) and hits[0].thumbnail is None
    pq.write_table(pa.table({"image": [{"bytes": png(RED), "path": "x.png"}], "text": ["red"]}), tmp_path / "p.parquet")
    build(tmp_path / "p.parquet", tmp_path / "j")
    [hits] = Index.open(tmp_path / "j").search(np.ones((1, 24)) / 24**0.5, 1)
    assert hits[0].text == "red" and not hits[0].images and hits[0].thumbnail is not None and hits[0].thumbnail[8:12] == b"WEBP"


def test_several_threads_may_search_while_it_is_made_anew(tmp_path: Path) -> None:
    source = texts(tmp_path / "c.jsonl", 40)
    build(source, tmp_path / "i")
    index, wrong, over = Index.open(tmp_path / "i"), [], threading.Event()
    row = index.embed(Hashing(), ["text 3"])

    def ask() -> None:
        while not over.is_set():
            [hits] = index.search(row, 2)
            if hits[0].text != "text 3" or hits[0].score < 0.99:
                wrong.append(hits)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for count in (4, 40, 6, 30):
        build(texts(source, count), tmp_path / "i")
    over.set()
    for thread in threads:
        thread.join()
    assert not wrong and len(Index.open(tmp_path / "i")) == 30
    index.search(row)
    assert len(index) == 30, "it takes in what was made meanwhile"


# -- coming and going --------------------------------------------------------------------------------------------------------------------


def test_what_is_new_or_changed_comes_in_and_what_is_gone_goes(tmp_path: Path) -> None:
    for name, colour in {"a.png": RED, "b.png": GREEN, "c.png": BLUE}.items():
        paint(tmp_path / "in" / name, colour)
    build(tmp_path / "in", tmp_path / "i")
    (tmp_path / "in" / "a.png").rename(tmp_path / "in" / "z.png")  # known by its content
    times = (tmp_path / "in" / "b.png").stat()
    paint(tmp_path / "in" / "b.png", (0, 201, 0))
    os.utime(tmp_path / "in" / "b.png", ns=(times.st_atime_ns, times.st_mtime_ns))  # of the same size and age, yet another picture
    (tmp_path / "in" / "c.png").unlink()
    paint(tmp_path / "in" / "n.png", (9, 9, 9))
    encoder = Hashing()
    made = build(tmp_path / "in", tmp_path / "i", encoder)
    assert {name: made[name] for name in ("items", "added", "changed", "removed", "encoded")} == {
        **{"items": 3, "added": 2, "changed": 1, "removed": 2},
        "encoded": 2,
    }
    build(tmp_path / "in", tmp_path / "fresh")
    assert kept(tmp_path / "i") == kept(tmp_path / "fresh") and encoder.encoded == 2
    again = Hashing()
    made = build(tmp_path / "in", tmp_path / "i", again)
    assert again.encoded == 0 and (made["added"], made["changed"], made["removed"]) == (0, 0, 0)


def test_what_was_touched_is_read_but_not_encoded_again(tmp_path: Path) -> None:
    paint(tmp_path / "in" / "a.png", RED)
    build(tmp_path / "in", tmp_path / "i")
    os.utime(tmp_path / "in" / "a.png")
    encoder = Hashing()
    assert build(tmp_path / "in", tmp_path / "i", encoder)["changed"] == 0 and encoder.encoded == 0


@pytest.mark.parametrize("left", [1, 0])
def test_rows_that_nothing_needs_are_dropped_once_they_are_most(tmp_path: Path, left: int) -> None:
    source = texts(tmp_path / "c.jsonl", 12)
    build(source, tmp_path / "i")
    build(texts(source, 8), tmp_path / "i")
    assert (tmp_path / "i" / "vectors-0.f32").stat().st_size == 12 * 24 * 4 and ids(tmp_path / "i", "text 11", 12).count("t11") == 0
    assert len(ids(tmp_path / "i", "text 11", 1)) == 1, "a row that is not needed takes no place"
    index = Index.open(tmp_path / "i")
    place = index.search(index.embed(Hashing(), ["text 1"]), 1)[0][0].place  # of row 1, as some row will be again
    jsonl(source, [{"text": f"text {number}", "id": f"t{number}"} for number in (7, 2)][: left + 1])
    build(source, tmp_path / "i")
    assert Index.open(tmp_path / "i").at(place) is None, "rows are numbered anew: an old address finds nothing, not another item"
    files = [file.name for file in (tmp_path / "i").glob("vectors-*")]
    assert files == ["vectors-1.f32"] and (tmp_path / "i" / files[0]).stat().st_size == (left + 1) * 24 * 4
    build(source, tmp_path / "fresh")
    assert kept(tmp_path / "i") == kept(tmp_path / "fresh") and ids(tmp_path / "i", "text 7", 1) == ["t7"]


def test_bad_items_stop_it_or_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows: list[Any] = [{"text": "a"}, *({"image": "broken.png", "id": each} for each in "xy"), {"image": "gone.png"}, {"id": 4}]
    source = jsonl(tmp_path / "c.jsonl", [*rows, {"text": "b", "id": "x"}, {"text": "c", "id": "x"}])
    with pytest.raises(DataError, match="c.jsonl row 1 .*not an image .*skip-bad"):
        build(source, tmp_path / "i")
    with pytest.raises(InputError, match="is not finished"):
        Index.open(tmp_path / "i")
    made = build(source, tmp_path / "i", skip_bad=True)
    reasons = {line["row"]: line["reason"] for line in io.read_jsonl(tmp_path / "i" / "skipped.jsonl")}
    assert made["items"] == 2 and made["skipped"] == len(reasons) == 5 and set(reasons) == {1, 2, 3, 4, 6}
    assert "no such file" in reasons[3] and "an earlier item has the id 'x' too" in reasons[6]
    assert sorted(map(str, kept(tmp_path / "i"))) == ["0", "x"]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(tmp_path: Path, workers: int) -> None:
    source = texts(tmp_path / "c.jsonl", 21)
    build(source, tmp_path / "i", workers=workers)
    assert {id: text for id, (text, *_) in kept(tmp_path / "i").items()} == {f"t{number}": f"text {number}" for number in range(21)}


# -- kills and damage --------------------------------------------------------------------------------------------------------------------


def killed(source: Path, to: Path, fault: str) -> None:
    os.environ["VLM2VEC_FAULT"] = fault
    build(source, to)


@pytest.mark.slow
def test_killed_at_every_point_it_goes_on_to_the_same_index(tmp_path: Path, forked: Callable[..., int]) -> None:
    """A first build, and one that drops most rows: before it ends the old index answers, after it the new one."""
    source, old = texts(tmp_path / "old.jsonl", 9), tmp_path / "old"
    fewer = [{"text": f"text {number}", "id": f"t{number}"} for number in (1, 8)] + [{"text": "new", "id": "n"}]
    build(source, tmp_path / "all")
    build(source, old)
    wanted = {"first": kept(tmp_path / "all")}
    jsonl(source, fewer)
    build(source, tmp_path / "few")
    wanted["again"] = kept(tmp_path / "few")
    points = {"first": 0, "again": 0}
    for kind in points:
        if kind == "first":
            texts(source, 9)
        else:
            jsonl(source, fewer)
        code = -9
        while code == -9:
            points[kind] += 1
            folder = tmp_path / f"{kind}-{points[kind]}"
            if kind == "again":
                shutil.copytree(old, folder)
            code = forked(killed, source, folder, f"*:{points[kind]}:kill")
            assert code in (0, -9)
            if kind == "again":
                assert kept(folder) in (wanted["first"], wanted["again"])
            build(source, folder)
            assert kept(folder) == wanted[kind]
            assert len(list(folder.glob("vectors-*"))) == 1
    assert points["first"] > 8 and points["again"] > 5


def test_a_kill_costs_a_window_at_most(tmp_path: Path, forked: Callable[..., int]) -> None:
    source = texts(tmp_path / "c.jsonl", 20)
    assert forked(killed, source, tmp_path / "i", "before-commit:5:kill") == -9  # the begin, then windows of four; the fourth is lost
    encoder = Hashing()
    build(source, tmp_path / "i", encoder)
    assert encoder.encoded == 20 - 3 * 4


@pytest.mark.slow
def test_killed_at_random_moments_again_and_again(tmp_path: Path, forked: Callable[..., int]) -> None:
    source, draw = texts(tmp_path / "c.jsonl", 100), np.random.default_rng(5)
    build(source, tmp_path / "whole")
    for trial in range(6):
        while forked(killed, source, tmp_path / str(trial), f"*:{draw.integers(20, 90)}:kill"):
            pass
        assert kept(tmp_path / str(trial)) == kept(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["changed", "short", "gone", "nan"])
def test_damaged_rows_alone_are_encoded_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    source = texts(tmp_path / "c.jsonl", 12)
    build(source, tmp_path / "i")
    before, file = kept(tmp_path / "i"), tmp_path / "i" / "vectors-0.f32"
    data = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        data[-4:] = b"\0\0\xc0\x7f" if damage == "nan" else b"nope"
        file.write_bytes(data[:-5] if damage == "short" else data)
    if damage in ("short", "gone"):
        with pytest.raises(ManifestError, match="is missing or shorter than its 12 rows"):
            Index.open(tmp_path / "i")
    encoder = Hashing()
    with caplog.at_level(logging.WARNING, "vlm2vec"):
        build(source, tmp_path / "i", encoder)
    assert kept(tmp_path / "i") == before and encoder.encoded == (12 if damage == "gone" else 4) and "are damaged" in caplog.text
    caplog.clear()
    build(source, tmp_path / "i")
    assert not caplog.records, "and that is the end of it"
    assert ids(tmp_path / "i", "text 11", 1) == ["t11"]


def test_a_damaged_database_and_folders_that_are_none_of_ours(tmp_path: Path) -> None:
    source = texts(tmp_path / "c.jsonl", 5)
    build(source, tmp_path / "i")
    database = tmp_path / "i" / "index.sqlite"
    database.write_bytes(b"SQLite format 3\0" + b"junk" * 2000)
    for call in (lambda: Index.open(tmp_path / "i"), lambda: build(source, tmp_path / "i")):
        with pytest.raises(ManifestError, match="index.sqlite is"):
            call()
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="holds no index; make one with vlm2vec index"):
        Index.open(tmp_path / "other")
    with pytest.raises(InputError, match="nowhere not found"):
        Index.open(tmp_path / "nowhere")
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds thesis.txt but no index.sqlite"):
        build(source, tmp_path / "other")


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("delete from meta where key = 'numbering'", "no setting numbering"),
        ("delete from meta where key = 'rows'", "no setting rows"),
        ("update meta set value = '\"../thesis.txt\"' where key = 'file'", "'../thesis.txt' is no name of a file that belongs to it"),
        ("update meta set value = '{\"file\": \"/thesis.txt\"}' where key = 'approximate'", "'/thesis.txt' is no name"),
        ("update meta set value = '{' where key = 'dims'", "is not the database of an index"),
        ("update items set id = 'bare' where number = 1", "an item of row"),
        ("update items set images = null", "an item of row"),
        ("update items set text = cast(x'ff' as text)", "Could not decode"),
        ("drop table items", "no such table: items"),
    ],
)
def test_a_database_that_says_what_cannot_be(tmp_path: Path, statement: str, words: str) -> None:
    """Also what a stranger may have written there: no file is touched that does not belong to an index."""
    build(texts(tmp_path / "c.jsonl", 5), tmp_path / "i")
    (tmp_path / "thesis.txt").write_text("years of work")
    with closing(sqlite3.connect(tmp_path / "i" / "index.sqlite")) as connection, connection:
        connection.execute(statement)
    with pytest.raises(ManifestError, match=f"index.sqlite .*{words}"):
        ids(tmp_path / "i", "text 1")
    if "meta" in statement:
        with pytest.raises(ManifestError, match=f"index.sqlite .*{words}"):
            build(tmp_path / "c.jsonl", tmp_path / "i")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_one_of_several_ranks_makes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: 4)
    with pytest.raises(InputError, match="one process makes an index, and this is one of 4"):
        build(texts(tmp_path / "c.jsonl", 5), tmp_path / "i")
    assert not (tmp_path / "i").exists()


def test_an_index_of_another_version(tmp_path: Path) -> None:
    build(texts(tmp_path / "c.jsonl", 5), tmp_path / "i")
    with closing(sqlite3.connect(tmp_path / "i" / "index.sqlite")) as connection, connection:
        connection.execute("update meta set value = '9' where key = 'format'")
    with pytest.raises(InputError, match="written in format 9; this version reads format 1"):
        Index.open(tmp_path / "i")


def test_another_model_input_or_length_is_refused(tmp_path: Path) -> None:
    source = texts(tmp_path / "c.jsonl", 5)
    build(source, tmp_path / "i")
    index = Index.open(tmp_path / "i")
    with pytest.raises(InputError, match="was made with hashing, and hashing is another model, or has changed since"):
        index.check(Hashing("other"))
    for change in ({"encoder": Hashing("other")}, {"source": texts(tmp_path / "d.jsonl", 5)}, {"dims": 8}):
        with pytest.raises(InputError, match="was made with another"):
            build(**{"source": source, "to": tmp_path / "i", **change})


def test_questions_that_cannot_be_answered(tmp_path: Path) -> None:
    build(texts(tmp_path / "c.jsonl", 5), tmp_path / "i")
    index = Index.open(tmp_path / "i")
    row = index.embed(Hashing(), ["a"])
    for query, top, words in ((row[:0], 1, "one query"), (row[:, :9], 1, "rows of 24"), (row, 0, "top"), (row, 10_001, "1 to 10,000")):
        with pytest.raises(InputError, match=words):
            index.search(query, top)
    assert len(index.search(row, 10_000)[0]) == 5
    with pytest.raises(InputError, match="make them with vlm2vec index --approximate"):
        index.search(row, 1, approximately=True)


def test_a_full_disk_is_said_and_the_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = texts(tmp_path / "c.jsonl", 10)
    monkeypatch.setenv("VLM2VEC_FAULT", "after-write:2:enospc")
    with pytest.raises(EnvError, match="vectors-0.f32: No space left"):
        build(source, tmp_path / "i")
    monkeypatch.delenv("VLM2VEC_FAULT")
    build(source, tmp_path / "i")
    assert len(kept(tmp_path / "i")) == 10


def test_one_process_fills_it_at_a_time_and_a_signal_stops_it(tmp_path: Path) -> None:
    source = texts(tmp_path / "c.jsonl", 10)
    with io.run_lock(tmp_path / "i"), pytest.raises(RunLockedError):
        build(source, tmp_path / "i")
    stop = StopSignal()
    stop.number = 15
    with pytest.raises(Interrupted, match="run the same command to go on"):
        build(source, tmp_path / "i", stop=stop)
    encoder = Hashing()
    build(source, tmp_path / "i", encoder)
    assert encoder.encoded == 6


# -- approximately -----------------------------------------------------------------------------------------------------------------------


def test_lists_are_made_on_request_and_go_with_the_rows(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    source = texts(tmp_path / "c.jsonl", 60)
    made = build(source, tmp_path / "i", approximately=True)
    assert made["approximate"]["recall"] >= 0.95 and ids(tmp_path / "i", "text 9", 1, approximately=True) == ["t9"]
    again = build(source, tmp_path / "i")
    assert again["approximate"] == made["approximate"], "nothing changed, so they stay"
    assert build(texts(source, 59), tmp_path / "i")["approximate"] is None and not list((tmp_path / "i").glob("lists-*"))
    with pytest.raises(InputError, match="no lists"):
        ids(tmp_path / "i", "text 9", 1, approximately=True)
    build(source, tmp_path / "i", approximately=True)
    assert "t59" not in ids(tmp_path / "i", "text 59", 59, approximately=True)
