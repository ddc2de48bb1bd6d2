"""Rows of MMEB (Jiang et al. 2024, arXiv:2410.05160) as pairs and evaluation sets, and of one's own data in the same columns.

Training rows: qry, qry_image_path, pos_text, pos_image_path and, if there are negatives, neg_text and neg_image_path, each one text or
a list per row. Evaluation rows: qry_text, qry_img_path and two parallel lists, tgt_text and tgt_img_path, whose first entry is the gold.
Texts already carry instruction, placeholder and newlines; "" or null stands for an absent text or picture. Picture paths are relative to
an image root.

Shape letters: Q queries, M candidates of a query, N candidates of all queries one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vlm2vec import io
from vlm2vec.data.readers import Column, find_files, read_rows
from vlm2vec.data.sampler import choose_rows
from vlm2vec.data.types import ImageRef, Item, Pair
from vlm2vec.errors import DataError, PathError
from vlm2vec.log import get_logger
from vlm2vec.prompts import MARK

QUERY, POSITIVE, NEGATIVE = ("qry", "qry_image_path"), ("pos_text", "pos_image_path"), ("neg_text", "neg_image_path")
EVAL_QUERY, CANDIDATES = ("qry_text", "qry_img_path"), ("tgt_text", "tgt_img_path")

_logger = get_logger(__name__)


# -- training ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TrainRows:
    """A training source: `rows[index]` is made a Pair when asked for. Texts stay in Arrow buffers, pictures on disk."""

    name: str
    image_root: Path
    files: Sequence[Path]
    total: int  # rows in the files, before a cap
    numbers: NDArray[np.int64]  # row number in the files of each row that is used
    _table: pa.Table = field(repr=False)

    def __len__(self) -> int:
        return len(self.numbers)

    def id(self, index: int) -> str:
        """What the pair is called in logs and errors; reads nothing."""
        return f"{self.name}:{self.numbers[index]}"

    def __getitem__(self, index: int) -> Pair:
        """Raises PathError when a picture lies outside the image root."""
        cells = {name: self._table.column(name)[int(index)].as_py() for name in self._table.column_names}
        label = f"{self.name} row {self.numbers[index]}"
        query, positive = (_item(cells[text], cells[path], self.image_root, label) for text, path in (QUERY, POSITIVE))
        negatives = _negatives(cells, positive, self.image_root, label) if NEGATIVE[0] in cells else ()
        return Pair(self.id(index), self.name, query, positive, negatives)


def read_train(
    root: Path, name: str, path: str | None = None, split: str = "original", cap: int | None = None, seed: int = 17, negatives: bool = True
) -> TrainRows:
    """The rows of a split of `root/path` (None: `root/name`); picture paths are relative to `root`.

    `cap` chooses that many rows at random, the same ones for the same seed and name; a smaller cap chooses some of a larger one's. Without
    `negatives` the columns of negatives are not read. Raises DataError naming file or row for anything that could not become a pair.
    """
    files = find_files(root, path or name, split)
    columns = [Column(column) for column in (*QUERY, *POSITIVE)]
    columns += [Column(column, many=True, required=False) for column in NEGATIVE if negatives]
    stored = read_rows(files, columns)
    numbers = choose_rows(len(stored), cap, seed, "cap", name)
    table = stored if len(numbers) == len(stored) else stored.take(numbers)
    _check_sides(table, {"query": QUERY, "positive": POSITIVE}, name, numbers)
    if negatives:
        _flat_sides(table, NEGATIVE, name, numbers)
    return TrainRows(name, root, files, len(stored), numbers, table)


def _negatives(cells: dict[str, Any], positive: Item, image_root: Path, label: str) -> tuple[Item, ...]:
    """The negatives of a row, without entries that hold nothing (lists are padded with such).

    A bare picture beside a positive that is a picture with words (VisDial) gets the positive's words: another prompt would give it away.
    """
    texts, paths = (cells[name] for name in NEGATIVE)
    count = max(len(texts), len(paths))
    sides = zip(*(side if len(side) == count else [""] * count for side in (texts, paths)), strict=True)
    words = positive.text if positive.images else ""
    return tuple(_item(text or words, path, image_root, label) for text, path in sides if text.strip() or path)


# -- evaluation --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class EvalSet:
    """Queries and their candidates; each distinct candidate is there once, in order of first appearance.

    Query q has the candidates `[candidates[index] for index in candidates_QM[q]]`, in the order of the data, or all of them where
    `candidates_QM` is None (one corpus for all). Of those, `relevant_QR[q]` are right: distinct, at least one, each of a grade above 0 in
    `grades_QR[q]`, 1 where the data know no grades. A candidate equal to a relevant one has its index, so that retrieving it is a hit.
    `duplicates` counts repeats within a query's list. Rows may differ in length.
    """

    name: str
    queries: list[Item]
    candidates: list[Item]
    candidates_QM: list[NDArray[np.int32]] | None
    relevant_QR: list[NDArray[np.int32]]
    grades_QR: list[NDArray[np.float32]]
    duplicates: int = 0


def read_eval(root: Path, name: str, path: str | None = None, image_root: Path | None = None, split: str = "test") -> EvalSet:
    """The evaluation set in `root/path` (None: `root/name`); pictures lie under `image_root` (None: `root`).

    Raises DataError naming the row for a query or candidate with neither text nor picture, a row without candidates, lists that do not
    match, and an image root that is not there; PathError for a path that leaves it.
    """
    columns = [*(Column(column) for column in EVAL_QUERY), *(Column(column, many=True) for column in CANDIDATES)]
    table = read_rows(find_files(root, path or name, split), columns)
    numbers, image_root = np.arange(len(table)), image_root or root
    _check_sides(table, {"query": EVAL_QUERY}, name, numbers)
    _check_image_root(image_root, table, name)
    texts, paths = (table.column(column).to_pylist() for column in EVAL_QUERY)
    queries = [_item(text, image, image_root, f"{name} row {row}") for row, (text, image) in enumerate(zip(texts, paths, strict=True))]
    return _with_candidates(name, queries, _flat_sides(table, CANDIDATES, name, numbers), image_root)


@dataclass(frozen=True)
class _Sides:
    """Two parallel list columns, flat: entry n is of row `row_N[n]` and has the text `texts[text_N[n]]` and the path `paths[path_N[n]]`."""

    count_Q: NDArray[np.int64]
    row_N: NDArray[np.int64]
    texts: pa.Array
    text_N: NDArray[np.int64]
    paths: pa.Array
    path_N: NDArray[np.int64]


def _with_candidates(name: str, queries: list[Item], sides: _Sides, image_root: Path) -> EvalSet:
    if not sides.count_Q.all():
        raise DataError(f"{name} row {int(np.argmin(sides.count_Q))}: no candidates; the first must be the gold")
    identity_N = sides.text_N * len(sides.paths) + sides.path_N
    _, first, inverse_N = np.unique(identity_N, return_index=True, return_inverse=True)
    appearance = np.argsort(first)
    index_N = np.argsort(appearance).astype(np.int32)[inverse_N]
    candidates = [_candidate(sides, place, image_root, name) for place in first[appearance].tolist()]
    sorted_N = np.sort(sides.row_N * len(candidates) + index_N)  # equal neighbours: the same candidate twice in a row
    duplicates = int(np.count_nonzero(sorted_N[1:] == sorted_N[:-1]))
    if duplicates:
        repeats = f"{duplicates} of {len(index_N)} candidates repeat another of their query"
        _logger.info("%s: %s; a repeat of the gold counts as the gold", name, repeats)
    candidates_QM = np.split(index_N, np.cumsum(sides.count_Q)[:-1])
    golds = [row[:1] for row in candidates_QM]
    return EvalSet(name, queries, candidates, candidates_QM, golds, [np.ones(1, np.float32) for _ in golds], duplicates)


def _candidate(sides: _Sides, place: int, image_root: Path, name: str) -> Item:
    text, path = sides.texts[int(sides.text_N[place])].as_py(), sides.paths[int(sides.path_N[place])].as_py()
    label = f"{name} row {sides.row_N[place]}"
    if not path and not MARK.sub("", text).strip():
        raise DataError(f"{label}: a candidate has neither text nor image")
    return _item(text, path, image_root, label)


# -- both --------------------------------------------------------------------------------------------------------------------------------


def _item(text: str, path: str, image_root: Path, label: str) -> Item:
    """The path is checked, the picture not opened."""
    if not path:
        return Item(text)
    label = f"{label}: image {path!r}"
    try:
        return Item(text, (ImageRef(io.safe_join(image_root, path), label),))
    except PathError as error:
        raise PathError(f"{label}: {error}") from None


def _check_sides(table: pa.Table, sides: dict[str, tuple[str, str]], label: str, numbers: NDArray[np.int64]) -> None:
    """DataError for the first row of which a side has neither a picture nor a word besides placeholders."""
    for role, (text, path) in sides.items():
        words = pc.utf8_trim_whitespace(pc.replace_substring_regex(table.column(text), MARK.pattern, ""))
        empty = pc.and_(pc.equal(words, ""), pc.equal(table.column(path), ""))
        row = pc.index(empty, True).as_py()
        if row >= 0:
            raise DataError(f"{label} row {numbers[row]}: {role} has neither text nor image ({text} and {path} are empty)")


def _check_image_root(image_root: Path, table: pa.Table, name: str) -> None:
    if image_root.is_dir():
        return
    paths = [table.column(EVAL_QUERY[1]), pc.list_flatten(table.column(CANDIDATES[1]))]
    if any(pc.any(pc.not_equal(column, "")).as_py() for column in paths):
        raise DataError(f"{name}: image root {image_root} does not exist; unpack the pictures of the benchmark there")


def _flat_sides(table: pa.Table, names: tuple[str, str], label: str, numbers: NDArray[np.int64]) -> _Sides:
    """The two list columns side by side; an empty list or a lone "" (older dumps) stands for as many absent entries as the other has."""
    columns = [_codes(table.column(name)) for name in names]
    count_Q = np.maximum(columns[0][0], columns[1][0])
    row_N = np.repeat(np.arange(len(count_Q)), count_Q)
    place_N = np.arange(len(row_N)) - (np.cumsum(count_Q) - count_Q)[row_N]
    codes = []
    for length_Q, code_N, _ in columns:
        start_Q = np.cumsum(length_Q) - length_Q
        full_Q = length_Q == count_Q
        lone_Q = length_Q == 0
        lone_Q[length_Q == 1] = code_N[start_Q[length_Q == 1]] == 0
        if not (full_Q | lone_Q).all():
            row = int(np.argmin(full_Q | lone_Q))
            lengths = " and ".join(f"{name} {column[0][row]}" for name, column in zip(names, columns, strict=True))
            raise DataError(f"{label} row {numbers[row]}: the lists differ in length: {lengths}")
        present_N = full_Q[row_N]
        side_N = np.zeros(len(row_N), dtype=np.int64)
        side_N[present_N] = code_N[(start_Q[row_N] + place_N)[present_N]]
        codes.append(side_N)
    return _Sides(count_Q, row_N, columns[0][2], codes[0], columns[1][2], codes[1])


def _codes(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], NDArray[np.int64], pa.Array]:
    """A list column as (length of each list, code of each entry, distinct entries by code); code 0 is ""."""
    lengths = pc.list_value_length(column).to_numpy().astype(np.int64)
    entries = pa.chunked_array([pa.array([""], pa.large_string()), *pc.list_flatten(column).chunks]).combine_chunks().dictionary_encode()
    return lengths, entries.indices.to_numpy()[1:].astype(np.int64), entries.dictionary
