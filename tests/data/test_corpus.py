"""Sets with one corpus for all queries: every layout they come in, and an error naming set and row for what they must not hold."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlm2vec.data.images import load_image
from vlm2vec.data.mmeb import EvalSet, read_set
from vlm2vec.errors import DataError, PathError
from vlm2vec.suite import SetSpec

Rows = Sequence[dict[str, Any]]
QUERIES: Rows = [{"query-id": 1, "query": "apples"}, {"query-id": 2, "query": "pears"}]
PAGES: Rows = [{"corpus-id": number, "text": f"page {number}"} for number in (10, 11, 12)]
QRELS: Rows = [
    {"query-id": 1, "corpus-id": 12, "score": 2},
    {"query-id": 1, "corpus-id": 10, "score": 1},
    {"query-id": 1, "corpus-id": 11, "score": 0},
    {"query-id": 2, "corpus-id": 11, "score": 1},
]


def put(file: Path, rows: Rows) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(list(rows)), file)


def read(root: Path, **settings: Any) -> EvalSet:
    spec = SetSpec(
        name="Docs", meta_task="retrieval", split="OOD", path="eval/Docs", query_modality="T", target_modality="I", queries=2, candidates=3,
        scope="global", source="made up", licence="CC0-1.0", **settings,
    )  # fmt: skip
    return read_set(root, spec, root / "pictures")


def docs(
    root: Path, queries: Rows = QUERIES, corpus: Rows = PAGES, qrels: Rows | None = QRELS, kind: str = "parquet", **settings: Any
) -> EvalSet:
    for name, rows in (("queries", queries), ("corpus", corpus), ("qrels", qrels)):
        if rows is not None:
            put(root / "eval" / "Docs" / f"{name}.{kind}", rows)
    return read(root, **settings)


def relevant(found: EvalSet) -> list[dict[str, float]]:
    """Per query the grade of each relevant candidate by its text."""
    return [
        {found.candidates[index].text: float(grade) for index, grade in zip(indices, grades, strict=True)}
        for indices, grades in zip(found.relevant_QR, found.grades_QR, strict=True)
    ]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_queries_corpus_and_grades(tmp_path: Path, kind: str) -> None:
    found = docs(tmp_path, kind=kind)
    assert [item.text for item in found.queries] == ["apples", "pears"]
    assert [item.text for item in found.candidates] == ["page 10", "page 11", "page 12"]
    assert found.candidates_QM is None and found.duplicates == 0
    assert relevant(found) == [{"page 12": 2, "page 10": 1}, {"page 11": 1}]
    assert {str(row.dtype) for row in found.relevant_QR} == {"int32"} and {str(row.dtype) for row in found.grades_QR} == {"float32"}


@pytest.mark.parametrize("split", ["test", "train"])
def test_a_folder_per_part_as_on_the_hub(tmp_path: Path, split: str) -> None:
    for part, rows in (("queries", QUERIES), ("corpus", PAGES), ("qrels", QRELS)):
        half = len(rows) // 2
        for shard, piece in enumerate((rows[:half], rows[half:])):
            put(tmp_path / "eval" / "Docs" / part / f"{split}-0000{shard}-of-00002.parquet", piece)
    assert relevant(read(tmp_path)) == [{"page 12": 2, "page 10": 1}, {"page 11": 1}]
    put(tmp_path / "eval" / "Docs" / "queries" / "dev-00000-of-00001.parquet", QUERIES)
    if split == "test":
        assert len(read(tmp_path).queries) == 2
    else:
        with pytest.raises(DataError, match="queries has no split 'test'; available: dev, train"):
            read(tmp_path)


def test_ids_of_either_kind_and_the_columns_of_beir(tmp_path: Path) -> None:
    """Qrels in numbers, ids in strings; a title goes before its text."""
    corpus = [{"_id": "7", "title": "Fruit", "text": "is sweet."}, {"_id": "8", "title": "", "text": "Salt is not."}]
    found = docs(tmp_path, [{"_id": "1", "text": "sugar?"}], corpus, [{"query-id": 1, "corpus-id": 7, "score": 1}])
    assert [item.text for item in found.candidates] == ["Fruit is sweet.", "Salt is not."]
    assert relevant(found) == [{"Fruit is sweet.": 1}]


def test_texts_become_prompts_by_the_templates(tmp_path: Path) -> None:
    look = "<|image_1|>\nUnderstand the page."
    corpus = [{"corpus-id": 10, "image": "a.png"}, {"corpus-id": 11, "image": "sub/b.png"}, {"corpus-id": 12, "image": "c.png"}]
    found = docs(tmp_path, corpus=corpus, query=r"Find a page: {text}\n", target=r"<|image_1|>\nUnderstand the page.")
    assert [item.text for item in found.queries] == ["Find a page: apples\n", "Find a page: pears\n"]
    assert [item.text for item in found.candidates] == [look] * 3
    assert [image.source for item in found.candidates for image in item.images] == [
        tmp_path / "pictures" / name for name in ("a.png", "sub/b.png", "c.png")
    ]
    assert found.candidates[1].images[0].label == "Docs corpus row 1: image 'sub/b.png'"


def test_embedded_pictures(tmp_path: Path) -> None:
    """More than are read at a time, each with its own bytes."""
    (tmp_path / "pictures").mkdir()

    def page(number: int) -> dict[str, Any]:
        stream = io.BytesIO()
        Image.new("RGB", (2 + number, 2)).save(stream, "PNG")
        return {"corpus-id": f"p{number}", "image": {"bytes": stream.getvalue(), "path": f"{number}.png"}}

    qrels = [{"query-id": 1, "corpus-id": "p99", "score": 1}, {"query-id": 2, "corpus-id": "p0", "score": 1}]
    found = docs(tmp_path, corpus=[page(number) for number in range(100)], qrels=qrels)
    assert [row.tolist() for row in found.relevant_QR] == [[99], [0]]
    assert [load_image(item.images[0]).width for item in found.candidates] == list(range(2, 102))
    assert found.candidates[99].images[0].label == "Docs corpus row 99: image '99.png'"


def test_a_struct_without_bytes_is_a_path(tmp_path: Path) -> None:
    for kind in ("parquet", "jsonl"):
        corpus = [{"corpus-id": number, "image": {"bytes": None, "path": f"{number}.png"}} for number in (10, 11, 12)]
        found = docs(tmp_path / kind, corpus=corpus, kind=kind)
        assert [Path(str(item.images[0].source)).name for item in found.candidates] == ["10.png", "11.png", "12.png"]


def test_labels_as_corpus(tmp_path: Path) -> None:
    """The simple form: a list of labels, and queries that name theirs."""
    queries = [{"image": "a.png", "label": "swimming"}, {"image": "b.png", "label": "running"}, {"image": "c.png", "label": "running"}]
    for kind in ("parquet", "jsonl"):
        labels = [{"label": "running"}, {"label": "swimming"}]
        found = docs(tmp_path / kind, queries, labels, None, kind, query=r"<|image_1|>\nWhat is done?")
        assert [item.text for item in found.queries] == ["<|image_1|>\nWhat is done?"] * 3
        assert relevant(found) == [{"swimming": 1}, {"running": 1}, {"running": 1}]


def test_several_labels_of_one_query(tmp_path: Path) -> None:
    queries = [{"query": "q", "relevant": [3, 4]}, {"query": "q", "relevant": [4]}]
    found = docs(tmp_path, queries, [{"id": 3, "text": "three"}, {"id": 4, "text": "four"}], None)
    assert relevant(found) == [{"three": 1, "four": 1}, {"four": 1}]


def test_entries_that_say_the_same_are_one_candidate(tmp_path: Path) -> None:
    """And the higher grade counts, as of a pair that is given twice."""
    corpus = [{"corpus-id": number, "text": text} for number, text in ((10, "same"), (11, "other"), (12, "same"))]
    found = docs(tmp_path, corpus=corpus, qrels=[*QRELS, {"query-id": 2, "corpus-id": 11, "score": 3}])
    assert [item.text for item in found.candidates] == ["same", "other"]
    assert relevant(found) == [{"same": 2}, {"other": 3}]
    assert found.duplicates == 1


SCORE = {"query-id": 1, "corpus-id": 10, "score": 1}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"qrels": [*QRELS, SCORE | {"query-id": 3}]}, "Docs qrels row 4: Docs queries holds no id '3'"),
        ({"qrels": [*QRELS, SCORE | {"corpus-id": 13}]}, "Docs qrels row 4: Docs corpus holds no id '13'"),
        ({"qrels": [*QRELS, SCORE | {"corpus-id": 13, "score": 0}]}, "Docs qrels row 4: Docs corpus holds no id '13'"),
        ({"qrels": QRELS[:3]}, "Docs queries row 1: no entry of the corpus is relevant to it"),
        ({"qrels": [*QRELS, SCORE | {"score": float("nan")}]}, "qrels row 4: score must be a finite number, got nan"),
        ({"qrels": [{"query-id": 1, "corpus-id": 10}]}, "qrels.*: column 'score' is missing"),
        ({"qrels": [SCORE | {"score": "high"}]}, "qrels.*: column 'score' must be number, got string"),
        ({"queries": [*QUERIES, QUERIES[0]]}, "Docs queries row 2: the id '1' was used before, by Docs queries row 0"),
        ({"corpus": [*PAGES, PAGES[1]]}, "Docs corpus row 3: the id '11' was used before, by Docs corpus row 1"),
        ({"corpus": [*PAGES, {"corpus-id": 13, "text": " "}]}, "Docs corpus row 3: neither text nor image"),
        ({"queries": [*QUERIES, {"query-id": 3, "query": "<|image_1|>"}]}, "Docs queries row 2: neither text nor image"),
        ({"queries": [{"query": "no id"}]}, "queries.*: column 'query-id' or '_id' or 'id' is missing; it has query"),
        ({"queries": [{"query-id": 1.5, "query": "q"}]}, "queries.*: column 'query-id' must be string or integer, got float"),
        ({"corpus": [{"corpus-id": 10, "image": 3}]}, "corpus.*: column 'image' must be path or bytes of a picture, got int"),
        ({"corpus": [{"corpus-id": 10, "image": {"url": "x"}}]}, "corpus.*: column 'image' must be path or bytes of a picture"),
        ({"qrels": None}, "Docs: neither a dataset `qrels` nor a column `relevant`"),
        ({"query": "Find a page"}, "Docs queries row 0: the suite's template 'Find a page' has no place for the text"),
    ],
)
def test_sets_that_cannot_be_read(tmp_path: Path, parts: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        docs(tmp_path, **parts)


def test_a_label_that_no_entry_has(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Docs queries row 1: Docs corpus holds no id 'flying'"):
        docs(tmp_path, [{"query": "a", "label": "running"}, {"query": "b", "label": "flying"}], [{"text": "running"}], None)
    with pytest.raises(DataError, match="Docs queries row 1: no entry of the corpus is relevant to it"):
        docs(tmp_path, [{"query": "a", "label": "running"}, {"query": "b", "label": None}], [{"text": "running"}], None)


@pytest.mark.parametrize("missing", ["queries", "corpus"])
def test_a_part_that_is_not_there(tmp_path: Path, missing: str) -> None:
    with pytest.raises(DataError, match=f"Docs has no split '{missing}'; available: "):
        docs(tmp_path, **{missing: None})


def test_no_rows(tmp_path: Path) -> None:
    docs(tmp_path)
    pq.write_table(pa.table({"corpus-id": pa.array([], pa.int64()), "text": pa.nulls(0)}), tmp_path / "eval/Docs/corpus.parquet")
    with pytest.raises(DataError, match="Docs corpus: no rows"):
        read(tmp_path)


def test_a_picture_outside_the_root(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(PathError, match="Docs corpus row 0: image '../a.png': path leaves root"):
        docs(tmp_path, corpus=[{"corpus-id": 10, "image": "../a.png"}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"corpus-id": True, "text": "x"}, "corpus-id must be string or integer, got bool"),
        ({"corpus-id": 1, "image": {"bytes": "x"}}, "image must be path or bytes of a picture, got dict"),
        ({"corpus-id": 1, "image": ["a.png"]}, "image must be path or bytes of a picture, got list"),
    ],
)
def test_wrong_types_in_lines(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"corpus.jsonl:4: row 3: {message}"):
        docs(tmp_path, corpus=[*PAGES, row], kind="jsonl")


@pytest.mark.parametrize("score", [True, "1", 10**400])
def test_wrong_scores_in_lines(tmp_path: Path, score: Any) -> None:
    with pytest.raises(DataError, match="qrels.jsonl:1: row 0: score must be number, got "):
        docs(tmp_path, qrels=[SCORE | {"score": score}], kind="jsonl")
