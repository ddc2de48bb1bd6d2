"""The embedded benchmark: what its sets promise, and that a build is the same everywhere, whole and checked."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlm2vec import io
from vlm2vec.data import mini
from vlm2vec.data.images import load_image
from vlm2vec.data.mini import chance, checks, draw, packages, pool, table, world, write
from vlm2vec.data.mini.rows import Example, Picture, Question, Side, TaskRows
from vlm2vec.data.mini.sources import Icon
from vlm2vec.data.mini.spec import SetSpec
from vlm2vec.data.mmeb import read_eval, read_train
from vlm2vec.data.types import Item
from vlm2vec.errors import DataError, EnvError
from vlm2vec.suite import load_suite

pytestmark = pytest.mark.skipif(
    any(packages.found(package) is None for package in packages.PACKAGES), reason=f"needs the packages of the benchmark: {packages.INSTALL}"
)

Made = dict[str, tuple[SetSpec, TaskRows]]


@pytest.fixture(scope="module")
def sources() -> world.World:
    with pool.mapper() as mapped:
        return world.survey(mapped)


@pytest.fixture(scope="module")
def made(sources: world.World) -> Made:
    """Every set at its full size, not drawn."""
    return {spec.name: (spec, spec.make(sources, spec)) for spec in table.SETS}


def questions(made: Made) -> Iterator[tuple[SetSpec, Question]]:
    return ((spec, question) for spec, rows in made.values() for question in rows.questions)


def examples(made: Made) -> Iterator[tuple[SetSpec, Example]]:
    return ((spec, example) for spec, rows in made.values() for example in rows.train)


# -- what the sets promise ---------------------------------------------------------------------------------------------------------------


def test_every_meta_task_has_sets_in_and_out_of_distribution() -> None:
    kinds = Counter((spec.meta_task, spec.split) for spec in table.SETS)
    assert set(kinds) == {(task, split) for task in ("classification", "vqa", "retrieval", "grounding") for split in ("IND", "OOD")}
    assert sum(kinds.values()) >= 12


def test_ood_sets_have_no_training_rows_and_the_others_have_many(made: Made) -> None:
    for spec, rows in made.values():
        assert len(rows.train) == 0 if spec.split == "OOD" else len(rows.train) >= 500, spec.name
        assert len(rows.train) <= max(spec.train, 1), spec.name
    assert 10_000 <= sum(len(rows.train) for _, rows in made.values()) <= 25_000


def test_sets_have_the_queries_that_they_promise(made: Made) -> None:
    for spec, rows in made.values():
        assert 0.8 * spec.queries <= len(rows.questions) <= spec.queries or spec.name == "DigitIcons", spec.name
        assert len({(question.query, question.candidates[0]) for question in rows.questions}) == len(rows.questions), spec.name


def test_candidates_are_distinct_and_no_more_than_promised(made: Made) -> None:
    for spec, question in questions(made):
        assert 9 <= len(question.candidates) <= spec.candidates <= 1000, spec.name
        assert len(set(question.candidates)) == len(question.candidates), spec.name


def test_the_query_picture_is_a_candidate_only_where_something_is_to_be_changed(made: Made) -> None:
    for spec, question in questions(made):
        shown = [side.picture for side in question.candidates if side.picture]
        assert (question.query.picture in shown) == (spec.name == "IconChanges"), spec.name


def test_the_order_of_candidates_behind_the_gold_tells_nothing(made: Made) -> None:
    """Without their golds, two questions of a set list what they share in the same order."""
    for spec, rows in made.values():
        if spec.meta_task in ("classification", "vqa"):
            first, last = rows.questions[0].candidates, rows.questions[-1].candidates
            golds = {first[0], last[0]}
            assert [side for side in first if side not in golds] == [side for side in last if side not in golds], spec.name


def test_prompts_have_the_form_of_mmeb(made: Made) -> None:
    for spec, question in questions(made):
        assert question.query.text.startswith("<|image_1|>\n") == ("image" in spec.query_modality), spec.name
        assert question.query.text.endswith("\n"), spec.name
        for side in question.candidates[:2]:
            assert side.text.startswith("<|image_1|>\n") == (spec.target_modality == "image") == (side.picture is not None), spec.name
            assert side.text.endswith("\n") == (spec.target_modality == "image" and spec.meta_task == "retrieval"), spec.name


def test_nothing_that_evaluation_shows_is_in_training_not_even_as_a_part(made: Made) -> None:
    trained = {part for _, example in examples(made) for side in write._sides(example) for part in shown_by(side)}
    asked = {part for _, question in questions(made) for side in (question.query, *question.candidates) for part in shown_by(side)}
    assert len(trained) > 5000 and len(asked) > 2000 and not trained & asked


def shown_by(side: Side) -> Iterator[Any]:
    """The drawings that a picture is put together from; a digit by its row."""
    drawing = side.picture.drawing if side.picture else None
    if isinstance(drawing, draw.Sheet):
        yield from (cell for cell in drawing.cells if cell)
    elif isinstance(drawing, draw.Digits):
        yield from drawing.rows
    elif drawing:
        yield drawing.content if isinstance(drawing, draw.Cell) else drawing


@pytest.mark.parametrize("name", ["IconNames_i2t", "IconNames_t2i", "EmojiNames_i2t", "EmojiNames_t2i"])
def test_held_out_names_are_made_of_words_that_training_names_hold(made: Made, name: str) -> None:
    spec, rows = made[name]
    strip = len(spec.instruction)
    trained = Counter(word for example in rows.train for word in set(_name(example.query, example.positive, strip).split()))
    for question in rows.questions:
        words = _name(question.query, question.candidates[0], strip).split()
        assert all(trained[word] >= world.SPARE for word in words), words


def _name(query: Side, target: Side, strip: int) -> str:
    return (query.text[strip:].strip() if target.picture else target.text).lower().replace("-", " ")


def test_questions_do_not_give_the_answer_away(made: Made) -> None:
    """Who answers each question with the most frequent training answer to it, blind, is right in less than a third of the cases."""
    for spec, rows in made.values():
        if spec.meta_task == "vqa" and rows.train:
            answers: dict[str, Counter[str]] = {}
            for example in rows.train:
                answers.setdefault(example.query.text, Counter())[example.positive.text] += 1
            guesses = [answers.get(question.query.text, Counter({"": 1})).most_common(1)[0][0] for question in rows.questions]
            right = [guess == question.candidates[0].text for guess, question in zip(guesses, rows.questions, strict=True)]
            assert sum(right) / len(right) < 0.3, spec.name


def test_a_changed_icon_has_one_variant_more_and_its_family_among_the_candidates(sources: world.World, made: Made) -> None:
    icons = {(icon.family, icon.name): icon for icon in sources.icons.test}

    def parts(side: Side) -> tuple[str, frozenset[str]]:
        assert side.picture
        return icons[side.picture.collection, side.picture.name].parts

    for question in made["IconChanges"][1].questions:
        stem, before = parts(question.query)
        gold_stem, after = parts(question.candidates[0])
        family = {icon.parts for icon in sources.icons.test if icon.parts[0] == stem}
        assert stem == gold_stem and before < after and len(after - before) == 1
        assert family <= {parts(side) for side in question.candidates}


def test_crops_of_the_same_sheet_are_among_the_candidates(made: Made) -> None:
    for name in ("EmojiSheets", "SheetPlaces", "IconSheets"):
        for question in made[name][1].questions:
            assert question.query.picture and isinstance(question.query.picture.drawing, draw.Sheet)
            crops = [side.picture.drawing.content for side in question.candidates if side.picture]  # type: ignore[union-attr]
            assert set(question.query.picture.drawing.cells) <= set(crops), name
            assert crops[0] in question.query.picture.drawing.cells, name


def test_names_in_other_languages_are_not_the_english_ones(sources: world.World, made: Made) -> None:
    english = {write.eval_path(Picture("Twemoji", emoji.code, emoji.twemoji)): emoji.name for emoji in sources.emoji.train}
    spec, rows = made["ForeignNames_t2i"]
    for question in rows.questions:
        assert question.candidates[0].picture
        name = english[write.eval_path(question.candidates[0].picture)]
        assert question.query.text[len(spec.instruction) :].strip().casefold() != name.casefold()


@pytest.mark.parametrize(
    ("name", "stem", "variants"),
    [
        ("folder-plus-outline", "folder", {"plus", "outline"}),
        ("file-arrow-right", "file", {"arrow-right"}),
        ("arrow-right", "arrow-right", set()),
        ("outline", "outline", set()),
        ("file-box-box", "file-box", {"box"}),
        ("heart", "heart", set()),
    ],
)
def test_variants_are_read_from_the_end_of_a_name(name: str, stem: str, variants: set[str]) -> None:
    assert Icon("Material", name, draw.Lucide(name, 64)).parts == (stem, variants)


# -- choices ---------------------------------------------------------------------------------------------------------------------------


def test_choices_do_not_change() -> None:
    """By sha256 of "17", "icons" and "heart" joined with the unit separator, worked out apart; a change means other rows for everybody."""
    assert chance.rank(17, "icons", "heart") == 18304144456284923672
    assert "".join(chance.shuffled("abcdef", str, 17)) == "edbcfa"


def test_an_order_does_not_depend_on_the_order_before() -> None:
    assert chance.shuffled(range(50), int, 1) == chance.shuffled(reversed(range(50)), int, 1) != chance.shuffled(range(50), int, 2)


def test_balanced_keeps_the_first_of_each_label() -> None:
    assert chance.balanced("aabbbca", str, 2) == list("aabbc")


def test_look_alikes_are_left_out() -> None:
    assert world._distinct(["heart", "cards-heart", "star"], {"heart": "p", "cards-heart": "p", "star": "q"}) == ["star"]


# -- drawing -----------------------------------------------------------------------------------------------------------------------------


def test_a_sheet_shows_its_cells_and_a_crop_is_what_the_sheet_shows() -> None:
    digits = [draw.Digits((row,)) for row in range(3)]
    sheet = draw.pixels(draw.Sheet((digits[0], None, digits[1], None, digits[2], None, None, None, None)))
    assert sheet.size == (3 * draw.CELL, 3 * draw.CELL)
    for digit, (column, row) in zip(digits, [(0, 0), (2, 0), (1, 1)], strict=True):
        box = (column * draw.CELL, row * draw.CELL, (column + 1) * draw.CELL, (row + 1) * draw.CELL)
        assert sheet.crop(box).tobytes() == draw.pixels(draw.Cell(digit)).tobytes()
    assert set(sheet.crop((0, 2 * draw.CELL, 3 * draw.CELL, 3 * draw.CELL)).tobytes()) == {255}


def test_digits_are_ink_on_white() -> None:
    ink, value = draw.scans()[0]
    assert (len(draw.scans()), value, max(max(scan) for scan, _ in draw.scans())) == (1797, 0, 16)
    picture = draw.pixels(draw.Digits((0, 0)))
    assert picture.size == (2 * draw.DIGIT, draw.DIGIT)
    assert picture.crop((0, 0, draw.DIGIT, draw.DIGIT)).tobytes() == picture.crop((draw.DIGIT, 0, 2 * draw.DIGIT, draw.DIGIT)).tobytes()
    assert picture.getpixel((0, 0)) == draw.WHITE and ink[0] == 0


def test_drawings_are_square_on_white_and_photographs_keep_their_shape() -> None:
    narrow = draw.pixels(draw.Svg("material", "templates/.icons/fontawesome/solid/bolt.svg", 64))
    assert narrow.size == (64, 64) and narrow.getpixel((0, 0)) == draw.WHITE and narrow.mode == "RGB"
    assert min(draw.pixels(draw.Photo(0)).size) == draw.PHOTO


# -- building ----------------------------------------------------------------------------------------------------------------------------


@contextmanager
def a_few_rows(sources: world.World, folder: Path) -> Iterator[None]:
    """A few rows of every set are the whole benchmark, and nothing is surveyed again."""
    few = tuple(dataclasses.replace(spec, train=min(spec.train, 6), queries=3, candidates=min(spec.candidates, 40)) for spec in table.SETS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "SETS", few)
        patch.setattr(world, "survey", lambda mapped: sources)
        patch.setattr(mini, "CHECKSUMS", folder / "checksums.json")
        yield


@pytest.fixture(scope="module")
def small(sources: world.World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of a few rows, to be read only."""
    folder = tmp_path_factory.mktemp("mini")
    with a_few_rows(sources, folder):
        record = mini.make(folder / "data", None, workers=1)
    io.write_json(folder / "checksums.json", {"sets": record["sets"]})
    return folder / "data"


@pytest.fixture
def few(sources: world.World, small: Path) -> Iterator[None]:
    """What is built or checked is the benchmark of a few rows."""
    with a_few_rows(sources, small.parent):
        yield


@pytest.fixture
def copy(few: None, small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "copy"))


def items(folder: Path) -> Iterator[tuple[str, Item]]:
    for spec in table.SETS:
        if (folder / "train" / spec.name).exists():
            rows = read_train(folder / "train", spec.name)
            for index in range(len(rows)):
                pair = rows[index]
                yield from ((spec.name, item) for item in (pair.query, pair.positive, *pair.negatives))
        questions = read_eval(folder / "eval", spec.name, image_root=folder / "eval_images")
        yield from ((spec.name, item) for item in (*questions.queries, *questions.candidates))


def test_the_products_own_readers_read_every_row_and_picture(small: Path) -> None:
    seen = Counter()
    for name, item in items(small):
        for image in item.images:
            size = load_image(image).size
            assert 48 <= min(size) <= max(size) <= 240, (name, size)
            seen[name] += 1
    assert set(seen) == {spec.name for spec in table.SETS}


def test_negatives_come_in_every_form_that_real_data_have(small: Path) -> None:
    forms = {}
    for spec in table.SETS:
        file = small / "train" / spec.name / write.TRAIN_FILE
        if file.exists():
            row = pq.read_table(file).to_pylist()[0]
            forms[spec.negatives] = (row.get("neg_text"), row.get("neg_image_path"))
    crop = "<|image_1|>\nRepresent the given cropped image of the object"
    assert forms["absent"] == (None, None) and forms["empty"] == ("", "")
    assert forms["bare"][0] == "" and forms["bare"][1].endswith(".png")
    assert forms["many"][0] == [crop, crop] and all(path.endswith(".png") for path in forms["many"][1])
    assert forms["one"][0] == "<|image_1|>\nRepresent the given icon.\n" and forms["one"][1].startswith("images/Material/Train/")


def test_negatives_are_neither_the_positive_nor_missing(small: Path) -> None:
    for spec in table.SETS:
        if spec.negatives in ("one", "bare", "many"):
            rows = read_train(small / "train", spec.name)
            for index in range(len(rows)):
                assert len(rows[index].negatives) == (2 if spec.negatives == "many" else 1), spec.name
                assert rows[index].positive.key not in {negative.key for negative in rows[index].negatives}, spec.name


def test_the_record_says_what_it_was_built_from(small: Path) -> None:
    record = io.read_json(small / mini.RECORD)
    assert record["versions"].keys() >= {package.distribution for package in packages.PACKAGES}
    assert record["counts"]["Digits"] == {"train": 6, "queries": 3}
    assert "CC-BY-SA-4.0" in (small / "ATTRIBUTION.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("few")
def test_two_workers_build_what_one_builds(small: Path, tmp_path: Path) -> None:
    assert mini.make(tmp_path / "again", None, workers=2)["sets"] == io.read_json(small / mini.RECORD)["sets"]


def test_building_again_checks_and_changes_nothing(copy: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in copy.rglob("*")}
    assert mini.build(copy, workers=1) == copy
    assert {file: file.stat().st_mtime_ns for file in copy.rglob("*")} == before


def test_another_compression_of_the_same_pixels_is_the_same_benchmark(copy: Path) -> None:
    file = next((copy / "eval_images" / "Material").glob("*.png"))
    data = file.read_bytes()
    Image.open(file).convert("RGBA").save(file, compress_level=0)
    assert file.read_bytes() != data
    found = _contents(copy)
    assert found == io.read_json(copy / mini.RECORD)["sets"]


def _contents(folder: Path) -> dict[str, str]:
    with pool.mapper(1) as mapped:
        return checks.contents(folder, table.SETS, mapped)


def _change_pixel(folder: Path) -> None:
    file = folder / "eval_images" / "Digits" / sorted(file.name for file in (folder / "eval_images" / "Digits").iterdir())[0]
    with Image.open(file) as picture:
        changed = picture.copy()
    changed.putpixel((0, 0), (254, 255, 255))
    changed.save(file)


def _drop_picture(folder: Path) -> None:
    next((folder / "train" / "images" / "OpenMoji" / "Train").glob("*.png")).unlink()


def _drop_rows(folder: Path) -> None:
    (folder / "eval" / "Digits" / write.EVAL_FILE).unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_change_pixel, "from the recorded checksums: eval/Digits."),
        pytest.param(_drop_picture, "OpenMoji/Train", marks=pytest.mark.slow),
        pytest.param(_drop_rows, "eval/Digits/test-", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_folder_is_built_again_and_the_log_says_why(
    copy: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], words: str
) -> None:
    damage(copy)
    with caplog.at_level(logging.WARNING):
        mini.build(copy, workers=1)
    assert words in caplog.text and "built again" in caplog.text
    assert _contents(copy) == io.read_json(copy / mini.RECORD)["sets"]
    assert sorted(path.name for path in copy.parent.iterdir()) == ["copy"]


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(DataError, match=r"is not empty and holds no built\.json"):
        mini.build(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "important"


@pytest.mark.usefixtures("few")
def test_other_packages_give_an_error_with_sets_and_versions(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = packages.PACKAGES
    monkeypatch.setattr(packages, "PACKAGES", (dataclasses.replace(pinned[0], version="9.9.9"), *pinned[1:]))
    expected = io.read_json(small / mini.RECORD)["sets"] | {"eval/Digits": "0" * 64}
    message = r"eval/Digits\. Packages that are not the pinned ones: mkdocs-material \S+ \(pinned: 9\.9\.9\); pip"
    with pytest.raises(DataError, match=message):
        mini.make(tmp_path / "data", expected, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "PACKAGES", (packages.Package("no-such-package", "no_such_package", "1.0", "MIT", "nobody"),))
    with pytest.raises(DataError, match=r'no-such-package \(1\.0\); run: pip install "vlm2vec\[demo\]"'):
        mini.make(tmp_path / "data", None)
    with pytest.raises(DataError, match="no-such-package"):
        packages.folder("no_such_package")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_error_of_the_environment(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvError, match="could not write the benchmark"):
        mini.make(tmp_path / "file" / "data", None)


def test_a_picture_in_training_and_evaluation_is_refused(copy: Path) -> None:
    trained = next((copy / "train" / "images" / "Digits" / "Train").glob("*.png"))
    shutil.copy(trained, next((copy / "eval_images" / "Digits").glob("*.png")))
    with pytest.raises(DataError, match="evaluation shows a picture that training shows"):
        _contents(copy)


def test_two_pictures_with_one_file_are_refused(tmp_path: Path) -> None:
    digits = [Side("", Picture("A", name, draw.Digits((0,)))) for name in ("one", "One")]
    rows = TaskRows((), (Question(Side("q"), tuple(digits)),))
    with pytest.raises(DataError, match="two pictures of the embedded benchmark have the file A/One.png"), pool.mapper(1) as mapped:
        write.write(tmp_path, [(table.SETS[0], rows)], mapped)


# -- what is recorded --------------------------------------------------------------------------------------------------------------------


def test_the_recorded_benchmark_has_the_sets_of_the_table(made: Made) -> None:
    suite, recorded = load_suite("mini"), io.read_json(mini.FOLDER / "checksums.json")
    assert [(spec.name, spec.meta_task, spec.split, spec.note) for spec in suite.sets] == [
        (spec.name, spec.meta_task, spec.split, spec.note) for spec, _ in made.values()
    ]
    assert {spec.path for spec in (*suite.sets, *suite.train)} == set(recorded["sets"])
    assert io.digest(recorded["sets"]) == recorded["total"]


def test_the_page_of_the_sets_says_what_the_list_says() -> None:
    suite, page = load_suite("mini"), (mini.FOLDER / "sets.md").read_text(encoding="utf-8")
    rows = {spec.name: spec.rows for spec in suite.train}
    for spec in suite.sets:
        counts = f"{rows.get(spec.name, '')} | {spec.queries} | {spec.candidates}"
        assert f"\n| {spec.name} | {spec.meta_task} | {spec.split} | {spec.query_modality} -> {spec.target_modality} | {counts} | " in page


def test_the_demo_extra_pins_the_packages() -> None:
    setup = (mini.FOLDER.parent.parent / "setup.cfg").read_text(encoding="utf-8")
    for package in packages.PACKAGES:
        pin = package.distribution if "newer" in package.version else f"{package.distribution}=={package.version}"
        assert f"\n    {pin}" in setup, f"extra demo of setup.cfg lacks {pin}"


@pytest.mark.slow
def test_the_whole_benchmark_is_the_recorded_one(tmp_path: Path) -> None:
    """Whatever machine this runs on; 20 seconds on two quiet cores."""
    assert mini.build(tmp_path / "data") == tmp_path / "data"
