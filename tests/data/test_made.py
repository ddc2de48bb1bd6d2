"""The made-up MMEB data: every set can be read, the answers can be seen, and each trap of the real rows is where it is said to be."""

from __future__ import annotations

import io
import re
import tarfile
import time
import zipfile
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlm2vec.data.images import content_key, load_image
from vlm2vec.data.made import traps, write_archives, write_b3, write_made
from vlm2vec.data.made.pictures import ALL, COLOURS, GROUNDS, NUMBERS, PLAIN, draw, things
from vlm2vec.data.made.sets import Size, candidate_lists
from vlm2vec.data.mmeb import EvalSet, read_eval, read_train
from vlm2vec.data.types import ImageRef, Item, Pair
from vlm2vec.errors import DataError
from vlm2vec.prompts import PLACEHOLDER, render
from vlm2vec.suite import SetSpec, Suite, TrainSpec, load_suite

MMEB = load_suite(Path(__file__).parents[2] / "benchmarks" / "mmeb")
NAMES = [spec.name for spec in MMEB.sets]
TRAIN_NAMES = [spec.name for spec in MMEB.train]
SPECS = {spec.name: spec for spec in MMEB.sets}
SPLITS = ("original", "diverse_instruction", "train")
SECONDS = 5.0  # for the small size, on one core
Row = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("made")
    started = time.process_time()
    write_made(to, MMEB)
    assert time.process_time() - started < SECONDS
    return to


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The two other layouts."""
    places = {layout: tmp_path_factory.mktemp(layout) for layout in ("instruct", "old")}
    write_made(places["instruct"], MMEB, layout="instruct")
    write_made(places["old"], MMEB, layout="old")
    return places


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("hub")
    write_archives(to, MMEB)
    return to


def table(folder: Path, name: str) -> list[Row]:
    """The raw rows of an evaluation set."""
    return pq.read_table(folder / "MMEB-eval" / name / "test-00000-of-00001.parquet").to_pylist()


def train_table(folder: Path, name: str, split: str = "original") -> list[Row]:
    return pq.read_table(folder / "MMEB-train" / name / f"{split}-00000-of-00001.parquet").to_pylist()


@cache
def eval_set(folder: Path, name: str) -> EvalSet:
    return read_eval(folder / "MMEB-eval", name, image_root=folder / "MMEB-eval" / "eval_images")


@cache
def pairs(folder: Path, name: str, split: str = "original") -> list[Pair]:
    rows = read_train(folder / "MMEB-train", name, split=split)
    return [rows[index] for index in range(len(rows))]


def listed(found: EvalSet, row: int) -> list[Item]:
    members = found.candidates_QM[row] if found.candidates_QM is not None else []
    return [found.candidates[index] for index in members]


def made_suite(folder: Path) -> Suite:
    return load_suite(folder / "datasets.yaml")


# -- every set can be read ---------------------------------------------------------------------------------------------------------------


def test_the_suite_is_the_real_one_with_its_own_counts(folder: Path) -> None:
    suite = made_suite(folder)
    assert suite.root == folder / "MMEB-eval"
    assert [spec.name for spec in suite.sets] == NAMES and len(NAMES) == 36
    assert [spec.name for spec in suite.train] == TRAIN_NAMES and len(TRAIN_NAMES) == 20
    for made, real in zip(suite.sets, MMEB.sets, strict=True):
        same = ("meta_task", "split", "path", "query_modality", "target_modality", "scope", "metric", "query", "target", "train", "note")
        assert [getattr(made, field) for field in same] == [getattr(real, field) for field in same]
    assert {spec.rows for spec in suite.train} == {12}


@pytest.mark.parametrize("name", NAMES)
def test_an_evaluation_set_has_what_the_suite_says(folder: Path, name: str) -> None:
    spec = next(spec for spec in made_suite(folder).sets if spec.name == name)
    found = eval_set(folder, name)
    assert len(found.queries) == spec.queries == 8
    assert {len(listed(found, row)) for row in range(8)} == {spec.candidates} == {2 if name == "HatefulMemes" else 6}
    assert len(found.candidates) == spec.distinct
    assert {bool(item.images) for item in found.queries} == {"I" in spec.query_modality}
    assert {bool(item.images) for item in found.candidates} == {"I" in spec.target_modality}


@pytest.mark.parametrize("name", TRAIN_NAMES)
def test_a_training_set_can_be_read_in_all_splits(folder: Path, name: str) -> None:
    spec = next(spec for spec in MMEB.sets if spec.train == name)
    for split in SPLITS:
        found = pairs(folder, name, split)
        assert len(found) == 12
        for pair in found:
            assert (bool(pair.query.images), bool(pair.positive.images)) == ("I" in spec.query_modality, "I" in spec.target_modality)
            assert all(negative != pair.positive for negative in pair.negatives)
    assert train_table(folder, name, "train") == train_table(folder, name)


def test_every_picture_opens_is_small_and_is_used(folder: Path) -> None:
    items = [item for name in NAMES for item in (*eval_set(folder, name).queries, *eval_set(folder, name).candidates)]
    for pair in (pair for name in TRAIN_NAMES for pair in pairs(folder, name)):
        items += [pair.query, pair.positive, *pair.negatives]
    files = {Path(str(image.source)) for item in items for image in item.images}
    assert files == {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".parquet", ".yaml")}
    for file in files:
        width, height = load_image(ImageRef(file)).size
        assert 20 <= width <= 150 and 20 <= height <= 75


def test_no_picture_of_the_evaluation_was_trained_on(folder: Path) -> None:
    contents = [{file.read_bytes() for file in (folder / part).rglob("*") if "mages/" in str(file) and file.is_file()} for part in PARTS]
    assert contents[0] and contents[1] and not contents[0] & contents[1]


PARTS = ("MMEB-eval", "MMEB-train")


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_the_templates_of_the_suite(folder: Path, name: str) -> None:
    spec, found = SPECS[name], eval_set(folder, name)
    assert all(matches(spec.query, item.text) for item in found.queries)
    assert all(matches(spec.target, item.text) for item in found.candidates)


def matches(template: str, text: str) -> bool:
    pattern = re.escape(template.replace("\\n", "\n")).replace(re.escape("{text}"), ".+")
    return re.fullmatch(pattern, text, re.DOTALL) is not None


# -- the answers can be seen -------------------------------------------------------------------------------------------------------------

PALETTE = {**COLOURS, **GROUNDS}
WORDS = re.compile(rf"({'|'.join(NUMBERS)}) ({'|'.join(COLOURS)}) ")


def colours(image: ImageRef, half: str = "") -> set[str]:
    """Names of the colours that cover one part in fifty or more."""
    picture = load_image(image)
    left = picture.width // 2
    boxes = {"left": (0, 0, left, picture.height), "right": (left, 0, picture.width, picture.height)}
    pixels = np.asarray(picture.crop(boxes[half]) if half else picture).reshape(-1, 1, 3).astype(int)
    nearest = np.abs(pixels - np.array(list(PALETTE.values()))).sum(axis=2).argmin(axis=1)
    return {list(PALETTE)[index] for index, count in enumerate(np.bincount(nearest, minlength=len(PALETTE))) if count >= len(pixels) / 50}


def is_grey(image: ImageRef) -> bool:
    pixels = np.asarray(load_image(image)).astype(int)
    return bool(np.abs(pixels - pixels.mean(axis=2, keepdims=True)).max() < 2)


def said(text: str) -> set[str]:
    return {match[2] for match in WORDS.finditer(text.lower() + " ")}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("HatefulMemes", "VisDial", "CIRR", "FashionIQ", "NIGHTS", "OVEN")])
def test_what_one_side_says_is_seen_on_the_other(folder: Path, name: str) -> None:
    """The colours named by query or gold are in the pictures of the two: of a question's half where one half is asked for."""
    found, spec = eval_set(folder, name), SPECS[name]
    for row, query in enumerate(found.queries):
        gold = listed(found, row)[0]
        named = said(query.text) | said(gold.text)
        half = next((side for side in ("left", "right") if side in query.text.split(":")[-1] and spec.meta_task != "grounding"), "")
        pictures = gold.images or query.images
        assert len(named) == 1
        assert named <= colours(pictures[0], half) or is_grey(pictures[0])


@pytest.mark.parametrize("name", ["CIRR", "FashionIQ"])
def test_a_change_is_seen_in_the_gold(folder: Path, name: str) -> None:
    found = eval_set(folder, name)
    for row, query in enumerate(found.queries):
        wanted, shown = re.findall(r"The same, but (\w+) instead of (\w+)\.", query.text)[0]
        assert wanted != shown
        assert wanted in colours(listed(found, row)[0].images[0]) and shown in colours(query.images[0])


@pytest.mark.parametrize("name", ["NIGHTS", "OVEN"])
def test_query_and_gold_show_the_same_in_other_pictures(folder: Path, name: str) -> None:
    found = eval_set(folder, name)
    for row, query in enumerate(found.queries):
        shared = colours(query.images[0]) & colours(listed(found, row)[0].images[0]) & set(COLOURS)
        assert shared and content_key(query.images[0]) != content_key(listed(found, row)[0].images[0])


def test_a_dialogue_tells_what_its_picture_shows(folder: Path) -> None:
    found = eval_set(folder, "VisDial")
    for row, query in enumerate(found.queries):
        assert re.findall(r"colour\nA:(\w+)", query.text)[0] in colours(listed(found, row)[0].images[0])


def test_a_class_is_one_thing_in_many_pictures(folder: Path) -> None:
    found = eval_set(folder, "HatefulMemes")
    shown = {answer: [] for answer in ("Yes", "No")}  # type: dict[str, list[set[str]]]
    for row, query in enumerate(found.queries):
        shown[listed(found, row)[0].text].append(colours(query.images[0]) & set(COLOURS))
    common = [set.intersection(*seen) for seen in shown.values()]
    assert all(common) and common[0] != common[1]


@pytest.mark.parametrize("name", [name for name in NAMES if SPECS[name].target_modality != "I"])
def test_texts_of_wrong_candidates_are_not_the_golds(folder: Path, name: str) -> None:
    """Unless a set repeats its gold on purpose, or the same words stand beside another picture."""
    found = eval_set(folder, name)
    for row in range(len(found.queries)):
        gold, *wrong = listed(found, row)
        assert gold not in wrong or name in ("A-OKVQA", "ScienceQA")


def test_the_training_set_teaches_the_same_classes(folder: Path) -> None:
    for name, train in (("ImageNet-1K", "ImageNet_1K"), ("VOC2007", "VOC2007"), ("OK-VQA", "OK-VQA")):
        answers = {item.text for item in eval_set(folder, name).candidates}
        assert {pair.positive.text for pair in pairs(folder, train)} <= answers


def test_things_differ_and_can_be_told_apart() -> None:
    for count in (1, 3, PLAIN, ALL):
        found = things(count, 17, "any")
        assert len(set(found)) == len({thing.words for thing in found}) == count
        assert {thing.ground is None for thing in found} == {count <= PLAIN}
    assert PLAIN >= 1000 and max(spec.distinct or 0 for spec in MMEB.sets) <= ALL
    looks = {draw(thing, ("one look",)).tobytes() for thing in things(PLAIN, 17, "any")}
    assert len(looks) == PLAIN
    assert things(40, 17, "any") == things(PLAIN, 17, "any")[:40]


# -- lists of candidates -----------------------------------------------------------------------------------------------------------------


LISTS = [(8, 6, 6), (8, 6, 16), (8, 6, 4), (8, 6, 5), (1, 1, 2), (40, 20, 7), (30, 5, 90)]


@pytest.mark.parametrize(("queries", "count", "distinct"), LISTS)
def test_candidate_lists(queries: int, count: int, distinct: int) -> None:
    members = candidate_lists(queries, count, distinct, "key")
    assert members.shape == (queries, count)
    assert members[:, 0].tolist() == [row % distinct for row in range(queries)]
    for gold, *wrong in members.tolist():
        if distinct >= count:
            assert gold not in wrong and len(set(wrong)) == count - 1
        else:
            assert {gold, *wrong} == set(range(distinct)) and gold in wrong
    if queries * (count - 1) >= distinct:
        assert set(members.ravel().tolist()) == set(range(distinct))


def test_the_small_size_keeps_which_sets_have_more_or_fewer_distinct_candidates_than_a_list() -> None:
    for spec in MMEB.sets:
        _, count, distinct = Size().counts(spec)
        real = spec.distinct or max(spec.queries, spec.candidates)
        if spec.distinct:
            assert np.sign(distinct - count) == np.sign(real - spec.candidates), spec.name
        assert Size(full=True).counts(spec) == (spec.queries, spec.candidates, real)


# -- traps, evaluation -------------------------------------------------------------------------------------------------------------------


def test_trap_one_set_has_two_names(folder: Path) -> None:
    assert (folder / "MMEB-eval" / "ImageNet-1K").is_dir() and (folder / "MMEB-train" / "ImageNet_1K").is_dir()
    assert not (folder / "MMEB-eval" / "ImageNet_1K").exists() and not (folder / "MMEB-train" / "ImageNet-1K").exists()


@pytest.mark.parametrize("name", ["WebQA", "EDIS"])
def test_trap_placeholder_without_a_picture(folder: Path, name: str) -> None:
    for row in table(folder, name):
        assert row["qry_text"].startswith(f"{PLACEHOLDER}\n") and row["qry_img_path"] == ""
    assert PLACEHOLDER not in render(eval_set(folder, name).queries[0])


def test_trap_placeholder_without_a_picture_in_training(folder: Path) -> None:
    assert all(row["qry"].startswith(PLACEHOLDER) and row["qry_image_path"] == "" for row in train_table(folder, "WebQA"))


def test_trap_two_newlines_and_no_period(folder: Path) -> None:
    for row in table(folder, "VisDial"):
        assert row["qry_text"].endswith("\n\n") and not row["qry_text"].endswith("\n\n\n") and row["qry_text"].count("\nQ:") == 2
        assert set(row["tgt_text"]) == {f"{PLACEHOLDER}\nRepresent the given image\n"}
    assert set(table(folder, "CIRR")[0]["tgt_text"]) == {f"{PLACEHOLDER}\nRepresent the given image.\n"}


@pytest.mark.parametrize("name", ["MSCOCO", "RefCOCO", "Visual7W-Pointing"])
def test_trap_targets_without_newline_and_tiny_crops_with_spaces_in_their_names(folder: Path, name: str) -> None:
    for row in table(folder, name):
        assert set(row["tgt_text"]) == {f"{PLACEHOLDER}\nRepresent the given cropped image of the object"}
        for path in row["tgt_img_path"]:
            assert re.fullmatch(rf"{name}/5588\d\d_object_\w+ \w+ \w+\.jpg", path)
            width, height = load_image(ImageRef(folder / "MMEB-eval" / "eval_images" / path)).size
            assert width <= 77 and height <= 70


def test_trap_a_crop_is_a_part_of_the_querys_picture(folder: Path) -> None:
    found = eval_set(folder, "MSCOCO")
    for row, query in enumerate(found.queries):
        scene, crop = (np.asarray(load_image(item.images[0])).astype(int) for item in (query, listed(found, row)[0]))
        halves = scene[:, : crop.shape[1]], scene[:, -crop.shape[1] :]
        same, other = sorted(np.abs(half - crop).mean() for half in halves)
        assert same < 8 and other > 2 * same  # both are JPEG


def test_trap_to_to(folder: Path) -> None:
    assert all("Crop the image to to isolate" in row["qry_text"] for row in table(folder, "MSCOCO"))
    assert all("Select the portion of the image that isolates" in row["qry"] for row in train_table(folder, "MSCOCO"))


@pytest.mark.parametrize("name", ["WebQA", "EDIS", "OVEN"])
def test_trap_same_picture_with_other_captions(folder: Path, name: str) -> None:
    found = eval_set(folder, name)
    captions = Counter(str(item.images[0].source) for item in found.candidates)
    assert max(captions.values()) == 2 and min(captions.values()) == 1
    assert len(found.candidates) == len({item.key for item in found.candidates}) == 8


def test_trap_same_picture_with_other_text_and_the_instruction_on_both_sides(folder: Path) -> None:
    found = eval_set(folder, "RefCOCO-Matching")
    assert max(Counter(str(item.images[0].source) for item in found.candidates).values()) == 2
    for item in (*found.queries, *found.candidates):
        assert item.text.startswith(f'{PLACEHOLDER}\nSelect the portion of the image that follows the language expressions: "')
    for row, query in enumerate(found.queries):
        assert query.images == listed(found, row)[0].images


@pytest.mark.parametrize("name", ["A-OKVQA", "ScienceQA"])
def test_trap_repeats_also_of_the_gold(folder: Path, name: str) -> None:
    assert eval_set(folder, name).duplicates > 0
    for row in table(folder, name):
        gold, *wrong = row["tgt_text"]
        assert gold in wrong and len(set(wrong)) < len(wrong) + 1


def test_trap_absent_paths_are_empty_or_null(folder: Path) -> None:
    for name in NAMES:
        if SPECS[name].target_modality == "T":
            entries = {path for row in table(folder, name) for path in row["tgt_img_path"]}
            assert entries == {None if name in ("GQA", "Country211") else ""}


def test_trap_two_candidates_only(folder: Path) -> None:
    assert all(sorted(row["tgt_text"]) == ["No", "Yes"] for row in table(folder, "HatefulMemes"))


ODD = {"grey": "L", "cmyk": "CMYK", "palette": "P", "sixteen-bit": "I;16", "turned": "RGB", "misnamed": "RGB", "upper-case": "RGB"}


@pytest.mark.parametrize("encoder", ODD)
@pytest.mark.parametrize("part", PARTS)
def test_trap_odd_pictures(folder: Path, encoder: str, part: str) -> None:
    name = next(name for name, used in traps.ENCODED.items() if used == encoder and SPECS[name].train)
    query = eval_set(folder, name).queries[0] if part == "MMEB-eval" else pairs(folder, str(SPECS[name].train))[0].query
    file = Path(str(query.images[0].source))
    with Image.open(file) as picture:
        assert picture.mode == ODD[encoder]
        assert ("transparency" in picture.info) == (encoder == "palette")
        assert (picture.getexif().get(274) == 6) == (encoder == "turned")
        assert (picture.format == {".png": "PNG"}.get(file.suffix, "JPEG")) == (encoder != "misnamed")
        size = picture.size
    assert (file.suffix == ".JPG") == (encoder == "upper-case")
    assert load_image(query.images[0]).size == (size[::-1] if encoder == "turned" else size)


def test_trap_a_transparent_ground_hides_nothing_that_is_asked_for(folder: Path) -> None:
    found = eval_set(folder, "VOC2007")
    assert said(listed(found, 0)[0].text) <= colours(found.queries[0].images[0])


def test_trap_same_bytes_under_two_names(folder: Path) -> None:
    for first, second in (("MSCOCO_i2t", "MSCOCO_t2i"), ("VisualNews_i2t", "VisualNews_t2i")):
        keys = [content_key(item.images[0]) for item in eval_set(folder, first).queries]
        assert keys == [content_key(listed(eval_set(folder, second), row)[0].images[0]) for row in range(8)]
        assert not {item.images[0].key for item in eval_set(folder, first).queries} & {
            item.images[0].key for item in eval_set(folder, second).candidates
        }


@pytest.mark.parametrize(("name", "home"), [("Visual7W-Pointing", "Visual7W"), ("RefCOCO-Matching", "RefCOCO")])
def test_trap_sets_share_files(folder: Path, name: str, home: str) -> None:
    paths = [{row["qry_img_path"] for row in table(folder, other)} for other in (name, home)]
    assert paths[0] and paths[0] <= paths[1] and all(path.startswith(f"{home}/") for path in paths[0])


def test_trap_unicode(folder: Path) -> None:
    texts = "".join(item.text for item in eval_set(folder, "VisualNews_i2t").candidates)
    assert all(word in texts for word in ("Łódź", "São Tomé", "東京", "Київ", "القاهرة", "🏔"))


def test_trap_very_long_texts(folder: Path) -> None:
    assert len(eval_set(folder, "N24News").queries[0].text) > 20_000
    assert len(eval_set(folder, "DocVQA").queries[0].text) > 20_000
    assert max(len(item.text) for item in eval_set(folder, "OVEN").candidates) > 20_000


def test_trap_space_at_the_end_of_a_question(folder: Path) -> None:
    assert sum(row["qry_text"].endswith(" \n") for row in table(folder, "VizWiz")) == 3


# -- traps, training ---------------------------------------------------------------------------------------------------------------------


def test_trap_negatives_that_are_pictures_without_text(folder: Path) -> None:
    for row in train_table(folder, "VisDial"):
        assert row["neg_text"] == "" and row["neg_image_path"].startswith("images/VisDial/Train/VisDial_image_")
    assert all(len(pair.negatives) == 1 for pair in pairs(folder, "VisDial"))


def test_trap_no_columns_of_negatives_or_empty_ones(folder: Path) -> None:
    for name in TRAIN_NAMES:
        for row in train_table(folder, name):
            assert ("neg_text" in row) == ("neg_image_path" in row) == (name not in ("NIGHTS", "SUN397"))
            if name in ("ImageNet_1K", "CIRR", "WebQA", "MSCOCO"):
                assert row["neg_text"] == row["neg_image_path"] == ""
            elif name not in ("NIGHTS", "SUN397"):
                assert row["neg_text"] or row["neg_image_path"]


def test_trap_identical_positives(folder: Path) -> None:
    assert Counter(row["pos_text"] for row in train_table(folder, "HatefulMemes")) == {"Yes": 6, "No": 6}


def test_trap_file_names_of_training_pictures(folder: Path) -> None:
    assert all("_object_" in (path := row["pos_image_path"]) and " " in path for row in train_table(folder, "MSCOCO"))
    assert train_table(folder, "ImageNet_1K")[1]["qry_image_path"] == "images/ImageNet_1K/Train/image_1.jpg"


def test_trap_diverse_instructions_hold_the_placeholder_anywhere(folder: Path) -> None:
    texts = {name: [row["qry"] for row in train_table(folder, name, "diverse_instruction")] for name in TRAIN_NAMES}
    assert f"Represent {PLACEHOLDER} for classification.\n" in texts["ImageNet_1K"]
    for name, found in texts.items():
        original = train_table(folder, name)
        assert found != [row["qry"] for row in original]
        for text, row in zip(found, original, strict=True):
            assert text.count(PLACEHOLDER) == row["qry"].count(PLACEHOLDER)
            assert text.endswith(row["qry"].split(": ")[-1] if ": " in row["qry"] else "\n")
    shown = [text for name, found in texts.items() for text in found if PLACEHOLDER in text]
    assert {text.startswith(PLACEHOLDER) for text in shown} == {True, False}
    assert any(text.endswith(f"{PLACEHOLDER}.\n") or text.endswith(f"{PLACEHOLDER}\n") for text in shown)


def test_only_the_queries_text_is_diverse(folder: Path) -> None:
    for name in TRAIN_NAMES:
        for diverse, row in zip(train_table(folder, name, "diverse_instruction"), train_table(folder, name), strict=True):
            assert diverse | {"qry": ""} == row | {"qry": ""}


def b3_rows(folder: Path, name: str) -> list[Row]:
    return pq.read_table(folder / name / "train-00000-of-00001.parquet").to_pylist()


def test_lists_of_negatives(tmp_path: Path) -> None:
    write_b3(tmp_path, MMEB)
    for name in TRAIN_NAMES:
        rows = b3_rows(tmp_path, name)
        read = read_train(tmp_path, name, split="train")
        assert len(rows) == len(read) == 12
        for row in rows:
            assert len(row["neg_text"]) == len(row["neg_image_path"]) == 5
            assert row["neg_text"][3:] == ["", ""] and row["neg_image_path"][3:] == ["", None]
        found = [read[index] for index in range(12)]
        assert {len(pair.negatives) for pair in found} == {3}
        assert all(load_image(image) for pair in found for item in pair.negatives for image in item.images)


# -- the other layouts -------------------------------------------------------------------------------------------------------------------


def compose(spec: SetSpec, row: Row) -> tuple[str, list[str]]:
    """Query and targets as MMEB-V2 puts them together: an image token and a space in front, no space before a newline, one at the end."""

    def shown(text: str) -> str:
        return f"{PLACEHOLDER} {text}".replace(" \n", "\n")

    def bare(text: str) -> str:
        return text.replace(PLACEHOLDER, "")

    def joined(instruction: str, text: str) -> str:
        return f"{instruction} {text}" if text else instruction

    query, target = row["qry_inst"], bare(row["tgt_inst"])
    if spec.target_modality == "T":
        targets = row["tgt_text"]
    elif row["tgt_text"][0].strip():
        targets = [shown(f"{target} {text}") + "\n" for text in row["tgt_text"]]
    else:
        targets = [shown(target) + ("\n" if spec.query_modality == "T" else "")] * len(row["tgt_img_path"])
    if spec.meta_task == "retrieval" and spec.query_modality == "T":
        return f"{query} {row['qry_text']}\n" + "\n" * (spec.name == "VisDial"), targets
    if spec.meta_task in ("vqa", "grounding") or (spec.meta_task == "retrieval" and spec.target_modality != "T"):
        return shown(joined("\n" + bare(query).strip(), row["qry_text"])) + "\n", targets
    return shown(joined(bare(query), row["qry_text"])) + "\n", targets


@pytest.mark.parametrize("name", NAMES)
def test_instructions_apart_compose_to_the_text_of_version_1(folder: Path, others: dict[str, Path], name: str) -> None:
    rows = table(others["instruct"], name)
    assert list(rows[0]) == ["qry_inst", "qry_text", "qry_img_path", "tgt_inst", "tgt_text", "tgt_img_path"]
    for apart, row in zip(rows, table(folder, name), strict=True):
        assert compose(SPECS[name], apart) == (row["qry_text"], row["tgt_text"])
        assert [apart[column] for column in ("qry_img_path", "tgt_img_path")] == [row["qry_img_path"], row["tgt_img_path"]]
        assert "{text}" not in str(apart) and apart["qry_inst"] and bool(apart["tgt_inst"]) == ("I" in SPECS[name].target_modality)


@pytest.mark.parametrize("name", NAMES)
def test_old_rows_have_one_empty_text_for_targets_that_are_pictures(folder: Path, others: dict[str, Path], name: str) -> None:
    for old, row in zip(table(others["old"], name), table(folder, name), strict=True):
        assert old == (row | {"tgt_text": ""} if SPECS[name].target_modality == "I" else row)
    found, now = eval_set(others["old"], name), eval_set(folder, name)
    assert [item.text for item in found.queries] == [item.text for item in now.queries]
    assert len(listed(found, 0)) == len(listed(now, 0))


# -- archives ----------------------------------------------------------------------------------------------------------------------------


def test_archives_of_training_pictures(folder: Path, hub: Path) -> None:
    for name in TRAIN_NAMES:
        with zipfile.ZipFile(hub / "TIGER-Lab" / "MMEB-train" / "images_zip" / f"{name}.zip") as archive:
            contents = {path: archive.read(path) for path in archive.namelist()}
        junk = {path for path in contents if path.startswith("__MACOSX/") or path.rpartition("/")[2].startswith(".")}
        assert f"{name}/Train/.DS_Store" in junk
        assert {f"__MACOSX/{name}/Train/._", f"{name}/Train/._"} <= {path[: path.index("._") + 2] for path in junk if "._" in path}
        pictures = {path: data for path, data in contents.items() if path not in junk}
        rows, more = (train_table(folder, name), b3_rows(hub / "VLM2Vec" / "B3-2b", name))
        named = {row[column] for row in rows for column in row if column.endswith("image_path")}
        named |= {path for row in more for path in (row["qry_image_path"], row["pos_image_path"], *row["neg_image_path"])}
        assert {f"images/{path}" for path in pictures} == {path for path in named if path}
        for file in (folder / "MMEB-train" / "images" / name / "Train").iterdir():
            assert pictures[f"{name}/Train/{file.name}"] == file.read_bytes()
        for split in SPLITS:
            file = f"{name}/{split}-00000-of-00001.parquet"
            assert (hub / "TIGER-Lab" / "MMEB-train" / file).read_bytes() == (folder / "MMEB-train" / file).read_bytes()


def test_archives_of_evaluation_pictures(folder: Path, others: dict[str, Path], hub: Path) -> None:
    images = folder / "MMEB-eval" / "eval_images"
    files = {path.relative_to(images).as_posix(): path.read_bytes() for path in images.rglob("*") if path.is_file()}
    with zipfile.ZipFile(hub / "TIGER-Lab" / "MMEB-eval" / "images.zip") as archive:
        assert len(archive.namelist()) == len(files)
        assert {path: archive.read(path) for path in archive.namelist()} == files
    packed = io.BytesIO((hub / "TIGER-Lab" / "MMEB-V2" / "image-tasks" / "mmeb_v1.tar.gz").read_bytes())
    with tarfile.open(fileobj=packed, mode="r:gz") as tar:
        held = {entry.name: stream.read() for entry in tar if (stream := tar.extractfile(entry))}
    assert held == {f"MMEB/{path}": data for path, data in files.items()}
    for name in NAMES:
        file = f"{name}/test-00000-of-00001.parquet"
        assert (hub / "TIGER-Lab" / "MMEB-eval" / file).read_bytes() == (folder / "MMEB-eval" / file).read_bytes()
        instruct = hub / "ziyjiang" / "MMEB_Test_Instruct" / file
        assert instruct.read_bytes() == (others["instruct"] / "MMEB-eval" / file).read_bytes()


# -- sameness, sizes, errors -------------------------------------------------------------------------------------------------------------


def all_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_equal_arguments_give_equal_bytes_and_another_seed_does_not(folder: Path, hub: Path, tmp_path: Path) -> None:
    write_made(tmp_path / "again", MMEB)
    assert all_files(tmp_path / "again") == all_files(folder)
    write_archives(tmp_path / "hub", MMEB)
    assert all_files(tmp_path / "hub") == all_files(hub)
    write_made(tmp_path / "other", MMEB, seed=18)
    mine, other = all_files(folder), all_files(tmp_path / "other")
    changed = [path for path, data in mine.items() if other.get(path) != data]
    assert len(changed) > 0.95 * len(mine) - 1


def test_counts_are_what_is_asked_for_and_never_more_than_the_real_ones(tmp_path: Path) -> None:
    write_made(tmp_path, MMEB, queries=3, candidates=30, train_rows=2)
    for spec in made_suite(tmp_path).sets:
        assert (spec.queries, spec.candidates) == (3, min(30, SPECS[spec.name].candidates))
        assert len(eval_set(tmp_path, spec.name).candidates) == spec.distinct
    assert {len(pairs(tmp_path, name)) for name in TRAIN_NAMES} == {2}


def test_one_of_everything(tmp_path: Path) -> None:
    write_made(tmp_path, MMEB, queries=1, candidates=1, train_rows=1)
    for spec in made_suite(tmp_path).sets:
        found = eval_set(tmp_path, spec.name)
        assert (len(found.queries), len(listed(found, 0)), len(found.candidates), spec.distinct) == (1, 1, 1, 1)


def test_some_sets_bring_their_own_training_sets_only(tmp_path: Path) -> None:
    write_made(tmp_path, MMEB.only(["CIRR", "Visual7W-Pointing"]))
    suite = made_suite(tmp_path)
    assert [spec.name for spec in suite.sets] == ["CIRR", "Visual7W-Pointing"]
    assert [spec.name for spec in suite.train] == ["CIRR"]
    assert sorted(path.name for path in (tmp_path / "MMEB-train").iterdir()) == ["CIRR", "images"]
    assert {row["qry_img_path"].split("/")[0] for row in table(tmp_path, "Visual7W-Pointing")} == {"Visual7W-Pointing"}


def test_another_suite(tmp_path: Path) -> None:
    """Nothing depends on the names of the real sets."""
    modes = [("T", "T"), ("T", "I"), ("I", "I"), ("I+T", "T"), ("I+T", "I+T")]
    base = replace(SPECS["CIRR"], queries=5, candidates=4, distinct=None, query="{text}", target="Look: {text}", train="T")
    sets = [
        replace(base, name=f"S{index}", path=f"S{index}", query_modality=query, target_modality=target)
        for index, (query, target) in enumerate(modes)
    ]
    train = (TrainSpec(name="T", path="T", meta_task="retrieval", rows=9),)
    write_made(tmp_path, Suite("own", "", tmp_path, tuple(sets), train, ""))
    assert [spec.queries for spec in made_suite(tmp_path).sets] == [5] * 5
    assert len(pairs(tmp_path, "T")) == 12


def test_full_size(tmp_path: Path) -> None:
    started = time.process_time()
    write_made(tmp_path, MMEB.only(["A-OKVQA", "OVEN"]), full=True)
    assert time.process_time() - started < 15
    for spec in made_suite(tmp_path).sets:
        real, found = SPECS[spec.name], eval_set(tmp_path, spec.name)
        assert (len(found.queries), {len(listed(found, row)) for row in range(1000)}) == (1000, {1000})
        assert len(found.candidates) == spec.distinct == (real.distinct or 1000)
        assert (spec.queries, spec.candidates) == (real.queries, real.candidates)
    assert len({item.key for item in eval_set(tmp_path, "OVEN").queries}) == 1000


@pytest.mark.parametrize("count", ["queries", "candidates", "train_rows"])
def test_counts_below_one(tmp_path: Path, count: str) -> None:
    for write in (write_made, write_archives):
        with pytest.raises(DataError, match=f"made-up data: {count} must be >= 1, got 0"):
            write(tmp_path, MMEB, **{count: 0})
    with pytest.raises(DataError, match="train_rows must be >= 1, got -1"):
        write_b3(tmp_path, MMEB, train_rows=-1)
    assert not list(tmp_path.iterdir())
