"""One's own rows as training pairs and as an evaluation set.

Texts and paths stay in Arrow buffers, and so do the bytes of pictures that a parquet file holds; pictures that are files stay on disk.

Shape letters: P pairs, Q queries, M candidates of a query, R relevant ones among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vlm2vec.data import items
from vlm2vec.data.own.records import SUFFIXES, chunks, key_names, place
from vlm2vec.data.own.schema import Row, Side, read_row
from vlm2vec.data.readers import PICTURE, TEXT
from vlm2vec.data.sampler import choose_rows
from vlm2vec.data.types import EvalSet, Item, Pair
from vlm2vec.errors import DataError
from vlm2vec.suite import SetSpec

SIDE = pa.struct({"text": TEXT, "instruction": TEXT, "image": pa.large_list(PICTURE)})
ROWS = pa.schema({"query": SIDE, "positive": SIDE, "negatives": pa.large_list(SIDE)})
_TELLING = {"query", "positive"}, {"qry", "qry_text"}  # names of this schema, and of MMEB's
_BATCH = 4096  # pairs brought into Arrow at a time


def is_own(file: Path) -> bool:
    """Whether a file holds rows of this schema, by the names of its columns or of the keys of its first row."""
    names = set(key_names(file)) if file.suffix in SUFFIXES else set()
    return bool(names & _TELLING[0]) and not names & _TELLING[1]


def read_rows(file: Path) -> Iterator[tuple[int, Row]]:
    """(line or row number, row) of a file in order. Raises DataError naming the first row that is wrong, and what of it."""
    for chunk in chunks(file):
        for number, values in chunk.records():
            if isinstance(values, str):
                raise _refused(file, number, values)
            row, problems = read_row(values)
            if row is None:
                raise _refused(file, number, str(problems[0]))
            yield number, row


def _refused(file: Path, number: int, what: str) -> DataError:
    return DataError(f"{place(str(file), number)}: {what} (`vlm2vec data validate {file}` lists all that is wrong)")


def item_of(side: Side, root: Path, label: str, key: str) -> Item:
    """The item; its pictures lie below `root` and are not opened. Raises PathError, beginning with `label`, for one that lies elsewhere."""
    return items.item_of(items.Row(0, f"{label}: {key}", dict(side)), root)


# -- training ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class OwnPairs:
    """A training source: `pairs[index]` is made a Pair when asked for. A row of several positives is as many pairs."""

    name: str
    image_root: Path
    files: Sequence[Path]
    total: int  # pairs in the files, before a cap
    places: list[str]  # of each file, what stands before a row's number in its id
    number_P: NDArray[np.int64]  # line or row of each pair, in its file
    file_P: NDArray[np.int64]
    copy_P: NDArray[np.int64]  # which of its row's positives a pair has
    _table: pa.Table = field(repr=False)

    def __len__(self) -> int:
        return len(self.number_P)

    def id(self, index: int) -> str:
        """What the pair is called in logs and errors; reads nothing."""
        copy = f".{self.copy_P[index]}" if self.copy_P[index] else ""
        return f"{self.name}:{self.places[self.file_P[index]]}{self.number_P[index]}{copy}"

    def __getitem__(self, index: int) -> Pair:
        """Raises PathError when a picture lies outside the image root."""
        cells = {name: self._table.column(name)[int(index)].as_py() for name in self._table.column_names}
        label = f"{self.name} row {self.id(index).partition(':')[2]}"
        query, positive = (item_of(cells[key], self.image_root, label, key) for key in ("query", "positive"))
        negatives = tuple(
            item_of(side, self.image_root, label, f"negatives[{number}]") for number, side in enumerate(cells.get("negatives") or ())
        )
        return Pair(self.id(index), self.name, query, positive, negatives)


def read_pairs(
    root: Path,
    name: str,
    files: Sequence[Path],
    cap: int | None = None,
    seed: int = 17,
    negatives: bool = True,
    take: Literal["random", "first"] = "random",
) -> OwnPairs:
    """The pairs of `files`, whose pictures lie below `root`; the options are those of `mmeb.read_train`, a cap counts pairs.

    Raises DataError naming file and row for anything that could not become a pair, and when there is none.
    """
    schema = ROWS if negatives else pa.schema([ROWS.field("query"), ROWS.field("positive")])
    tables, places = [], []
    for index, file in enumerate(files):
        for batch in _batched(_pairs(file)):
            columns = [pa.array([cells[key] for _, _, cells in batch], schema.field(key).type) for key in schema.names]
            tables.append(pa.Table.from_arrays(columns, schema=schema))
            places.append(np.array([(index, number, copy) for number, copy, _ in batch], dtype=np.int64))
    if not places:
        raise DataError(f"{', '.join(map(str, files))}: no rows")
    table, place_P3 = pa.concat_tables(tables), np.concatenate(places)
    kept = choose_rows(len(table), cap, seed, "cap", name) if take == "random" else np.arange(len(table))[:cap]
    stored = table if len(kept) == len(table) else table.take(kept)
    file_P, number_P, copy_P = place_P3[kept].T
    called = [""] if len(files) == 1 else [f"{file.name}:" for file in files]
    return OwnPairs(name, root, files, len(table), called, number_P, file_P, copy_P, stored)


def _pairs(file: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(number of the row, of the positive, cells)."""
    for number, row in read_rows(file):
        for copy, positive in enumerate(row.positives):
            yield number, copy, {"query": row.query, "positive": positive, "negatives": row.negatives}


def _batched(pairs: Iterator[tuple[int, int, dict[str, Any]]]) -> Iterator[list[tuple[int, int, dict[str, Any]]]]:
    while batch := list(islice(pairs, _BATCH)):
        yield batch


# -- evaluation --------------------------------------------------------------------------------------------------------------------------


def read_own_set(root: Path, spec: SetSpec) -> EvalSet:
    """The evaluation set that the file `root/spec.path` holds; its pictures lie below `root`.

    `spec.scope` global: the corpus is every positive and negative of the file, and equal queries are one, to which the positives of all
    their rows are relevant. local: a row's candidates are its own positives and negatives. A row's score is the grade of its positives; of
    a candidate that is graded twice the higher one counts. Raises DataError naming file and row, PathError for a picture elsewhere.
    """
    if spec.query or spec.target:
        raise DataError(f"{spec.name}: {spec.path} holds rows with their own instructions; leave out query and target of the suite")
    found = _Found(spec, root)
    for number, row in read_rows(root / spec.path):
        found.add(number, row)
    if not found.queries:
        raise DataError(f"{root / spec.path}: no rows")
    return found.as_set()


class _Found:
    """Queries and candidates so far."""

    def __init__(self, spec: SetSpec, root: Path) -> None:
        self.spec, self.root = spec, root
        self.queries: list[Item] = []
        self.candidates: dict[str, int] = {}
        self.items: list[Item] = []
        self.grades: list[dict[int, float]] = []
        self.members: list[list[int]] = []
        self._query_of: dict[str, int] = {}

    def add(self, number: int, row: Row) -> None:
        label = f"{self.spec.name} row {number}"
        query = self._query(item_of(row.query, self.root, label, "query"))
        for key, side in row.sides():
            if key == "query":
                continue
            candidate = self._candidate(item_of(side, self.root, label, key))
            self.members[query].append(candidate)
            if key.startswith("positive"):
                self.grades[query][candidate] = max(row.score, self.grades[query].get(candidate, 0.0))

    def _query(self, item: Item) -> int:
        number = len(self.queries)
        if self.spec.scope == "global":
            number = self._query_of.setdefault(item.key, number)
        if number == len(self.queries):
            self.queries.append(item)
            self.grades.append({})
            self.members.append([])
        return number

    def _candidate(self, item: Item) -> int:
        number = self.candidates.setdefault(item.key, len(self.items))
        if number == len(self.items):
            self.items.append(item)
        return number

    def as_set(self) -> EvalSet:
        relevant_QR = [np.fromiter(found, np.int32) for found in self.grades]
        grades_QR = [np.fromiter(found.values(), np.float32) for found in self.grades]
        if self.spec.scope == "global":
            return EvalSet(self.spec.name, self.queries, self.items, None, relevant_QR, grades_QR)
        members = [np.array(found, np.int32) for found in self.members]
        duplicates = sum(len(found) - len(set(found)) for found in self.members)
        return EvalSet(self.spec.name, self.queries, self.items, members, relevant_QR, grades_QR, duplicates)
