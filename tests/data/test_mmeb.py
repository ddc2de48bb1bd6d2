"""MMEB rows, with the strings that the real data hold, become pairs and evaluation sets; rows that cannot are named."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlm2vec.data.mmeb import EvalSet, TrainRows, read_eval, read_set, read_train
from vlm2vec.data.sides import fill
from vlm2vec.data.types import Item, Pair
from vlm2vec.errors import DataError, PathError
from vlm2vec.prompts import render
from vlm2vec.suite import SetSpec, load_suite

TRAIN = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
DIALOGUE = "Represent the given dialogue about an image, which is used for image retrieval: Q:is this a child or adult\nA:adult\n\n"


def train(root: Path, rows: list[tuple[Any, ...]], name: str = "A", jsonl: bool = False, **options: Any) -> TrainRows:
    """Write rows, as tuples in the order of the columns, and read them."""
    columns = {column: [row[index] for row in rows] for index, column in enumerate(TRAIN[: len(rows[0])])}
    write(root / name, "original", columns, jsonl)
    return read_train(root, name, **options)


def evaluation(root: Path, rows: list[tuple[Any, ...]], name: str = "A", jsonl: bool = False, **options: Any) -> EvalSet:
    names = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
    write(root / name, "test", {column: [row[index] for row in rows] for index, column in enumerate(names)}, jsonl)
    return read_eval(root, name, **options)


def write(folder: Path, split: str, columns: dict[str, list[Any]], jsonl: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if jsonl:
        lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    else:
        pq.write_table(pa.table(columns), folder / f"{split}-00000-of-00001.parquet")


def paths(item: Item) -> list[str]:
    return ["/".join(Path(str(image.source)).parts[-2:]) for image in item.images]


# -- training rows -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jsonl", [False, True])
def test_a_pair_with_all_its_parts(tmp_path: Path, jsonl: bool) -> None:
    row = ("<|image_1|>\nfind it\n", "images/hot dog.jpg", "<|image_1|>\nlook", "images/b.jpg", "<|image_1|>\nno", "images/c.jpg")
    rows = train(tmp_path, [row], "CIRR", jsonl)
    pair = rows[0]
    assert (len(rows), rows.total, rows.id(0), pair.id, pair.source) == (1, 1, "CIRR:0", "CIRR:0", "CIRR")
    items = (pair.query, pair.positive, *pair.negatives)
    assert [item.text for item in items] == ["<|image_1|>\nfind it\n", "<|image_1|>\nlook", "<|image_1|>\nno"]
    assert [paths(item) for item in items] == [["images/hot dog.jpg"], ["images/b.jpg"], ["images/c.jpg"]]
    assert pair.query.images[0].label == "CIRR row 0: image 'images/hot dog.jpg'"


def test_visdial_keeps_its_newlines_and_its_bare_negative_looks_like_the_positive(tmp_path: Path) -> None:
    look = "<|image_1|>\nRepresent the given image\n"
    pair = train(tmp_path, [(DIALOGUE, "", look, "images/a.jpg", "", "images/b.jpg")])[0]
    assert render(pair.query) == DIALOGUE
    assert [render(negative) for negative in pair.negatives] == [look]
    assert paths(pair.negatives[0]) == ["images/b.jpg"]


def test_a_bare_negative_beside_a_text_positive_stays_bare(tmp_path: Path) -> None:
    pair = train(tmp_path, [("q", "", "an answer", "", "", "images/b.jpg")])[0]
    assert [render(negative) for negative in pair.negatives] == ["<|image_1|>\n"]


def test_a_stray_placeholder_without_picture_stays_out_of_the_prompt(tmp_path: Path) -> None:
    pair = train(tmp_path, [("<|image_1|>\nFind a Wikipedia image: who?\n", "", "x", "", "", "")])[0]
    assert (pair.query.images, render(pair.query)) == ((), "Find a Wikipedia image: who?\n")


@pytest.mark.parametrize("jsonl", [False, True])
@pytest.mark.parametrize(
    ("texts", "images", "negatives"),
    [
        ("No", "", [("No", [])]),
        ("", "", []),
        (None, None, []),
        (["a", "b"], ["", ""], [("a", []), ("b", [])]),
        (["a", "", None], ["", "", None], [("a", [])]),  # B3 pads its lists
        (["a", "b"], [], [("a", []), ("b", [])]),
        (["a", "b"], None, [("a", []), ("b", [])]),
        (["a", "b"], [""], [("a", []), ("b", [])]),
        (["a", None], "", [("a", [])]),
        (["a", ""], ["", "images/y.png"], [("a", []), ("", ["images/y.png"])]),
        (["a", "b"], ["images/x.png", "images/y.png"], [("a", ["images/x.png"]), ("b", ["images/y.png"])]),
        ([""], ["images/x.png", "images/y.png"], [("", ["images/x.png"]), ("", ["images/y.png"])]),
        ([], [], []),
    ],
)
def test_negatives_in_every_form(tmp_path: Path, jsonl: bool, texts: Any, images: Any, negatives: list[tuple[str, list[str]]]) -> None:
    pair = train(tmp_path, [("q", "", "p", "", texts, images)], jsonl=jsonl)[0]
    assert [(item.text, paths(item)) for item in pair.negatives] == negatives


def test_rows_without_columns_of_negatives(tmp_path: Path) -> None:
    assert train(tmp_path, [("q", "", "p", "")])[0].negatives == ()


def test_negatives_that_are_not_wanted_are_not_read(tmp_path: Path) -> None:
    assert train(tmp_path, [("q", "", "p", "", "n", "../outside.png")], negatives=False)[0].negatives == ()


def test_absent_pictures_may_be_null(tmp_path: Path) -> None:
    pair = train(tmp_path, [("q", None, "p", None, None, None), ("q", "", "p", "images/x.png", "", "")])[0]
    assert (pair.query.images, pair.positive.images) == ((), ())


@pytest.mark.parametrize("split", ["original", "diverse_instruction", "train"])
def test_splits(tmp_path: Path, split: str) -> None:
    columns = {name: [value] for name, value in zip(TRAIN, (f"of {split}", "", "p", "", "", ""), strict=True)}
    write(tmp_path / "A", split, columns, jsonl=False)
    assert read_train(tmp_path, "A", split=split)[0].query.text == f"of {split}"


@pytest.mark.parametrize("words", ["Represent <|image_1|> for classification.\n", "What is it?\n<|image_1|>\n", "<|image_1|> Name it\n"])
def test_a_paraphrase_may_place_the_picture_anywhere(tmp_path: Path, words: str) -> None:
    """Rows of `diverse_instruction`."""
    write(tmp_path / "A", "diverse_instruction", dict(zip(TRAIN, ([words], ["a.png"], ["p"], [""]), strict=False)), jsonl=False)
    pair = read_train(tmp_path, "A", split="diverse_instruction")[0]
    assert render(pair.query) == words and len(pair.query.images) == 1


def test_a_source_may_be_called_otherwise_than_its_folder(tmp_path: Path) -> None:
    train(tmp_path, [("q", "", "p", "")], name="ImageNet_1K")
    assert read_train(tmp_path, "imagenet", path="ImageNet_1K")[0].id == "imagenet:0"


def test_a_cap_is_a_random_choice_that_keeps_the_row_numbers(tmp_path: Path) -> None:
    rows = [(f"q{index}", "", f"p{index}", "") for index in range(200)]
    capped = train(tmp_path, rows, cap=20)
    again, fewer, other = (read_train(tmp_path, "A", cap=cap, seed=seed) for cap, seed in ((20, 17), (10, 17), (20, 18)))
    pairs = [capped[index] for index in range(20)]
    assert (len(capped), capped.total) == (20, 200)
    assert all(pair.id == f"A:{pair.query.text[1:]}" == f"A:{pair.positive.text[1:]}" for pair in pairs)
    assert [capped.id(index) for index in range(20)] == [pair.id for pair in pairs] == [again.id(index) for index in range(20)]
    assert {fewer.id(index) for index in range(10)} < {pair.id for pair in pairs} != {other.id(index) for index in range(20)}
    assert {pair.id for pair in pairs} != {f"A:{index}" for index in range(20)}


def test_a_cap_may_take_the_first_rows(tmp_path: Path) -> None:
    rows = train(tmp_path, [(f"q{index}", "", "p", "") for index in range(30)], cap=5, take="first")
    assert [rows[index].id for index in range(len(rows))] == [f"A:{index}" for index in range(5)]
    assert len(read_train(tmp_path, "A", cap=50, take="first")) == len(read_train(tmp_path, "A", take="first")) == 30


def test_a_pair_is_made_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def counting(*parts: Any) -> Pair:
        made.append(parts[0])
        return Pair(*parts)

    monkeypatch.setattr("vlm2vec.data.mmeb.Pair", counting)
    rows = train(tmp_path, [(f"q{index}", "", "p", "") for index in range(50)])
    assert len(rows) == 50 and rows.id(7) == "A:7" and made == []
    assert rows[7].id == "A:7" and made == ["A:7"]


@pytest.mark.parametrize("jsonl", [False, True])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("", "", "p", "", "", ""), "A row 2: query has neither text nor image"),
        ((None, None, "p", "", "", ""), "A row 2: query has neither text nor image"),
        ((" \n", "", "p", "", "", ""), "A row 2: query has neither text nor image"),
        (("<|image_1|>\n", "", "p", "", "", ""), "A row 2: query has neither text nor image"),  # a stray placeholder is nothing
        (("q", "", "", "", "", ""), "A row 2: positive has neither text nor image"),
        (("q", "", "p", "", ["a", "b"], ["", "", ""]), "A row 2: the lists differ in length: neg_text 2 and neg_image_path 3"),
        (("q", "", "p", "", ["a"], ["", ""]), "A row 2: the lists differ in length: neg_text 1 and neg_image_path 2"),
    ],
)
def test_rows_that_are_no_pairs(tmp_path: Path, jsonl: bool, row: tuple[Any, ...], message: str) -> None:
    many = isinstance(row[4], list)
    good = ("q", "images/x.png", "p", "", ["n"] if many else "n", [""] if many else "")
    with pytest.raises(DataError, match=message):
        train(tmp_path, [good, good, row, good], jsonl=jsonl)


def test_the_row_number_is_that_of_the_file_whatever_the_cap(tmp_path: Path) -> None:
    rows = [("q", "", "p", "")] * 30 + [("", "", "p", "")] * 30
    with pytest.raises(DataError, match=r"A row [345]\d: query"):
        train(tmp_path, rows, cap=30)


@pytest.mark.parametrize("column", TRAIN[:4])
def test_a_missing_column(tmp_path: Path, column: str) -> None:
    columns = {name: ["x"] for name in TRAIN if name != column}
    write(tmp_path / "A", "original", columns, jsonl=False)
    with pytest.raises(DataError, match=f"column '{column}' is missing; it has "):
        read_train(tmp_path, "A")


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.png", "images/../../x.png", "C:\\x.png", "a\0b", "x" * 5000, "images"])
def test_a_picture_outside_the_root_is_refused_with_its_row(tmp_path: Path, path: str) -> None:
    (tmp_path / "images").mkdir()
    rows = train(tmp_path, [("q", "", "p", ""), ("<|image_1|>\nq", path, "p", "")])
    assert rows[0].query.text == "q"
    with pytest.raises(PathError, match="A row 1: image '.*': path leaves root"):
        rows[1]


# -- evaluation rows ---------------------------------------------------------------------------------------------------------------------

LOOK = "<|image_1|>\nRepresent the given image.\n"


@pytest.mark.parametrize("jsonl", [False, True])
def test_candidates_are_kept_once(tmp_path: Path, jsonl: bool) -> None:
    found = evaluation(
        tmp_path,
        [
            ("<|image_1|>\nq0\n", "images/0.png", ["cat", "dog", "owl"], ["", "", ""]),
            ("<|image_1|>\nq1\n", "images/1.png", ["owl", "cat"], ["", ""]),
        ],
        jsonl=jsonl,
    )
    assert [query.text for query in found.queries] == ["<|image_1|>\nq0\n", "<|image_1|>\nq1\n"]
    assert [paths(query) for query in found.queries] == [["images/0.png"], ["images/1.png"]]
    assert [candidate.text for candidate in found.candidates] == ["cat", "dog", "owl"]
    assert [row.tolist() for row in found.candidates_QM] == [[0, 1, 2], [2, 0]]
    assert found.candidates_QM[0].dtype == np.int32 and found.duplicates == 0
    assert [row.tolist() for row in found.relevant_QR] == [[0], [2]] and [row.tolist() for row in found.grades_QR] == [[1], [1]]


def test_candidates_stand_in_order_of_first_appearance(tmp_path: Path) -> None:
    """By text as well as by picture: the order of neither column alone."""
    found = evaluation(tmp_path, [("q", "", ["b", "a", "b"], ["2.png", "2.png", "1.png"]), ("q", "", ["b", "a"], ["1.png", "1.png"])])
    shown = [candidate.text + paths(candidate)[0].split("/")[-1] for candidate in found.candidates]
    assert shown == ["b2.png", "a2.png", "b1.png", "a1.png"]
    assert [row.tolist() for row in found.candidates_QM or []] == [[0, 1, 2], [2, 3]]


def test_text_and_picture_together_identify_a_candidate(tmp_path: Path) -> None:
    """RefCOCO-Matching has one picture with several texts, WebQA one text with several pictures."""
    found = evaluation(tmp_path, [("q", "", ["a", "a", "b", "b"], ["x.png", "y.png", "x.png", "y.png"])])
    assert len(found.candidates) == 4 and found.duplicates == 0


@pytest.mark.parametrize("jsonl", [False, True])
@pytest.mark.parametrize("text", ["", [""], [], None])
def test_older_dumps_say_once_that_there_is_no_text(tmp_path: Path, jsonl: bool, text: Any) -> None:
    found = evaluation(tmp_path, [("q", "", text, ["a.png", "b.png"])], jsonl=jsonl)
    assert [(candidate.text, paths(candidate)[0].split("/")[-1]) for candidate in found.candidates] == [("", "a.png"), ("", "b.png")]
    assert [row.tolist() for row in found.candidates_QM] == [[0, 1]]


def test_candidates_that_say_nothing_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OK-VQA has such, none of them a gold."""
    monkeypatch.setattr(logging.getLogger("vlm2vec"), "propagate", True)
    rows = [("q", "", ["a", "", "b", "<|image_1|> \n"], [""] * 4), ("q", "", ["c", None], ["", None]), ("q", "", ["b"], [])]
    found = evaluation(tmp_path, rows)
    assert [candidate.text for candidate in found.candidates] == ["a", "b", "c"]
    assert [row.tolist() for row in found.candidates_QM or []] == [[0, 1], [2], [1]]
    assert [row.tolist() for row in found.relevant_QR] == [[0], [2], [1]]
    assert "A: 3 candidates with neither text nor image are left out" in caplog.text


def test_a_single_text_candidate_with_an_empty_text_list_beside_it(tmp_path: Path) -> None:
    found = evaluation(tmp_path, [("q", "", ["a", "b"], [""]), ("q", "", ["b"], [])])
    assert [row.tolist() for row in found.candidates_QM] == [[0, 1], [1]]


def test_a_repeat_of_the_gold_is_the_gold_and_repeats_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vlm2vec"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="vlm2vec"):
        found = evaluation(tmp_path, [("q", "", ["yes", "no", "yes", "no"], [""] * 4), ("q", "", ["no", "yes"], [""] * 2)])
    assert [row.tolist() for row in found.candidates_QM] == [[0, 1, 0, 1], [1, 0]]
    assert found.duplicates == 2
    assert "A: 2 of 6 candidates repeat another" in caplog.text


def test_pictures_lie_under_their_own_root_and_labels_name_the_first_row(tmp_path: Path) -> None:
    (tmp_path / "eval_images").mkdir()
    rows = [("q", "", ["a"], [""]), ("<|image_1|>\nq", "x.png", [LOOK], ["y.png"]), ("q", "", [LOOK], ["y.png"])]
    found = evaluation(tmp_path, rows, image_root=tmp_path / "eval_images")
    assert paths(found.queries[1]) == ["eval_images/x.png"]
    assert found.candidates[1].images[0].label == "A row 1: image 'y.png'"


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (("", "", ["a"], [""]), DataError, "A row 1: query has neither text nor image"),
        (("q", "", [], []), DataError, "A row 1: no candidates; the first must be the gold"),
        (("q", "", None, None), DataError, "A row 1: no candidates"),
        (("q", "", ["a", "b", "c"], ["", ""]), DataError, "A row 1: the lists differ in length: tgt_text 3 and tgt_img_path 2"),
        (("q", "", ["<|image_1|>\n", "a"], ["", ""]), DataError, "A row 1: the gold has neither text nor image"),
        (("q", "", [None, "a"], ["", None]), DataError, "A row 1: the gold has neither text nor image"),
        (("q", "", ["a"], ["../x.png"]), PathError, "A row 1: image '../x.png': path leaves root"),
        (("q", "/x.png", ["a"], [""]), PathError, "A row 1: image '/x.png': path leaves root"),
    ],
)
def test_rows_that_cannot_be_evaluated(tmp_path: Path, row: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluation(tmp_path, [("q", "", ["a"], [""]), row])


@pytest.mark.parametrize("row", [("q", "x.png", ["a"], [""]), ("q", "", ["a"], ["x.png"])])
def test_an_image_root_that_does_not_exist(tmp_path: Path, row: tuple[Any, ...]) -> None:
    with pytest.raises(DataError, match="A: image root .*nowhere does not exist"):
        evaluation(tmp_path, [row], image_root=tmp_path / "nowhere")
    assert evaluation(tmp_path, [("q", "", ["a"], [""])], image_root=tmp_path / "nowhere").queries  # text alone needs none


# -- rows with their instructions apart --------------------------------------------------------------------------------------------------


def instructed(root: Path, name: str, **row: Any) -> EvalSet:
    """Write a row as the second version of MMEB has it, without the columns that a set does not need, and read it as the suite says."""
    spec = next(spec for spec in load_suite("mmeb").sets if spec.name == name)
    write(root / spec.path, "test", {column: [value] for column, value in row.items()}, jsonl=False)
    return read_set(root, spec, root)


@pytest.mark.parametrize("spec", load_suite("mmeb").sets, ids=lambda spec: spec.name)
def test_instructions_apart_give_the_prompts_of_the_first_version(tmp_path: Path, spec: SetSpec) -> None:
    """A template split where its text goes is the instruction of the second version, which keeps quotation marks with the text."""

    def apart(template: str) -> tuple[str, str]:
        instruction, place, _ = template.replace("\\n", "\n").rstrip("\n").partition('"{text}"' if '"{text}"' in template else "{text}")
        return instruction.rstrip(" "), place.replace("{text}", "a dog")

    (asked, text), (said, caption) = apart(spec.query), apart(spec.target)
    row: dict[str, Any] = {"qry_inst": asked, "qry_text": text, "tgt_text": [caption, "other" if caption else ""]}
    row |= {"qry_img_path": "q.png"} if "I" in spec.query_modality else {}
    row |= {"tgt_inst": said, "tgt_img_path": ["a.png", "b.png"]} if "I" in spec.target_modality else {}
    found = instructed(tmp_path, spec.name, **row)
    assert found.queries[0].text == fill(spec.query, "a dog")
    assert found.candidates[0].text == fill(spec.target, "a dog")
    assert len(found.candidates) == 2


def test_the_odd_ones_word_for_word(tmp_path: Path) -> None:
    dialogue, look = "Represent the given dialogue about an image, which is used for image retrieval:", "<|image_1|>\nRepresent the given"
    row = {"qry_inst": dialogue, "qry_text": "Q:a\nA:b", "tgt_inst": f"{look} image", "tgt_text": [""], "tgt_img_path": ["a.png"]}
    found = instructed(tmp_path, "VisDial", **row)
    assert found.queries[0].text == f"{dialogue} Q:a\nA:b\n\n" and found.candidates[0].text == f"{look} image\n"

    row = {"qry_inst": "<|image_1|> Crop the image to to isolate the object labeled as", "qry_text": '"dog"', "qry_img_path": "q.png"}
    row |= {"tgt_inst": f"{look} cropped image of the object", "tgt_text": [""], "tgt_img_path": ["a.png"]}
    found = instructed(tmp_path, "MSCOCO", **row)
    assert found.queries[0].text == '<|image_1|>\nCrop the image to to isolate the object labeled as "dog"\n'
    assert found.candidates[0].text == "<|image_1|>\nRepresent the given cropped image of the object"

    row = {"qry_inst": "<|image_1|>\nFind a news image that matches the provided caption:", "qry_text": "A man."}
    row |= {"tgt_inst": f"{look} image with related text information:", "tgt_text": ["One.", "Two."], "tgt_img_path": ["a.png"] * 2}
    found = instructed(tmp_path, "EDIS", **row)
    assert found.queries[0].text == "<|image_1|>\nFind a news image that matches the provided caption: A man.\n"  # the stray of the rows
    assert [candidate.text.rpartition(": ")[2] for candidate in found.candidates] == ["One.\n", "Two.\n"]


def test_rows_of_both_versions_are_the_same_set(tmp_path: Path) -> None:
    head = "<|image_1|>\nRepresent the given image with the following question:"
    new = {"qry_inst": head, "qry_text": "why?", "qry_img_path": "q.png", "tgt_text": ["a", "b"]}
    old = {"qry_text": f"{head} why?\n", "qry_img_path": "q.png", "tgt_text": ["a", "b"], "tgt_img_path": ["", ""]}
    sets = [instructed(tmp_path / "2", "OK-VQA", **new), instructed(tmp_path / "1", "OK-VQA", **old)]
    assert sets[0].queries[0].text == sets[1].queries[0].text
    assert sets[0].candidates == sets[1].candidates


def test_candidates_of_different_instructions_differ(tmp_path: Path) -> None:
    rows: dict[str, list[Any]] = {"qry_text": ["q", "q"], "qry_img_path": ["", ""], "tgt_inst": ["Name:", "Place:"]}
    write(tmp_path / "A", "test", rows | {"tgt_text": [["Paris"]] * 2, "tgt_img_path": [[""]] * 2}, jsonl=True)
    assert [candidate.text for candidate in read_eval(tmp_path, "A").candidates] == ["Name: Paris\n", "Place: Paris\n"]


def test_a_set_of_pictures_needs_their_column(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="OK-VQA.*: column 'qry_img_path' is missing; it has .*; did you mean qry_image_path"):
        instructed(tmp_path, "OK-VQA", qry_text="q", qry_image_path="a.png", tgt_text=["a"])


@pytest.mark.parametrize(("name", "near"), [("OKVQA", "OK-VQA"), ("ImageNet_1K", "ImageNet-1K"), ("RefCOCO-Matchin", "RefCOCO-Matching")])
def test_a_misspelt_set(tmp_path: Path, name: str, near: str) -> None:
    evaluation(tmp_path, [("q", "", ["a"], [])], name=near)
    with pytest.raises(DataError, match=f"dataset '{name}' not found in .*; did you mean {near}"):
        read_eval(tmp_path, name)


def test_a_set_cut_short(tmp_path: Path) -> None:
    evaluation(tmp_path, [("q", "", ["a"], [])] * 50, name="GQA")
    file = tmp_path / "GQA" / "test-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match="GQA/test-00000-of-00001.parquet: truncated or not a parquet file"):
        read_eval(tmp_path, "GQA")


def test_a_thousand_by_a_thousand_is_small(tmp_path: Path) -> None:
    pool = [f"candidate {index}" for index in range(1500)]
    rows = [(f"q{index}", "", pool[index % 500 : index % 500 + 1000], [""] * 1000) for index in range(1000)]
    found = evaluation(tmp_path, rows)
    assert len(found.candidates) == 1499
    assert [found.candidates[row[0]].text for row in found.candidates_QM] == [f"candidate {index % 500}" for index in range(1000)]
    assert {len(row) for row in found.candidates_QM} == {1000}
    assert sum(row.nbytes for row in found.candidates_QM) == 4_000_000
