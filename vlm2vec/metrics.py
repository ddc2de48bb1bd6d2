"""Scores of a retrieval evaluation from the positions of relevant candidates, and how sure they are.

A metric has the name of its family, with a cut-off k: "hit@1", "ndcg_linear@5". Every value lies in [0, 1].

Intervals are Wilson's score interval (Wilson 1927) with the effective number of queries in the place of n, as for proportions of a complex
survey (Kish 1965; Korn and Graubard 1998): the queries over the design effect, which is the variance of the mean over that of as many hits
and misses. For hits of one set that is Wilson's own interval; a mean over sets is an estimate from strata. In simulations 95 % of them hold
the true mean, within two points, for hits and graded values, from two dozen queries on and down to means of 2 %; with counted hits that is
an average over nearby true means, as their coverage is a saw (Brown, Cai and DasGupta 2001), and graded values of which few are above 0
and none near 1 get wider ones. Of percentile bootstrap intervals 62 % hold a mean of 2 % over 50 queries.

Shape letters: Q queries, R relevant candidates of one query, A those of all queries, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import fsum, sqrt
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlm2vec.errors import DataError, InputError

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
PRIOR = 0.2  # hits that weigh in on the design effect, which a few values above 0 cannot tell


# -- metrics -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Judged:
    """The relevant candidates of all queries, of each query (`query_A`) the best position first; `place_A` counts them within the query."""

    position_A: NDArray[np.int64]
    grade_A: NDArray[np.float64]
    query_A: NDArray[np.int64]
    place_A: NDArray[np.int64]
    start_Q: NDArray[np.int64]

    @classmethod
    def of(cls, position_QR: Sequence[ArrayLike], grades_QR: Sequence[ArrayLike]) -> Judged:
        """Lists as for `per_query`. Raises DataError naming the query whose lists are empty or cannot be right."""
        if not len(position_QR) or len(position_QR) != len(grades_QR):
            raise DataError(f"{len(position_QR)} lists of positions and {len(grades_QR)} of grades; expected one of each for every query")
        for query, (position_R, grade_R) in enumerate(zip(position_QR, grades_QR, strict=True)):
            if not np.size(position_R) or np.shape(position_R) != np.shape(grade_R):
                raise DataError(
                    f"query {query}: {np.size(position_R)} positions with {np.size(grade_R)} grades; expected as many, at least one"
                )
        position_A, grade_A = np.concatenate(position_QR).astype(np.int64), np.concatenate(grades_QR).astype(np.float64)
        sizes = [np.size(row) for row in position_QR]
        query_A, start_Q = np.repeat(np.arange(len(sizes)), sizes), np.cumsum([0, *sizes[:-1]])
        wrong_A = (position_A < 1) | ~((grade_A > 0) & np.isfinite(grade_A))
        if wrong_A.any():
            raise DataError(f"query {query_A[wrong_A][0]}: position {position_A[wrong_A][0]} with grade {grade_A[wrong_A][0]}")
        order_A = np.lexsort((grade_A, position_A, query_A))
        return cls(position_A[order_A], grade_A[order_A], query_A, np.arange(1, len(query_A) + 1) - start_Q[query_A], start_Q)

    def sum(self, value_A: NDArray) -> NDArray[np.float64]:
        """Sum of the values of each query (Q,)."""
        return np.add.reduceat(value_A, self.start_Q, dtype=np.float64)

    def found(self, k: int) -> NDArray[np.float64]:
        """How many relevant candidates of each query stand among the first k (Q,)."""
        return self.sum(self.position_A <= k)

    @property
    def count_Q(self) -> NDArray[np.float64]:
        return self.sum(np.ones(len(self.position_A)))


def _hit(judged: Judged, k: int) -> NDArray[np.float64]:
    return (judged.found(k) > 0).astype(np.float64)


def _precision(judged: Judged, k: int) -> NDArray[np.float64]:
    return judged.found(k) / k


def _recall(judged: Judged, k: int) -> NDArray[np.float64]:
    return judged.found(k) / judged.count_Q


def _f1(judged: Judged, k: int) -> NDArray[np.float64]:
    return 2 * judged.found(k) / (k + judged.count_Q)


def _map(judged: Judged, k: int) -> NDArray[np.float64]:
    return judged.sum(np.where(judged.position_A <= k, judged.place_A / judged.position_A, 0)) / np.minimum(judged.count_Q, k)


def _mrr(judged: Judged, k: int) -> NDArray[np.float64]:
    best_Q = judged.position_A[judged.start_Q]
    return np.where(best_Q <= k, 1 / best_Q, 0)


def _ndcg(judged: Judged, k: int, gain: Callable[[NDArray], NDArray]) -> NDArray[np.float64]:
    def discounted(grade_A: NDArray, position_A: NDArray) -> NDArray[np.float64]:
        return judged.sum(np.where(position_A <= k, gain(grade_A) / np.log2(position_A + 1), 0))

    ideal_A = judged.grade_A[np.lexsort((-judged.grade_A, judged.query_A))]
    return discounted(judged.grade_A, judged.position_A) / discounted(ideal_A, judged.place_A)


METRICS: Mapping[str, Callable[[Judged, int], NDArray[np.float64]]] = MappingProxyType(
    {
        "hit": _hit,  # is a relevant candidate among the first k
        "precision": _precision,  # relevant among the first k / k
        "recall": _recall,  # relevant among the first k / relevant
        "f1": _f1,  # harmonic mean of the two
        "map": _map,  # average precision: mean of precision@position over the relevant, found ones only, of at most k
        "mrr": _mrr,  # 1 / position of the best relevant candidate
        "ndcg_linear": partial(_ndcg, gain=np.asarray),  # grade / log2(position + 1), over the best possible (Jarvelin and Kekalainen 2002)
        "ndcg_exponential": partial(_ndcg, gain=lambda grade_A: np.exp2(grade_A) - 1),  # 2^grade - 1 in its place (Burges et al. 2005)
    }
)


def parse(name: str) -> tuple[str, int]:
    """The family and the cut-off of a metric's name; InputError for an unknown one."""
    family, _, cut = name.partition("@")
    if family not in METRICS or not cut.isdecimal() or cut != str(int(cut)) or cut == "0":
        raise InputError(f"unknown metric {name!r}; expected {', '.join(METRICS)} with a cut-off, as in hit@1")
    return family, int(cut)


def per_query(name: str, position_QR: Sequence[ArrayLike], grades_QR: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """The value (Q,) of metric `name`, such as "ndcg_linear@5", for every query.

    `position_QR[q]` are the positions of query q's relevant candidates, from 1 (see `ranking.rank`), `grades_QR[q]` their grades. Raises
    InputError for an unknown name, DataError for lists that cannot be scored.
    """
    family, cut = parse(name)
    return METRICS[family](Judged.of(position_QR, grades_QR), cut)


# -- intervals ---------------------------------------------------------------------------------------------------------------------------

Values = ArrayLike | Mapping[str, "Values"]  # a set's values per query (Q,), or named sets, or named groups of sets


def interval(values: Values) -> tuple[float, float]:
    """95 % interval of a set's mean value, or of a mean over sets, from values in [0, 1].

    `values` is one set's values (Q,), bool or float; or named sets, for their unweighted mean; or named groups of named sets, for the mean
    of the groups' means. The queries of a set are taken as a sample, the sets themselves as fixed. Neither the order of queries nor that of
    sets matters. Raises DataError for a set that is empty or has values outside [0, 1].
    """
    sets = list(_weighted(values, 1.0, "values"))
    mean = min(1.0, fsum(found.weight * found.mean for found in sets))
    variance = fsum(found.weight**2 * found.variance / found.queries for found in sets)  # of the mean
    trials = 1 / fsum(found.weight**2 / found.queries for found in sets)  # the queries, if all weigh the same
    # mean * (1 - mean) is too small by the variance, on average; with that added, the effect is 1 for hits and misses of one set
    effect = (trials**2 * variance + PRIOR) / (trials * (mean * (1 - mean) + variance) + PRIOR)
    return wilson(mean, trials / effect)


def wilson(mean: float, size: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share `mean` of `size` trials: the true shares from which it lies less than Z standard errors away."""
    centre = mean + Z**2 / (2 * size)
    spread = Z * sqrt(mean * (1 - mean) / size + Z**2 / (4 * size**2))
    scale = 1 + Z**2 / size
    # at 0 and 1 an end is the mean itself, but for rounding
    return max(0.0, min(mean, (centre - spread) / scale)), min(1.0, max(mean, (centre + spread) / scale))


@dataclass(frozen=True)
class _Set:
    """One set's part in a mean."""

    weight: float
    mean: float
    variance: float  # between queries, unbiased; the largest there can be where a single query tells nothing
    queries: int


def _weighted(values: Values, weight: float, name: str) -> Iterator[_Set]:
    """The sets in `values`, each with its weight in the mean of means."""
    if isinstance(values, Mapping):
        if not values:
            raise DataError(f"group {name!r} has no set to compute an interval from")
        for key, part in values.items():
            yield from _weighted(part, weight / len(values), key)
        return
    value_Q = np.sort(np.asarray(values, dtype=np.float64))
    if not value_Q.size:
        raise DataError(f"set {name!r} has no query to compute an interval from")
    if not (value_Q[0] >= 0 and value_Q[-1] <= 1):
        raise DataError(f"set {name!r} has values from {value_Q[0]:g} to {value_Q[-1]:g}; expected values from 0 to 1")
    variance = float(value_Q.var(ddof=1)) if value_Q.size > 1 else 0.25
    yield _Set(weight, float(value_Q.mean()), variance, value_Q.size)
