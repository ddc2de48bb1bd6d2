"""The rows nearest to a query, exactly: one pass in float32 that finds who may be among them, and float64 for those.

A float32 sum of D products of unit rows, whatever its order, is within g = D u / (1 - D u) of the true one, u = 2^-24 (Higham, Accuracy and
Stability of Numerical Algorithms, equation 3.5). If the K-th best float32 score is s, then K rows have true scores of s - g at least, so
that a row among the true best K has one too, and a float32 score of s - 2 g at least. All those are scored again in float64, row by row: a
score depends on its two rows alone, equal rows score equally, and ties go to the lower row.

Shape letters: Q queries, N rows, D numbers of a row, A rows that may be among the best, K best ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vlm2vec.errors import NonFiniteError

QUERIES_AT_ONCE = 16
TILE = 8192  # rows scored again at a time
LONGEST = 1.001  # of a unit row, rounded to float32
Best = tuple[NDArray[np.int64], NDArray[np.float64]]  # rows (K,) and their scores (K,), best first


def nearest(rows_ND: NDArray[np.float32], query_QD: NDArray[np.float32], top: int, dead_N: NDArray[np.bool_] | None = None) -> list[Best]:
    """For every query the `top` unit rows of the highest dot product, fewer where there are fewer; `dead_N` marks rows to leave out.

    `rows_ND` may be a memory map: it is read once for 16 queries. Raises NonFiniteError where a row or a query is NaN or infinite.
    """
    found: list[Best] = []
    for start in range(0, len(query_QD), QUERIES_AT_ONCE):
        block_QD = query_QD[start : start + QUERIES_AT_ONCE]
        for query_D, score_N in zip(block_QD, _scores(rows_ND, block_QD), strict=True):
            found.append(among(rows_ND, query_D, _candidates(score_N, top, _slack(rows_ND.shape[1]), dead_N), top))
    return found


def among(rows_ND: NDArray[np.float32], query_D: NDArray[np.float32], index_A: NDArray[np.int64], top: int) -> Best:
    """The best `top` of the rows `index_A`, by their dot products in float64; ties go to the lower row."""
    exact_D = query_D.astype(np.float64)
    tiles = (rows_ND[index_A[start : start + TILE]].astype(np.float64) for start in range(0, len(index_A), TILE))
    score_A = np.concatenate([np.empty(0), *((tile_AD * exact_D).sum(axis=1) for tile_AD in tiles)])
    order_K = np.lexsort((index_A, -score_A))[:top]
    return index_A[order_K], score_A[order_K]


def _scores(rows_ND: NDArray[np.float32], block_QD: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """Float32 scores (N,) of each query; one query alone is a product of a matrix and a vector, which does not copy the matrix."""
    found = (rows_ND @ block_QD[0])[None] if len(block_QD) == 1 else (rows_ND @ block_QD.T).T
    for score_N in found:
        if not np.isfinite(score_N).all():
            raise NonFiniteError(f"row {int(np.argmin(np.isfinite(score_N)))} or the query is NaN or infinite; nothing was ranked")
        yield score_N


def _slack(dims: int) -> float:
    unit = dims * 2.0**-24
    return 2 * LONGEST**2 * unit / (1 - unit)


def _candidates(score_N: NDArray[np.float32], top: int, slack: float, dead_N: NDArray[np.bool_] | None) -> NDArray[np.int64]:
    """Rows that may be among the best `top`: those within `slack` of the K-th best float32 score."""
    if dead_N is not None:
        score_N = np.where(dead_N, np.float32(-np.inf), score_N)
    lowest = np.partition(score_N, -top)[-top] - slack if top < len(score_N) else -np.inf
    return np.flatnonzero((score_N >= lowest) & (score_N > -np.inf))
