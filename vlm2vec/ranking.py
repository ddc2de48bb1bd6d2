"""Where the relevant candidates of each query stand: exact scores, ties by rule, corpora of any size.

Candidates are ranked by dot product, in float32. A score depends on its two embeddings alone (see `quantize`), so equal candidates score
equally wherever they stand, and ties are real. The rules for ties:
    * "pessimistic" (default): a candidate that is not relevant stands before the relevant ones it ties with, and of relevant ones the lower
      grade first. A model that maps everything to one point scores 0, and the order of the candidates cannot matter.
    * "reference": of equal scores the first in the list stands first, as with the argmax of MMEB's evaluation (arXiv 2410.05160). With the
      relevant candidate listed first, ties are hits.

Nothing is sorted but the winners: a position is a count of the candidates that stand before it, taken tile by tile, so that a corpus
streams through once and memory depends on the tile.

Shape letters: Q queries, N targets, T targets of a tile, M candidates of one query, R relevant ones of them, K best ones, D numbers of an
embedding, A all pairs of a query and one of its candidates, one after another.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlm2vec.errors import DataError, InputError
from vlm2vec.quantize import Codes, exact

TIES = ("pessimistic", "reference")
TILE_BYTES = 1 << 26  # of a tile of targets in float64
QUERIES_AT_ONCE = 1024
Rows = Sequence[ArrayLike]  # per query its indices, or what belongs to them


@dataclass(frozen=True, eq=False)
class Ranking:
    """What is known of every query's ranking."""

    position_QR: list[NDArray[np.int64]]  # of its relevant candidates, 1 for the first of all candidates, in the order they were given in
    ties_Q: NDArray[np.int64]  # how many others have exactly the score of the best-scored relevant one
    top_QK: list[NDArray[np.int64]]  # best candidates, best first, as indices into the targets; ties by the rule, then by index
    top_score_QK: list[NDArray[np.float32]]


def rank(
    query_QD: ArrayLike | Codes,
    targets: Any,
    candidates_QM: Rows | None,
    relevant_QR: Rows,
    grades_QR: Rows,
    ties: str = "pessimistic",
    top: int = 5,
) -> Ranking:
    """Rank the relevant candidates of every query.

    `query_QD` are unit rows or Codes. `targets` are unit rows or Codes too: an (N, D) array, or anything with a length whose slices are
    (T, D), such as a memory map. `candidates_QM[q]` are query q's candidates as indices into the targets, a repeated one counting once,
    where it stands first; None makes every target a candidate of every query. `relevant_QR[q]` are its distinct relevant candidates,
    `grades_QR[q]` their grades (> 0). `top` is how many of the best candidates are wanted.

    Raises NonFiniteError naming the query or target whose embedding is NaN or infinite, DataError naming the query whose lists are wrong.
    """
    if ties not in TIES:
        raise InputError(f"unknown rule for ties {ties!r}; the rules are {', '.join(TIES)}")
    query = query_QD if isinstance(query_QD, Codes) else exact(query_QD, "query")
    _check_lists(len(query), len(targets), candidates_QM, relevant_QR, grades_QR)
    grades = [np.asarray(grade_R, dtype=np.float64) for grade_R in grades_QR]
    if candidates_QM is None:
        tallies = _stream(query, targets, [np.asarray(row, dtype=np.int64) for row in relevant_QR], grades, ties, top)
        best = [tally.best() for tally in tallies]
    else:
        members = [_distinct(row, ties) for row in candidates_QM]
        places = [_places(q, row, relevant) for q, (row, relevant) in enumerate(zip(members, relevant_QR, strict=True))]
        tallies = _count_listed(candidate_scores(query, targets, members), places, grades, ties, top)
        best = [(row[place_K], score_K) for row, (place_K, score_K) in zip(members, (tally.best() for tally in tallies), strict=True)]
    ties_Q = np.array([tally.ties_of_best() for tally in tallies], dtype=np.int64)
    return Ranking([tally.positions() for tally in tallies], ties_Q, [index_K for index_K, _ in best], [score_K for _, score_K in best])


def positions(score_QM: Rows, relevant_QR: Rows, grades_QR: Rows, ties: str = "pessimistic") -> list[NDArray[np.int64]]:
    """Positions (R,) of the relevant candidates of every query, from 1, where somebody else made the scores.

    `relevant_QR[q]` are the places of query q's relevant candidates in `score_QM[q]`, `grades_QR[q]` their grades (> 0). Every score must
    be finite.
    """
    scores = [np.array(score_M, dtype=np.float64) for score_M in score_QM]  # a copy, for they are written to
    grades = [np.asarray(grade_R, dtype=np.float64) for grade_R in grades_QR]
    places = [np.asarray(place_R, dtype=np.int64) for place_R in relevant_QR]
    return [tally.positions() for tally in _count_listed(scores, places, grades, ties, 0)]


# -- scores ------------------------------------------------------------------------------------------------------------------------------


def similarity(query: Codes, target: Codes) -> NDArray[np.float32]:
    """Dot products (Q, N): exact sums of whole numbers in float64, times the factors of both rows, rounded to float32."""
    if query.code_ND.shape[1] != target.code_ND.shape[1]:
        raise DataError(f"embeddings of queries have {query.code_ND.shape[1]} numbers, those of targets {target.code_ND.shape[1]}")
    product_QN = query.code_ND.astype(np.float64) @ target.code_ND.astype(np.float64).T
    product_QN *= query.factor_N[:, None]
    product_QN *= target.factor_N
    return product_QN.astype(np.float32)


def candidate_scores(query_QD: ArrayLike | Codes, targets: Any, candidates_QM: Rows) -> list[NDArray[np.float32]]:
    """The similarity of every query to each of its candidates, a row (M,) per query; arguments as for `rank`."""
    query = query_QD if isinstance(query_QD, Codes) else exact(query_QD, "query")
    scores: list[NDArray[np.float32]] = []
    for start in range(0, len(query), QUERIES_AT_ONCE):
        scores += _block_scores(query[start : start + QUERIES_AT_ONCE], targets, candidates_QM[start : start + QUERIES_AT_ONCE])
    return scores


def _block_scores(query: Codes, targets: Any, candidates_QM: Rows) -> list[NDArray[np.float32]]:
    index_A, query_A, end_Q = _flat(candidates_QM)
    score_A = np.empty(len(index_A), dtype=np.float32)
    for start, stop in _tiles(targets, query):
        pair_A = np.flatnonzero((start <= index_A) & (index_A < stop))
        if len(pair_A):
            asked_Q, row_A = _compact(query_A[pair_A], len(query))
            used_T, column_A = _compact(index_A[pair_A] - start, stop - start)
            score_A[pair_A] = similarity(query[asked_Q], _read(targets, start, stop, used_T))[row_A, column_A]
    return np.split(score_A, end_Q[:-1])


def _flat(rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The entries of all rows one after another (A,), the row of each (A,), and where each row ends (Q,)."""
    parts = [np.asarray(row, dtype=np.int64) for row in rows]
    sizes = [len(part) for part in parts]
    return np.concatenate(parts), np.repeat(np.arange(len(parts)), sizes), np.cumsum(sizes)


def _compact(value_A: NDArray[np.int64], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct values among 0 .. count - 1, ascending, and where each value stands in them."""
    seen = np.zeros(count, dtype=bool)
    seen[value_A] = True
    return np.flatnonzero(seen), (np.cumsum(seen) - 1)[value_A]


# -- tiles of targets --------------------------------------------------------------------------------------------------------------------


def _tiles(targets: Any, query: Codes) -> Iterator[tuple[int, int]]:
    """Where the tiles start and stop. What a memory map read for a tile is given back before the next."""
    rows = max(1, TILE_BYTES // (8 * query.code_ND.shape[1]))
    for start in range(0, len(targets), rows):
        yield start, min(start + rows, len(targets))
        _release(targets)


def _read(targets: Any, start: int, stop: int, rows: slice | NDArray[np.int64] = slice(None)) -> Codes:
    """The chosen rows of a tile."""
    tile = targets[start:stop]
    return tile[rows] if isinstance(tile, Codes) else exact(tile[rows], "target", np.arange(start, stop)[rows])


def _release(targets: Any) -> None:
    """Unmap the pages of a memory map, which stay in the system's cache of files; not those that hold private changes (mode "c")."""
    rows = getattr(targets, "rows", targets)
    if isinstance(rows, np.memmap) and isinstance(rows.base, mmap.mmap) and rows.mode != "c" and hasattr(mmap, "MADV_DONTNEED"):
        rows.base.madvise(mmap.MADV_DONTNEED)


# -- counting ----------------------------------------------------------------------------------------------------------------------------


class _Tally:
    """What is known of one query's ranking while its candidates come in, in order of their places.

    Among candidates of equal score that are not relevant the earlier place stands first.
    """

    def __init__(self, score_R: NDArray[np.float32], place_R: NDArray[np.int64], grade_R: NDArray[np.float64], ties: str, top: int) -> None:
        self.score_R, self.place_R, self.grade_R, self.pessimistic, self.top = score_R, place_R, grade_R, ties == "pessimistic", top
        self.above_R, self.tied_R, self.before_R = (np.zeros(len(score_R), dtype=np.int64) for _ in range(3))
        self.score_K, self.place_K = np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int64)  # of the best that are not relevant

    def add(self, score_T: NDArray[np.float32], start: int) -> None:
        """Take in the candidates at places start, start + 1, ...; the relevant ones among them have the score -inf."""
        for r, score in enumerate(self.score_R):
            same_T = score_T == score
            self.above_R[r] += np.count_nonzero(score_T > score)
            self.tied_R[r] += np.count_nonzero(same_T)
            self.before_R[r] += np.count_nonzero(same_T[: max(0, self.place_R[r] - start)])
        lowest = self.score_K[-1] if 0 < self.top == len(self.score_K) else -np.inf
        better_T = np.flatnonzero(score_T > lowest)
        if len(better_T) and self.top:
            score_A, place_A = np.append(self.score_K, score_T[better_T]), np.append(self.place_K, better_T + start)
            keep_K = _highest(score_A, self.top)
            self.score_K, self.place_K = score_A[keep_K], place_A[keep_K]

    def positions(self) -> NDArray[np.int64]:
        """Position (R,) of each relevant candidate, from 1."""
        among_R = np.empty_like(self.place_R)
        among_R[self._order(self.score_R, self.grade_R, self.place_R)] = np.arange(1, len(among_R) + 1)
        return self.above_R + (self.tied_R if self.pessimistic else self.before_R) + among_R

    def ties_of_best(self) -> int:
        return int(self.tied_R[self.score_R.argmax()])

    def best(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Places and scores (K,) of the best candidates, relevant or not."""
        score_A, place_A = np.append(self.score_K, self.score_R), np.append(self.place_K, self.place_R)
        order_K = self._order(score_A, np.append(np.zeros(len(self.score_K)), self.grade_R), place_A)[: self.top]
        return place_A[order_K], score_A[order_K]

    def _order(self, score_A: NDArray[np.float32], grade_A: NDArray[np.float64], place_A: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.lexsort((place_A, grade_A, -score_A) if self.pessimistic else (place_A, -score_A))


def _highest(score_A: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Indices of the `count` highest scores, descending, equal ones in the order in which they stand."""
    index_A = np.arange(len(score_A))
    if len(score_A) > count:
        index_A = np.flatnonzero(score_A >= np.partition(score_A, -count)[-count])
    return index_A[np.argsort(-score_A[index_A], kind="stable")][:count]


def _count_listed(scores: list[NDArray], places: list[NDArray], grades: list[NDArray], ties: str, top: int) -> list[_Tally]:
    """Tallies of queries with candidates of their own; takes over `scores`."""
    tallies = []
    for score_M, place_R, grade_R in zip(scores, places, grades, strict=True):
        tallies.append(_Tally(score_M[place_R], place_R, grade_R, ties, top))
        score_M[place_R] = -np.inf
        tallies[-1].add(score_M, 0)
    return tallies


def _stream(query: Codes, targets: Any, relevant_QR: list[NDArray], grades: list[NDArray], ties: str, top: int) -> list[_Tally]:
    """Tallies of queries for which every target is a candidate; the place of a target is its index."""
    scores = candidate_scores(query, targets, relevant_QR)
    tallies = [_Tally(*known, ties, top) for known in zip(scores, relevant_QR, grades, strict=True)]
    index_A, query_A, _ = _flat(relevant_QR)
    for start, stop in _tiles(targets, query):
        tile = _read(targets, start, stop)
        for first in range(0, len(query), QUERIES_AT_ONCE):
            score_QT = similarity(query[first : first + QUERIES_AT_ONCE], tile)
            here_A = (start <= index_A) & (index_A < stop) & (first <= query_A) & (query_A < first + len(score_QT))
            score_QT[query_A[here_A] - first, index_A[here_A] - start] = -np.inf
            for tally, score_T in zip(tallies[first:], score_QT, strict=False):
                tally.add(score_T, start)
    return tallies


# -- lists of candidates -----------------------------------------------------------------------------------------------------------------


def _distinct(members_M: ArrayLike, ties: str) -> NDArray[np.int64]:
    """A query's candidates, each once, in the order that decides between equal scores: ascending, or as listed under the reference rule."""
    distinct_M, first_M = np.unique(np.asarray(members_M, dtype=np.int64), return_index=True)
    return distinct_M if ties == "pessimistic" else distinct_M[np.argsort(first_M)]


def _places(query: int, members_M: NDArray[np.int64], relevant_R: ArrayLike) -> NDArray[np.int64]:
    """Where the relevant candidates stand among the candidates."""
    order_M = np.argsort(members_M)
    place_R = order_M[np.searchsorted(members_M, relevant_R, sorter=order_M).clip(max=len(members_M) - 1)]
    strangers_R = np.asarray(relevant_R)[members_M[place_R] != relevant_R]
    if len(strangers_R):
        raise DataError(f"query {query}: relevant candidate {strangers_R[0]} is not among the query's candidates")
    return place_R


def _check_lists(queries: int, targets: int, candidates_QM: Rows | None, relevant_QR: Rows, grades_QR: Rows) -> None:
    """Raise DataError unless every query has relevant candidates with grades, and every index is that of a target."""
    lists = {"relevant candidates": relevant_QR, "grades": grades_QR} | ({} if candidates_QM is None else {"candidates": candidates_QM})
    for name, rows in lists.items():
        if len(rows) != queries or not queries:
            raise DataError(f"{queries} queries and {len(rows)} lists of {name}; there must be one for each, and at least one query")
        empty = next((q for q, row in enumerate(rows) if not np.size(row)), None)
        if empty is not None:
            raise DataError(f"query {empty} has no {name}")
        if name != "grades":
            index_A, query_A, _ = _flat(rows)
            wrong_A = (index_A < 0) | (index_A >= targets)
            if wrong_A.any():
                raise DataError(f"query {query_A[wrong_A][0]}: candidate {index_A[wrong_A][0]} does not exist; there are {targets} targets")
    for q, (relevant, grade) in enumerate(zip(relevant_QR, grades_QR, strict=True)):
        if np.shape(relevant) != np.shape(grade) or not ((np.asarray(grade) > 0) & np.isfinite(grade)).all():
            raise DataError(f"query {q}: {np.size(relevant)} relevant candidates with grades {grade}; each needs one above 0")
        if len(np.unique(relevant)) != np.size(relevant):
            raise DataError(f"query {q}: a relevant candidate is listed twice")
