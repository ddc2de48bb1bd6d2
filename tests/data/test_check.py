"""`vlm2vec data check`: each way for a data folder to be incomplete is found, named and counted, and a whole one passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlm2vec.cli import main
from vlm2vec.data.check import check, table
from vlm2vec.data.check.report import Example, Finding, Report, SetReport
from vlm2vec.data.tiny import write_tiny
from vlm2vec.errors import DataError

SHEET = """suite: two
description: two evaluation sets and two training sets
root: .
sets:
- {name: Words-1K, meta_task: vqa, split: IND, path: Words-1K, query_modality: I+T, target_modality: T, queries: 3, candidates: 2,
   source: s, licence: l}
- {name: Looks, meta_task: retrieval, split: OOD, path: Looks, query_modality: T, target_modality: I, queries: 3, candidates: 2,
   source: s, licence: l}
train:
- {name: Words_1K, path: Words_1K, meta_task: vqa, rows: 4}
- {name: Looks, path: Looks, meta_task: retrieval, rows: 1000, rounded: 1000}
"""

Edit = Callable[[Path], object]


def save(file: Path, columns: Mapping[str, list[Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), file)


def paint(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9), (1, 2, 3)).save(file)


def words(**changes: list[Any]) -> dict[str, list[Any]]:
    columns = {"qry_text": ["<|image_1|>\na", "b", "c"], "qry_img_path": [f"Words/{row}.jpg" for row in range(3)]}
    return columns | {"tgt_text": [["x", "y"]] * 3, "tgt_img_path": [["", ""]] * 3} | changes


def looks(**changes: list[Any]) -> dict[str, list[Any]]:
    columns = {"qry_text": ["a", "b", "c"], "qry_img_path": [""] * 3, "tgt_text": [["<|image_1|>\n", ""]] * 3}
    return columns | {"tgt_img_path": [[f"Looks/{row}.jpg", "Looks/3.jpg"] for row in range(3)]} | changes


def trained(rows: int, **changes: list[Any]) -> dict[str, list[Any]]:
    columns = {"qry": ["<|image_1|>\nq"] * rows, "qry_image_path": [f"images/Words/Train/{row % 4}.jpg" for row in range(rows)]}
    return columns | {"pos_text": ["p"] * rows, "pos_image_path": [""] * rows} | changes


@pytest.fixture
def suite(tmp_path: Path) -> str:
    (tmp_path / "datasets.yaml").write_text(SHEET)
    return str(tmp_path / "datasets.yaml")


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    root = tmp_path / "eval"
    save(root / "Words-1K/test-00000-of-00001.parquet", words())
    save(root / "Looks/test-00000-of-00001.parquet", looks())
    for name in [f"Words/{row}.jpg" for row in range(3)] + [f"Looks/{row}.jpg" for row in range(4)]:
        paint(root / "eval_images" / name)
    return root


@pytest.fixture
def training(tmp_path: Path) -> Path:
    root = tmp_path / "train"
    for split in ("original", "diverse_instruction"):
        save(
            root / f"Words_1K/{split}-00000-of-00001.parquet",
            trained(4, neg_text=[""] * 4, neg_image_path=["images/Words/Train/4.jpg"] * 4),
        )
    save(root / "Looks/original-00000-of-00001.parquet", trained(1600))
    for row in range(5):
        paint(root / f"images/Words/Train/{row}.jpg")
    return root


def test_a_whole_evaluation_folder(evaluation: Path, suite: str) -> None:
    report = check(evaluation, suite)
    assert report.ok and report.notes == () and [entry.side for entry in report.sets] == ["eval", "eval"]
    assert [(entry.name, entry.rows, entry.candidates, entry.pictures, entry.present) for entry in report.sets] == [
        ("Words-1K", 3, 2, 3, 3),
        ("Looks", 3, 2, 4, 4),
    ]
    assert check(evaluation, suite, decode=True).ok
    assert "all is there; 2 sets, 6 rows, 7 of 7 pictures" in table(report)


def test_a_whole_training_folder_has_each_split_checked(training: Path, suite: str) -> None:
    report = check(training, suite)
    assert report.ok and [(entry.name, entry.rows, entry.pictures) for entry in report.sets] == [
        ("Words_1K (original)", 4, 5),
        ("Words_1K (diverse_instruction)", 4, 5),
        ("Looks", 1600, 4),
    ]


def test_a_folder_with_both_sides(tmp_path: Path) -> None:
    write_tiny(tmp_path, ["one"], 24)
    report = check(tmp_path, str(tmp_path), decode=True)
    assert report.ok and {entry.side for entry in report.sets} == {"eval", "train"}


# -- each way to be wrong ----------------------------------------------------------------------------------------------------------------


def rename(old: str, new: str) -> Edit:
    return lambda root: (root / old).rename(root / new)


def write(path: str, data: bytes) -> Edit:
    return lambda root: (root / path).write_bytes(data)


def table_of(**changes: list[Any]) -> Edit:
    return lambda root: save(root / "Words-1K/test-00000-of-00001.parquet", words(**changes))


def cut(path: str) -> Edit:
    return lambda root: (root / path).write_bytes((root / path).read_bytes()[:-50])


def link(path: str, to: str) -> Edit:
    def edit(root: Path) -> None:
        (root / path).unlink()
        (root / path).symlink_to(to)

    return edit


def drop_column(root: Path) -> None:
    save(root / "Words-1K/test-00000-of-00001.parquet", {name: cells for name, cells in words().items() if name != "tgt_text"})


ROWS, PICTURE = "Words-1K/test-00000-of-00001.parquet", "eval_images/Words/1.jpg"
WRONG: dict[str, tuple[Edit, str, int, str]] = {
    "no set": (lambda root: shutil.rmtree(root / "Words-1K"), "missing", 1, "Words-1K: no such folder; fetch it with"),
    "name of the training set": (rename("Words-1K", "Words_1K"), "misnamed", 1, "Words-1K: not there, but Words_1K is: rename it"),
    "name in lower case": (rename("Words-1K", "words-1k"), "misnamed", 1, "but words-1k is"),
    "hyphens and case": (rename("Looks", "L-OO_KS"), "misnamed", 1, "Looks: not there, but L-OO_KS is"),
    "a slip": (rename("Words-1K", "Word-1K"), "misnamed", 1, "but Word-1K is"),
    "no rows": (lambda root: (root / ROWS).unlink(), "missing", 1, "holds nothing, but no test-*.parquet"),
    "another split": (rename(ROWS, "Words-1K/validation.parquet"), "misnamed", 1, "holds validation.parquet, but no test"),
    "a shard of two": (rename(ROWS, "Words-1K/test-00000-of-00002.parquet"), "corrupt", 1, "should have 2 shards; missing: 1"),
    "cut short": (cut(ROWS), "corrupt", 1, "truncated or not a parquet file"),
    "git-lfs pointer": (write(ROWS, b"version https://git-lfs.github.com/spec/v1\n"), "corrupt", 1, "Git-LFS pointer"),
    "no column": (drop_column, "corrupt", 1, "column 'tgt_text' is missing"),
    "column of numbers": (table_of(qry_text=[1, 2, 3]), "corrupt", 1, "column 'qry_text' must be string, got int"),
    "lists that differ": (
        table_of(tgt_text=[["x", "y"]] * 2 + [["x", "y", "z"]]),
        "rows",
        1,
        "row 2: the lists do not match: tgt_text has 3",
    ),
    "empty queries": (table_of(qry_text=["", "<|image_1|> \n", "c"], qry_img_path=["", "", ""]), "rows", 2, "row 1: query has neither"),
    "empty candidate": (table_of(tgt_text=[["x", "y"], ["x", ""], ["<|image_1|>\n", "y"]]), "rows", 2, "row 1: a candidate has neither"),
    "no candidates": (
        table_of(tgt_text=[["x", "y"], [], ["x", "y"]], tgt_img_path=[["", ""], [], ["", ""]]),
        "rows",
        1,
        "row 1: no candidates",
    ),
    "fewer rows": (table_of(**{name: cells[:2] for name, cells in words().items()}), "count", 1, "2 rows, the suite says 3"),
    "fewer candidates": (
        table_of(tgt_text=[["x"]] * 3, tgt_img_path=[[""]] * 3),
        "count",
        1,
        "1 candidates per query (median), the suite says 2",
    ),
    "no picture": (lambda root: (root / PICTURE).unlink(), "missing pictures", 1, "row 1, Words/1.jpg: not there"),
    "no pictures": (lambda root: shutil.rmtree(root / "eval_images/Words"), "missing pictures", 3, "folder Words: No such file"),
    "extension": (rename(PICTURE, "eval_images/Words/1.JPEG"), "misnamed pictures", 1, "row 1, Words/1.jpg: not there, but 1.JPEG is"),
    "case": (
        rename("eval_images/Looks/3.jpg", "eval_images/Looks/3.JPG"),
        "misnamed pictures",
        1,
        "row 0, Looks/3.jpg: not there, but 3.JPG is",
    ),
    "zero bytes": (write(PICTURE, b""), "empty pictures", 1, "row 1, Words/1.jpg: not an image (the file is empty)"),
    "a web page": (
        write(PICTURE, b"<!DOCTYPE html>" + b" " * 5000),
        "web pages",
        1,
        "row 1, Words/1.jpg: not an image (looks like HTML, 5,015 bytes)",
    ),
    "a pointer": (write(PICTURE, b"version https://git-lfs"), "unreadable pictures", 1, "Git-LFS pointer"),
    "a pdf": (write(PICTURE, b"%PDF-1.7"), "unreadable pictures", 1, "looks like PDF"),
    "outside": (
        table_of(qry_img_path=["Words/0.jpg", "../../x.jpg", "/etc/passwd"]),
        "unsafe paths",
        2,
        "row 1, ../../x.jpg: path leaves root",
    ),
    "link out": (link(PICTURE, "/etc/hostname"), "unsafe paths", 1, "a symbolic link points outside"),
    "link to nothing": (link(PICTURE, "nothing.jpg"), "missing pictures", 1, "a link to nothing"),
}


@pytest.mark.parametrize("way", WRONG)
def test_each_way_to_be_wrong_is_found_and_named(way: str, evaluation: Path, suite: str) -> None:
    edit, kind, count, text = WRONG[way]
    edit(evaluation)
    report = check(evaluation, suite)
    found = [one for entry in report.sets for one in entry.findings]
    assert [(one.kind, one.count) for one in found] == [(kind, count)]
    assert not report.ok and any(text in str(example) for example in found[0].examples)
    assert text in table(report) and report.totals()[f"problems: {kind}"] == count


def test_a_picture_is_reported_with_the_first_row_that_names_it(evaluation: Path, suite: str) -> None:
    lists = [["Looks/0.jpg", "Looks/3.jpg"], ["Looks/0.jpg", "Looks/3.jpg"], ["Looks/2.jpg", "Looks/3.jpg"]]
    save(evaluation / "Looks/test-00000-of-00001.parquet", looks(tgt_img_path=lists))
    for name in ("Looks/2.jpg", "Looks/3.jpg"):
        (evaluation / "eval_images" / name).unlink()
    found = check(evaluation, suite).sets[1].findings[0]
    assert [(one.row, one.path) for one in found.examples] == [(0, "Looks/3.jpg"), (2, "Looks/2.jpg")]


def test_what_only_decoding_shows(evaluation: Path, suite: str) -> None:
    file = evaluation / PICTURE
    file.write_bytes(file.read_bytes()[:200])
    assert check(evaluation, suite).ok
    found = check(evaluation, suite, decode=True).sets[0].findings
    assert [(one.kind, one.examples[0].row, one.examples[0].path) for one in found] == [("unreadable pictures", 1, "Words/1.jpg")]
    assert "truncated" in found[0].examples[0].text


def test_older_rows_with_a_lone_empty_text_pass(evaluation: Path, suite: str) -> None:
    save(evaluation / "Looks/test-00000-of-00001.parquet", looks(tgt_text=["", "", ""]))
    assert check(evaluation, suite).ok


def test_rows_with_instructions_in_columns_of_their_own_pass(evaluation: Path, suite: str) -> None:
    save(evaluation / ROWS, words(qry_inst=["do"] * 3, tgt_inst=["do"] * 3))
    assert check(evaluation, suite).ok


@pytest.mark.parametrize(
    ("name", "columns", "kind", "text"),
    [
        ("Words_1K", trained(5), "count", "5 rows, the suite says 4"),
        ("Looks", trained(2100), "count", "2,100 rows, the suite says about 1,000"),
        ("Words_1K", trained(4, pos_text=["p", "p", "<|image_1|>", "p"]), "rows", "row 2: positive has neither text nor picture"),
        (
            "Words_1K",
            trained(4, neg_text=[["n"], ["n"], ["n", "m"], []], neg_image_path=[[""], [""], ["", "", ""], [""]]),
            "rows",
            "row 2: the lists",
        ),
        (
            "Words_1K",
            trained(4, neg_text=[[]] * 4, neg_image_path=[[], [], ["images/no.jpg"], []]),
            "missing pictures",
            "row 2, images/no.jpg",
        ),
    ],
)
def test_training_rows(name: str, columns: dict[str, list[Any]], kind: str, text: str, training: Path, suite: str) -> None:
    save(training / name / "original-00000-of-00001.parquet", columns)
    found = [one for entry in check(training, suite).sets for one in entry.findings]
    assert [one.kind for one in found] == [kind] and text in str(found[0].examples[0])


# -- remarks, choices, output ------------------------------------------------------------------------------------------------------------


def test_leftovers_are_remarks_and_no_problems(evaluation: Path, suite: str) -> None:
    (evaluation / "images_zip").mkdir()
    for name in ("images.zip", "images_zip/Looks.zip", "eval_images/._x.jpg", ".DS_Store"):
        (evaluation / name).write_bytes(b"PK")
    report = check(evaluation, suite)
    assert report.ok and len(report.notes) == 2
    assert report.notes[0] == "2 archives (images.zip, images_zip/Looks.zip): everything in them is in place, they may be deleted"
    assert report.notes[1].startswith("2 files that macOS or Windows left (.DS_Store, eval_images/._x.jpg")
    shutil.rmtree(evaluation / "eval_images")
    assert "still packed?" in check(evaluation, suite).notes[0]


def test_some_sets(evaluation: Path, suite: str) -> None:
    shutil.rmtree(evaluation / "Looks")
    assert check(evaluation, suite, ["Words-1K"]).ok and not check(evaluation, suite).ok
    with pytest.raises(DataError, match="no set 'Word' to check; there are: Looks, Words-1K"):
        check(evaluation, suite, ["Word"])


def test_what_is_no_data_folder(tmp_path: Path, suite: str) -> None:
    with pytest.raises(DataError, match="no such folder"):
        check(tmp_path / "nothing", suite)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="neither evaluation nor training data of two.*it holds nothing"):
        check(tmp_path / "empty", suite)


def test_examples_are_capped_and_counts_are_not(evaluation: Path, suite: str) -> None:
    many = 1500
    save(evaluation / ROWS, {"qry_text": ["q"] * many, "qry_img_path": [f"Gone/{row}.jpg" for row in range(many)],
                             "tgt_text": [["x", "y"]] * many, "tgt_img_path": [["", ""]] * many})  # fmt: skip
    found = {one.kind: one for one in check(evaluation, suite).sets[0].findings}["missing pictures"]
    assert (found.count, len(found.examples), found.examples[999].row) == (1500, 1000, 999)


def test_the_command_line(evaluation: Path, suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "check", str(evaluation), "--suite", suite, "--json", str(tmp_path / "report.json")]
    assert main(command) == 0
    assert json.loads((tmp_path / "report.json").read_text())["ok"] is True
    (evaluation / PICTURE).unlink()
    capsys.readouterr()
    assert main([*command, "--decode"]) == 2
    said = capsys.readouterr()
    assert "Words-1K: 1 missing pictures" in said.out and "is not complete" in said.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["totals"] == {"sets": 2, "ok": 1, "rows": 6, "pictures": 7, "present": 6, "problems: missing pictures": 1}
    assert report["sets"][0]["findings"][0]["examples"] == [{"text": "not there", "row": 1, "path": "Words/1.jpg"}]


def test_the_table_lines_up() -> None:
    wrong = SetReport(
        "A", "eval", 1000, 2, 10, 9, (Finding("missing pictures", 7, tuple(Example("not there", row, "p.jpg") for row in range(7))),)
    )
    shown = table(Report("data", "mmeb", False, (wrong, SetReport("Longer", "eval", 1, 2, 3, 3)), ("a remark",))).splitlines()
    assert shown[:3] == [
        "set      rows  candidates  pictures  present  problems",
        "A       1,000           2        10        9  7 missing pictures",
        "Longer      1           2         3        3  none",
    ]
    assert shown[4:7] == ["A: 7 missing pictures", "  row 0, p.jpg: not there", "  row 1, p.jpg: not there"] and "  and 2 more" in shown
    assert shown[-2] == "note: a remark" and shown[-1].startswith("data: 7 problems in 1 of 2 sets; 2 sets, 1,001 rows, 12 of 13 pictures")


def test_a_million_candidates(tmp_path: Path, suite: str) -> None:
    codes = np.random.default_rng(0).integers(0, 7000, 1_000_000).astype(np.int32)
    paths, texts = (pa.array([form % number for number in range(7000)]) for form in ("Looks/%d.jpg", "caption number %d of a street"))
    offsets = np.arange(0, 1_000_001, 1000, dtype=np.int32)
    lists = {
        name: pa.ListArray.from_arrays(offsets, values.take(pa.array(codes)))
        for name, values in (("tgt_text", texts), ("tgt_img_path", paths))
    }
    root = tmp_path / "eval"
    (root / "Looks").mkdir(parents=True)
    pq.write_table(pa.table({"qry_text": ["q"] * 1000, "qry_img_path": [""] * 1000, **lists}), root / "Looks/test-00000-of-00001.parquet")
    report = check(root, suite, ["Looks"])
    assert (report.sets[0].rows, report.sets[0].candidates, report.sets[0].pictures) == (1000, 1000, 7000)
