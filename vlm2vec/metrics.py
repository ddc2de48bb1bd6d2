"""Scores of a retrieval evaluation from embeddings: model-free, float32, with the rule for ties spelled out.

precision@1 is the share of queries whose first-ranked candidate is labelled gold (MMEB, arXiv 2410.05160, section 4). Ties:
    * "pessimistic" (default): a candidate that is not gold beats every gold candidate it ties with. A model that maps everything to one
      point scores 0, and the order of the candidates cannot matter.
    * "reference": of equal scores the first in the list wins, as the argmax of the published evaluation. With the gold candidate listed
      first, ties are hits.

Shape letters: Q queries, N distinct targets, M candidates of one query (differs between queries), S bootstrap samples, D embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlm2vec.errors import DataError, InputError, NonFiniteError

TIES = ("pessimistic", "reference")
BLOCK = 4096  # target rows held in float64 at once


@dataclass(frozen=True)
class GoldRanks:
    """Per query: `rank_Q` of its best gold candidate (1 = first), `ties_Q` how many candidates that are not gold have exactly its score."""

    rank_Q: NDArray[np.int64]
    ties_Q: NDArray[np.int64]

    @property
    def correct_Q(self) -> NDArray[np.bool_]:
        return self.rank_Q == 1

    @property
    def precision_at_1(self) -> float:
        """Fraction in [0, 1]."""
        return float(self.correct_Q.mean())


def similarity(query_QD: ArrayLike, target_ND: ArrayLike) -> NDArray[np.float32]:
    """Dot products (Q, N), summed in float64 and rounded to float32.

    The detour makes equal targets score equally wherever they stand: a float32 matrix product does not, so it would break ties at random.
    """
    query_QD, target_ND = np.asarray(query_QD, dtype=np.float64), np.asarray(target_ND)
    score_QN = np.empty((len(query_QD), len(target_ND)), dtype=np.float32)
    for start in range(0, len(target_ND), BLOCK):
        score_QN[:, start : start + BLOCK] = query_QD @ target_ND[start : start + BLOCK].astype(np.float64).T
    return score_QN


def rank_gold(scores: Sequence[ArrayLike], golds: Sequence[ArrayLike], ties: str = "pessimistic") -> GoldRanks:
    """Rank the best gold candidate of each query.

    `scores[q]` (M_q,) are compared in float32; `golds[q]` (M_q,) bool marks the candidates that count as right, all copies of the labelled
    one included. Raises NonFiniteError if a score is NaN or infinite, DataError if a query has no gold candidate or there is no query.
    """
    if ties not in TIES:
        raise InputError(f"unknown rule for ties {ties!r}; the rules are {', '.join(TIES)}")
    score_A, gold_A, start_Q = _concatenate(scores, golds)  # A: all candidates of all queries, one after the other
    query_A = np.repeat(np.arange(len(start_Q)), np.diff(start_Q, append=len(score_A)))
    best_Q = np.maximum.reduceat(np.where(gold_A, score_A, -np.inf), start_Q)
    if np.isneginf(best_Q).any():
        raise DataError(f"query {int(np.isneginf(best_Q).argmax())} has no gold candidate")
    above_A = score_A > best_Q[query_A]
    tied_A = ~gold_A & (score_A == best_Q[query_A])
    beats_A = above_A | (tied_A if ties == "pessimistic" else tied_A & _before_gold(score_A, gold_A, best_Q, query_A))
    return GoldRanks(1 + np.add.reduceat(beats_A, start_Q, dtype=np.int64), np.add.reduceat(tied_A, start_Q, dtype=np.int64))


def precision_at_1(scores: Sequence[ArrayLike], golds: Sequence[ArrayLike], ties: str = "pessimistic") -> float:
    """Share of queries whose best candidate is gold; arguments and errors as for `rank_gold`."""
    return rank_gold(scores, golds, ties).precision_at_1


def _concatenate(scores: Sequence[ArrayLike], golds: Sequence[ArrayLike]) -> tuple[NDArray, NDArray, NDArray]:
    """Flat scores (float32), flat gold marks (bool) and where each query starts, checked."""
    score_rows = [np.asarray(row, dtype=np.float32) for row in scores]
    gold_rows = [np.asarray(row, dtype=bool) for row in golds]
    if not score_rows or len(score_rows) != len(gold_rows):
        raise DataError(
            f"{len(score_rows)} queries with scores and {len(gold_rows)} with gold marks; both are needed, for at least one query"
        )
    for index, (row, gold) in enumerate(zip(score_rows, gold_rows, strict=True)):
        if row.shape != gold.shape or row.ndim != 1 or not row.size:
            raise DataError(f"query {index}: scores have shape {row.shape}, gold marks {gold.shape}; both must be (M,) with M > 0")
    score_A = np.concatenate(score_rows)
    bad = ~np.isfinite(score_A)
    start_Q = np.cumsum([0, *(len(row) for row in score_rows[:-1])])
    if bad.any():
        first = int(np.searchsorted(start_Q, bad.argmax(), side="right")) - 1
        raise NonFiniteError(f"{int(bad.sum())} of {len(score_A)} scores are NaN or infinite, first in query {first}; check the embeddings")
    return score_A, np.concatenate(gold_rows), start_Q


def _before_gold(score_A: NDArray, gold_A: NDArray, best_Q: NDArray, query_A: NDArray) -> NDArray[np.bool_]:
    """Candidates listed before the first gold one that has the best gold score of its query."""
    position_A = np.arange(len(score_A))
    first_Q = np.full(len(best_Q), len(score_A))
    holds_best_A = gold_A & (score_A == best_Q[query_A])
    np.minimum.at(first_Q, query_A[holds_best_A], position_A[holds_best_A])
    return position_A < first_Q[query_A]


Scored = ArrayLike | Mapping[str, "Scored"]  # a set's per-query scores (Q,), or named sets, or named groups of sets


def bootstrap_interval(correct: Scored, samples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval (Efron 1979) of a set's mean score, or of a mean over sets.

    `correct` is one set's per-query scores (Q,), bool or float; or named sets, for their unweighted mean; or named groups of named sets,
    for the mean of the groups' means. Queries are resampled within each set, and the sets themselves are held fixed. Deterministic: the
    stream of a set depends on `seed` and its name only. Raises DataError on an empty set.
    """
    low, high = np.percentile(_resample(correct, samples, seed, ""), [2.5, 97.5])
    return float(low), float(high)


def _resample(correct: Scored, samples: int, seed: int, name: str) -> NDArray[np.float64]:
    """Mean score of each bootstrap sample (S,)."""
    if isinstance(correct, Mapping):
        return np.mean([_resample(part, samples, seed, key) for key, part in correct.items()], axis=0)
    value_Q = np.asarray(correct, dtype=np.float64)
    if not value_Q.size:
        raise DataError(f"set {name!r} has no query to compute an interval from")
    # Drawing Q queries with replacement is drawing how often each distinct score occurs: exact, and small for hits and misses.
    value_V, count_V = np.unique(value_Q, return_counts=True)
    stream = np.random.default_rng([seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")])
    return stream.multinomial(len(value_Q), count_V / len(value_Q), size=samples) @ value_V / len(value_Q)


def per_query(name, positions, grades):
    f,_,k=name.partition("@"); k=int(k)
    return np.array([float((p.min()<=k)) for p in positions])
