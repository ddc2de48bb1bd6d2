"""Rows of MMEB as arrays: what is wrong with them, and which pictures they name, a million candidates at a time.

Shape letters: Q rows, N entries of a list column one after the other, P distinct pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vlm2vec.data.check.report import Example, Finding, finding
from vlm2vec.data.mmeb import CANDIDATES, EVAL_QUERY, NEGATIVE, POSITIVE, QUERY
from vlm2vec.data.readers import TEXT, Column, read_rows
from vlm2vec.errors import DataError
from vlm2vec.prompts import MARK


@dataclass(frozen=True)
class Rows:
    """What a set's files hold: how many rows, the median of candidates, the distinct pictures with the first row that names each."""

    rows: int
    candidates: int | None
    path_P: list[str]
    row_P: NDArray[np.int64]
    findings: list[Finding]


def read(files: Sequence[Path], side: str) -> Rows:
    """Read a set's rows with every problem in them; a file that cannot be read is one problem."""
    try:
        return _read_eval(files) if side == "eval" else _read_train(files)
    except DataError as error:
        return Rows(0, None, [], np.zeros(0, np.int64), finding("corrupt", [Example(str(error))]))


def _read_train(files: Sequence[Path]) -> Rows:
    sides = {"query": QUERY, "positive": POSITIVE}
    columns = [Column(name) for pair in sides.values() for name in pair] + [Column(name, many=True, required=False) for name in NEGATIVE]
    table = read_rows(files, columns)
    problems = [example for role, pair in sides.items() for example in _empty(table, role, pair)]
    texts, paths = (_List(table.column(name)) for name in NEGATIVE)
    problems += _unequal(texts, paths, NEGATIVE)
    named = [_Named(table.column(pair[1])) for pair in sides.values()]
    return _rows(table, None, [*named, _Named(paths.entries, paths.row_N())], problems)


def _read_eval(files: Sequence[Path]) -> Rows:
    columns = [
        *(Column(name) for name in EVAL_QUERY),
        Column("qry_inst", required=False),
        *(Column(name, many=True) for name in CANDIDATES),
    ]
    table = read_rows(files, columns)
    texts, paths = (_List(table.column(name)) for name in CANDIDATES)
    problems = [*_empty(table, "query", EVAL_QUERY), *_unequal(texts, paths, CANDIDATES), *_empty_candidates(texts, paths)]
    count_Q = np.maximum(texts.length_Q, paths.length_Q)
    named = [_Named(table.column(EVAL_QUERY[1])), _Named(paths.entries, paths.row_N())]
    return _rows(table, int(np.median(count_Q)), named, problems)


class _List:
    """A list column: the length of each row's list, the entries one after the other, and which of them are nothing.

    Placeholders alone are nothing, too. `absent_Q`: lists that stand for nothing at all, empty or a lone "" as in older dumps.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.length_Q = pc.list_value_length(column).to_numpy().astype(np.int64)
        self.start_Q = np.cumsum(self.length_Q) - self.length_Q
        self.entries = pc.list_flatten(column)
        encoded = _encode(self.entries)
        code_N, texts = encoded.indices.to_numpy(), encoded.dictionary
        self.empty_N = _blank(texts).to_numpy(zero_copy_only=False)[code_N]
        lone_Q = self.length_Q == 1
        self.absent_Q = self.length_Q == 0
        self.absent_Q[lone_Q] = pc.equal(texts, "").to_numpy(zero_copy_only=False)[code_N[self.start_Q[lone_Q]]]

    def row_N(self) -> NDArray[np.int64]:
        return np.repeat(np.arange(len(self.length_Q)), self.length_Q)


def _encode(column: pa.ChunkedArray) -> pa.DictionaryArray:
    return column.combine_chunks().dictionary_encode()


def _blank(texts: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    return pc.equal(pc.utf8_trim_whitespace(pc.replace_substring_regex(texts, MARK.pattern, "")), "")


def _empty(table: pa.Table, role: str, pair: tuple[str, str]) -> Iterator[Example]:
    text, path = (table.column(name) for name in pair)
    empty = pc.and_(_blank(text), pc.equal(path, ""))
    for row in np.flatnonzero(empty.to_numpy()):
        yield Example(f"{role} has neither text nor picture ({pair[0]} and {pair[1]} are empty)", int(row))


def _unequal(texts: _List, paths: _List, names: tuple[str, str]) -> Iterator[Example]:
    wrong_Q = (texts.length_Q != paths.length_Q) & ~texts.absent_Q & ~paths.absent_Q
    for row in np.flatnonzero(wrong_Q):
        yield Example(f"the lists do not match: {names[0]} has {texts.length_Q[row]}, {names[1]} {paths.length_Q[row]}", int(row))


def _empty_candidates(texts: _List, paths: _List) -> Iterator[Example]:
    """Rows without candidates, and rows with a candidate that is nothing; a list that is not as long as the other gives it nothing."""
    count_Q = np.maximum(texts.length_Q, paths.length_Q)
    row_N = np.repeat(np.arange(len(count_Q)), count_Q)
    place_N = np.arange(len(row_N)) - (np.cumsum(count_Q) - count_Q)[row_N]
    nothing_N = np.ones(len(row_N), dtype=bool)
    for side in (texts, paths):
        full_N = (side.length_Q == count_Q)[row_N]
        nothing_N[full_N] &= side.empty_N[(side.start_Q[row_N] + place_N)[full_N]]
    for row in np.flatnonzero(count_Q == 0):
        yield Example("no candidates; the first must be the gold", int(row))
    for row in np.unique(row_N[nothing_N]):
        yield Example("a candidate has neither text nor picture", int(row))


@dataclass(frozen=True)
class _Named:
    """A column of paths, flat; `row_N` None: entry n belongs to row n."""

    paths: pa.ChunkedArray
    row_N: NDArray[np.int64] | None = None


def _rows(table: pa.Table, candidates: int | None, named: Sequence[_Named], problems: Sequence[Example]) -> Rows:
    whole = pa.chunked_array([chunk for column in named for chunk in column.paths.chunks], TEXT)
    encoded = _encode(whole)
    row_N = np.concatenate([np.arange(len(column.paths)) if column.row_N is None else column.row_N for column in named])
    highest_N = np.maximum.accumulate(encoded.indices.to_numpy())  # codes are given in order of first appearance
    first = np.flatnonzero(np.diff(highest_N, prepend=-1) > 0)
    paths = encoded.dictionary.to_pylist()
    used = [index for index, path in enumerate(paths) if path]
    return Rows(len(table), candidates, [paths[index] for index in used], row_N[first][used], finding("rows", problems))
