from __future__ import annotations

from pathlib import Path

import pytest

from tests.suites import Compass, Row, paint, write_set, write_suite
from vlm2vec.cache import EmbeddingCache
from vlm2vec.data.types import ImageRef
from vlm2vec.evalsets import Intake, picture_name, take_in
from vlm2vec.io import sha256_bytes
from vlm2vec.prompts import render
from vlm2vec.suite import load_suite


def intake(root: Path, **options: int) -> Intake:
    return take_in(load_suite(root), EmbeddingCache(root / "cache", Compass().fingerprint()), **options)


def pencil(picture: str, copy: str) -> list[Row]:
    return [
        (("q1", ""), [("gold", ""), ("y", ""), ("x", ""), ("y", ""), ("gold", "")]),
        (("q2", picture), [("look", picture), ("look", copy), ("x", "")]),
        (("q2", copy), [("x", ""), ("gold", ""), ("look", copy)]),
    ]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_suite(tmp_path, {"s": ("vqa", "IND", pencil(paint(tmp_path, 9, "b.png"), paint(tmp_path, 9, "a.png")))})
    return tmp_path


def spelled(found: Intake) -> list[tuple[str, str, set[str]]]:
    """Query, gold and other candidates of every row in words."""
    (task,) = found.tasks
    rows = []
    for query, members in zip(task.queries, task.candidates, strict=True):
        gold, *others = [render(found.items[task.targets[member]]) for member in members]
        assert len({gold, *others}) == len(members)
        rows.append((render(found.items[query]), gold, set(others)))
    return rows


def test_copies_are_one_item_and_the_gold_comes_first(root: Path) -> None:
    look, asked = "<|image_1|>\nlook\n", "<|image_1|>\nq2\n"
    found = intake(root)
    assert found.problems == {} and found.tasks[0].listed == 3
    rows = spelled(found)
    assert len(rows) == 3
    for row in [("q1", "gold", {"x", "y"}), (asked, look, {"x"}), (asked, "x", {"gold", look})]:
        assert row in rows
    assert len(found.items) == 6  # q1, q2 with its picture, gold, x, y, the picture


def test_neither_order_nor_names_reach_the_digest(root: Path) -> None:
    task = intake(root).tasks[0]
    assert task.queries == sorted(task.queries) and task.targets == sorted(task.targets)
    paint(root, 9, "c.png")
    write_set(root, "s", [(query, [gold, *others[::-1]]) for query, (gold, *others) in pencil("c.png", "b.png")[::-1]])
    assert intake(root).tasks[0].digest == task.digest
    write_set(root, "s", pencil("c.png", paint(root, 10, "d.png")))
    assert intake(root).tasks[0].digest != task.digest


def test_of_copies_the_first_by_path_is_shown(root: Path) -> None:
    for rows in (pencil("b.png", "a.png"), pencil("a.png", "b.png")):
        write_set(root, "s", rows)
        shown = {picture_name(image, root) for item in intake(root).items.values() for image in item.images}
        assert shown == {"eval_images/a.png"}


def test_a_limit_takes_nested_queries_and_only_their_candidates(root: Path) -> None:
    counts = [len(intake(root, limit=limit).items) for limit in (1, 2, 3, 9)]
    queries = [set(intake(root, limit=limit).tasks[0].queries) for limit in (1, 2, 3)]
    assert queries[0] <= queries[1] <= queries[2]
    assert counts == sorted(counts) and counts[0] < counts[2] == counts[3] == 6


def test_a_limit_tells_rows_with_the_same_query_apart(tmp_path: Path) -> None:
    rows = [(("q", ""), [(gold, ""), ("x", "")]) for gold in "abcdefgh"]
    write_suite(tmp_path, {"s": ("vqa", "IND", rows)})
    chosen = intake(tmp_path, limit=4).tasks[0].digest
    write_set(tmp_path, "s", rows[::-1])
    assert intake(tmp_path, limit=4).tasks[0].digest == chosen


def test_names_of_pictures(tmp_path: Path) -> None:
    assert picture_name(ImageRef(tmp_path / "eval_images" / "a b.png"), tmp_path) == "eval_images/a b.png"
    assert picture_name(ImageRef(Path("/elsewhere/x.png")), tmp_path) == "/elsewhere/x.png"
    assert picture_name(ImageRef(b"bytes"), tmp_path) is None


def test_the_same_picture_is_read_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("vlm2vec.evalsets.load_image", lambda image: opened.append(sha256_bytes(image.source.read_bytes())))
    intake(root)
    assert len(opened) == len(set(opened)) == 1


def test_pictures_are_named_inside_a_linked_folder_too(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    inside, outside = ImageRef(tmp_path / "real" / "a.png"), ImageRef(tmp_path / "b.png")
    assert picture_name(inside, tmp_path / "link") == "a.png"
    assert picture_name(inside, tmp_path / "real") == "a.png"
    assert picture_name(outside, tmp_path / "real") == (tmp_path / "b.png").as_posix()
    assert picture_name(ImageRef(b"x"), tmp_path) is None
