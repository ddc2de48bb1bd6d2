"""The made-up benchmark: it has every kind of pair, its pictures open, and it is the same wherever and whenever it is made."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from vlm2vec.data.mmeb import EvalSet, TrainRows, read_eval, read_train
from vlm2vec.data.tiny import tiny_root, write_tiny
from vlm2vec.data.types import Item
from vlm2vec.errors import DataError
from vlm2vec.io import verify_manifest
from vlm2vec.prompts import render
from vlm2vec.suite import load_suite

NAMES = ["ImageNet_1K", "VisualNews_t2i", "CIRR", "no: yaml trap", "NIGHTS", "yes"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("tiny")
    write_tiny(to, NAMES)
    return to


def sources(folder: Path) -> list[TrainRows]:
    return [read_train(folder / "train", name) for name in NAMES]


def eval_sets(folder: Path) -> list[EvalSet]:
    suite = load_suite(folder / "datasets.yaml", folder)
    return [read_eval(suite.root, spec.name, spec.path, folder / "eval_images") for spec in suite.sets]


def kind(item: Item) -> str:
    """Which of picture and text an item holds, instruction aside."""
    return "image" if item.images else "text"


def test_the_five_kinds_take_turns(folder: Path) -> None:
    pairs = [rows[0] for rows in sources(folder)]
    sides = [f"{kind(pair.query)} to {kind(pair.positive)}, {len(pair.negatives)}" for pair in pairs]
    assert sides[:3] == ["image to text, 0", "text to image, 0", "image to image, 1"]
    assert sides[3:] == ["text to text, 0", "image to image, 0", "image to text, 0"]
    assert kind(pairs[2].negatives[0]) == "image"


def test_every_picture_opens_and_is_small(folder: Path) -> None:
    pairs = [rows[index] for rows in sources(folder) for index in range(len(rows))]
    items = [item for pair in pairs for item in (pair.query, pair.positive, *pair.negatives)]
    items += [item for found in eval_sets(folder) for item in (*found.queries, *found.candidates)]
    files = {str(image.source) for item in items for image in item.images}
    assert len(files) == 24 * 5  # two looks for training, two and a scene for evaluation
    for file in files:
        with Image.open(file) as picture:
            assert picture.mode == "RGB" and all(32 <= side <= 128 for side in picture.size)
            assert len(picture.getcolors() or ()) >= 2


def test_no_picture_of_the_evaluation_was_trained_on(folder: Path) -> None:
    contents = [{file.read_bytes() for file in (folder / part).rglob("*.png")} for part in ("train", "eval_images")]
    assert contents[0] and contents[1] and not contents[0] & contents[1]


def test_negatives_are_wrong_and_look_like_positives(folder: Path) -> None:
    rows = read_train(folder / "train", "CIRR")
    for pair in map(rows.__getitem__, range(len(rows))):
        assert pair.negatives[0].images != pair.positive.images
        assert render(pair.negatives[0]) == render(pair.positive)


def test_the_suite_has_one_set_per_meta_task_and_counts_right(folder: Path) -> None:
    suite = load_suite(folder / "datasets.yaml", folder)
    assert [spec.meta_task for spec in suite.sets] == ["classification", "vqa", "retrieval", "grounding"]
    assert [spec.name for spec in suite.train] == NAMES
    for spec, found in zip(suite.sets, eval_sets(folder), strict=True):
        assert len(found.queries) == spec.queries == 24
        assert all(len(row) == spec.candidates for row in found.candidates_QM)
        assert len(found.candidates) == spec.candidates and found.duplicates == 0


@pytest.mark.parametrize("index", range(4))
def test_the_gold_answers_the_query(folder: Path, index: int) -> None:
    found = eval_sets(folder)[index]
    for query, row in zip(found.queries, found.candidates_QM, strict=True):
        gold = found.candidates[row[0]]
        shown = " ".join([query.text, *(str(image.source) for image in query.images)])
        wanted = str(gold.images[0].source).rsplit("/", 1)[1].split("_")[0] if gold.images else gold.text
        assert wanted in shown


def test_equal_arguments_give_equal_rows_and_pixels(folder: Path, tmp_path: Path) -> None:
    write_tiny(tmp_path, NAMES)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert all((folder / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)


def test_rows_beyond_the_things_repeat_them(tmp_path: Path) -> None:
    write_tiny(tmp_path, ["A"], rows=30)
    rows = read_train(tmp_path / "train", "A")
    assert len(rows) == 30 and rows[24].query == rows[0].query


@pytest.mark.parametrize("name", ["a/b", "..", "", "/x"])
def test_a_name_that_is_no_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="cannot be the name of a folder"):
        write_tiny(tmp_path, [name])


def test_the_cache_is_filled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM2VEC_CACHE", str(tmp_path))
    root = tiny_root(["A", "B"])
    verify_manifest(root.parent)
    monkeypatch.setattr("vlm2vec.data.tiny.write_tiny", None)  # a second writing would fail
    assert tiny_root(["A", "B"]) == root
    assert {path.name for path in tmp_path.iterdir()} == {root.parent.name}


def test_what_a_killed_process_left_is_not_taken_for_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM2VEC_CACHE", str(tmp_path))

    def dies(to: Path, names: list[str], rows: int) -> None:
        (to / "train").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("vlm2vec.data.tiny.write_tiny", dies)
        tiny_root(["A"])
    assert len(read_train(tiny_root(["A"]), "A")) == 24
