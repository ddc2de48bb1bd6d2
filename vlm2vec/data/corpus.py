"""Evaluation sets with one corpus for all queries (BEIR, Thakur et al. 2021, arXiv:2104.08663; the visual documents and the video labels of
MMEB-V2, arXiv:2507.04590): a folder with `queries`, `corpus` and, unless queries name what is relevant themselves, `qrels`.

Each is a dataset of `readers`: files `queries.parquet`, `queries-00000-of-00002.jsonl`, ... or a folder `queries/` with one split or with
one called `test`. Columns, of which the first one that is there is read:

    queries   query-id, _id, id · query, text · image · relevant, label (ids, one or a list; without `qrels`)
    corpus    corpus-id, _id, id (absent: the text is the id) · text, label · title (put before the text) · image
    qrels     query-id · corpus-id · score

An id is a string or a whole number. A picture is a path below the image root or the struct of bytes and path of image datasets. Scores
above 0 are grades of relevance; of a pair given twice the higher one counts. Texts become prompts by the templates of the suite.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlm2vec.data.readers import Column, find_files, read_batches, read_rows, splits_of
from vlm2vec.data.sides import fill, make_item
from vlm2vec.data.types import EvalSet, ImageRef, Item
from vlm2vec.errors import DataError
from vlm2vec.log import get_logger
from vlm2vec.prompts import MARK
from vlm2vec.suite import SetSpec

PICTURE = Column("image", required=False, kind="picture", aliases=("image_path",))
QUERIES = (
    Column("query-id", required=False, kind="id", aliases=("_id", "id")),
    Column("query", required=False, aliases=("text",)),
    PICTURE,
    Column("relevant", many=True, required=False, kind="id", aliases=("label",)),
)
CORPUS = (
    Column("corpus-id", required=False, kind="id", aliases=("_id", "id")),
    Column("text", required=False, aliases=("label",)),
    PICTURE,
    Column("title", required=False),
)
QRELS = (Column("query-id", kind="id"), Column("corpus-id", kind="id"), Column("score", kind="number"))
Judgement = tuple[str, str, str, float]  # label of the row, query id, corpus id, grade

_logger = get_logger(__name__)


def read_corpus(root: Path, spec: SetSpec, image_root: Path) -> EvalSet:
    """The set in `root/spec.path`; pictures given as paths lie under `image_root`.

    Entries of the corpus that say the same are one candidate, and `duplicates` counts the others. Raises DataError naming set, file and row
    for an id that is used twice or not known, a query without a relevant entry, an entry with neither text nor picture, and a score that is
    no number; PathError for a picture outside the image root.
    """
    place = _Place(root, spec, image_root)
    queries = list(place.entries("queries", QUERIES, spec.query))
    query_number = _Numbers(f"{spec.name} queries")
    for index, entry in enumerate(queries):
        query_number.add(entry, index)
    items: dict[tuple[str, str], Item] = {}
    index_of: dict[tuple[str, str], int] = {}
    candidate_number = _Numbers(f"{spec.name} corpus")
    for entry in place.entries("corpus", CORPUS, spec.target):
        said = (entry.item.text, entry.item.images[0].key if entry.item.images else "")
        items.setdefault(said, entry.item)
        candidate_number.add(entry, index_of.setdefault(said, len(index_of)))
    if duplicates := len(candidate_number.of) - len(items):
        _logger.info("%s: %d entries of the corpus repeat another; each is one candidate with it", spec.name, duplicates)
    judgements = place.judgements() if place.has("qrels") else _named(queries, spec.name)
    grades = _graded(queries, query_number, candidate_number, judgements)
    relevant_QR = [np.fromiter(found, np.int32) for found in grades]
    grades_QR = [np.fromiter(found.values(), np.float32) for found in grades]
    return EvalSet(spec.name, [entry.item for entry in queries], list(items.values()), None, relevant_QR, grades_QR, duplicates)


@dataclass(frozen=True)
class _Entry:
    """A row of queries or corpus; `relevant` are the ids that a query names itself."""

    label: str
    id: str
    item: Item
    relevant: tuple[str, ...]


class _Numbers:
    """What number stands for an id. Raises DataError for one that is used twice or not known."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.of: dict[str, int] = {}
        self.row: dict[str, str] = {}

    def add(self, entry: _Entry, number: int) -> None:
        if entry.id in self.of:
            raise DataError(f"{entry.label}: the id {entry.id!r} was used before, by {self.row[entry.id]}")
        self.of[entry.id] = number
        self.row[entry.id] = entry.label

    def find(self, key: str, label: str) -> int:
        if key not in self.of:
            raise DataError(f"{label}: {self.label} holds no id {key!r}")
        return self.of[key]


def _graded(
    queries: list[_Entry], query_number: _Numbers, candidate_number: _Numbers, judgements: Iterator[Judgement]
) -> list[dict[int, float]]:
    """Per query the grades, above 0, of its relevant candidates."""
    grades: list[dict[int, float]] = [{} for _ in queries]
    for label, query, document, grade in judgements:
        found, candidate = grades[query_number.find(query, label)], candidate_number.find(document, label)
        if grade > 0:
            found[candidate] = max(grade, found.get(candidate, 0.0))
    for entry, found in zip(queries, grades, strict=True):
        if not found:
            raise DataError(f"{entry.label}: no entry of the corpus is relevant to it")
    return grades


def _named(queries: list[_Entry], name: str) -> Iterator[Judgement]:
    """The judgements that queries carry themselves, of grade 1."""
    if not any(entry.relevant for entry in queries):
        raise DataError(f"{name}: neither a dataset `qrels` nor a column `relevant` in the queries says what is right; give one of them")
    for entry in queries:
        yield from ((entry.label, entry.id, document, 1.0) for document in entry.relevant)


@dataclass(frozen=True)
class _Place:
    """The folder of a set."""

    root: Path
    spec: SetSpec
    image_root: Path

    def has(self, part: str) -> bool:
        folder = self.root / self.spec.path
        return (folder / part).is_dir() or (folder.is_dir() and part in splits_of(folder))

    def files(self, part: str) -> list[Path]:
        """Raises DataError that lists what is there instead."""
        inner = self.root / self.spec.path / part
        if not inner.is_dir():
            return find_files(self.root, self.spec.path, part)
        splits = list(splits_of(inner))
        return find_files(self.root, f"{self.spec.path}/{part}", splits[0] if len(splits) == 1 else "test")

    def entries(self, part: str, columns: tuple[Column, ...], template: str) -> Iterator[_Entry]:
        """Where there are qrels, queries must have ids."""
        needed = replace(columns[0], required=part == "queries" and self.has("qrels"))
        row = 0
        for batch in read_batches(self.files(part), (needed, *columns[1:])):
            for cells in batch.to_pylist():
                yield self._entry(cells, columns, template, f"{self.spec.name} {part} row {row}")
                row += 1
        if not row:
            raise DataError(f"{self.spec.name} {part}: no rows")

    def _entry(self, cells: Mapping[str, Any], columns: tuple[Column, ...], template: str, label: str) -> _Entry:
        words, picture = cells[columns[1].name], cells[PICTURE.name]
        text, there = " ".join(filter(None, (cells.get("title", ""), words))), bool(picture["bytes"] or picture["path"])
        if not there and not MARK.sub("", text).strip():
            raise DataError(f"{label}: neither text nor image")
        if not there and "{text}" not in (template or "{text}"):
            raise DataError(f"{label}: the suite's template {template!r} has no place for the text: write {{text}} where it goes")
        item = make_item(fill(template, text), "" if picture["bytes"] else picture["path"], self.image_root, label)
        key = cells[columns[0].name] or (label if columns is QUERIES else words)
        if picture["bytes"]:
            item = replace(item, images=(ImageRef(picture["bytes"], f"{label}: image {picture['path'] or key!r}"),))
        return _Entry(label, key, item, tuple(filter(None, cells.get("relevant", ()))))

    def judgements(self) -> Iterator[Judgement]:
        for row, cells in enumerate(read_rows(self.files("qrels"), QRELS).to_pylist()):
            label, score = f"{self.spec.name} qrels row {row}", cells["score"]
            if not np.isfinite(score):
                raise DataError(f"{label}: score must be a finite number, got {score}")
            yield label, cells["query-id"], cells["corpus-id"], score
