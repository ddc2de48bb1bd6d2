"""Exact search against a float64 product with every row, on rows that are made to be hard to tell apart."""

from __future__ import annotations

import numpy as np
import pytest

from vlm2vec import nearest as module
from vlm2vec.errors import NonFiniteError
from vlm2vec.nearest import nearest


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def brute(rows: np.ndarray, query: np.ndarray, top: int, dead: np.ndarray | None = None) -> tuple[list[int], list[float]]:
    """By sorting all scores in float64, one product at a time."""
    scores = [float(np.sum(row.astype(np.float64) * query.astype(np.float64))) for row in rows]
    alive = [index for index in range(len(rows)) if dead is None or not dead[index]]
    order = sorted(alive, key=lambda index: (-scores[index], index))[:top]
    return order, [scores[index] for index in order]


def hard(count: int, dims: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows within `spread` of one another, below what float32 sums can tell apart, and queries near them."""
    draw = np.random.default_rng(0)
    centre = draw.normal(size=dims)
    rows = unit(centre / np.linalg.norm(centre) + spread * draw.normal(size=(count, dims)))
    return rows, unit(rows[:20] + 0.1 * draw.normal(size=(20, dims)))


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("top", [1, 10, 299, 300, 1000])
def test_the_rows_and_the_order_of_float64(spread: float, top: int) -> None:
    rows, queries = hard(300, 96, spread)
    for query, (index, score) in zip(queries, nearest(rows, queries, top), strict=True):
        assert (index.tolist(), score.tolist()) == brute(rows, query, top)


def test_float32_alone_would_be_wrong_here() -> None:
    """The rows are as hard as they are said to be."""
    rows, queries = hard(300, 96, 1e-5)
    plain = [np.argsort(-(rows @ query), kind="stable")[:10].tolist() for query in queries]
    assert sum(found != brute(rows, query, 10)[0] for found, query in zip(plain, queries, strict=True)) > 5


def test_queries_alone_and_together_give_the_same_bits() -> None:
    rows, queries = hard(500, 64, 1e-4)
    together = nearest(rows, np.concatenate([queries] * 2), 7)
    for position, query in enumerate([*queries, *queries]):
        [(index, score)] = nearest(rows, query[None], 7)
        assert np.array_equal(index, together[position][0]) and np.array_equal(score, together[position][1])


def test_ties_go_to_the_lower_row_and_dead_rows_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE", 3)
    rows = unit(np.random.default_rng(1).normal(size=(40, 16)))
    rows[[5, 11, 30]] = rows[20]
    dead = np.zeros(40, bool)
    dead[[5, 0, 39]] = True
    [(index, score)] = nearest(rows, rows[20:21], 4, dead)
    assert index.tolist() == [11, 20, 30, brute(rows, rows[20], 4, dead)[0][3]] and score[0] == score[1] == score[2]
    [(index, _)] = nearest(rows, rows[20:21], 1000, dead)
    assert index.tolist() == brute(rows, rows[20], 1000, dead)[0] and len(index) == 37


def test_a_bound_that_is_too_small_is_caught_by_the_hard_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is what makes it exact: without it some of the true best are lost."""
    rows, queries = hard(300, 96, 1e-5)
    monkeypatch.setattr(module, "_slack", lambda dims: 0.0)
    found = nearest(rows, queries, 10)
    assert any(index.tolist() != brute(rows, query, 10)[0] for query, (index, _) in zip(queries, found, strict=True))


def test_the_bound_holds_for_any_order_of_summation() -> None:
    """Float32 sums in the worst order, of all products positive, one after the other."""
    dims = 4096
    row = unit(np.abs(np.random.default_rng(2).normal(size=(1, dims))))[0]
    summed = np.float32(0)
    for number in np.sort(row * row)[::-1]:
        summed += number
    assert 0 < abs(float(summed) - float(np.sum(row.astype(np.float64) ** 2))) <= module._slack(dims) / 2


def test_nothing_is_ranked_with_a_row_that_is_no_number() -> None:
    rows = unit(np.random.default_rng(3).normal(size=(9, 4)))
    rows[6, 1] = np.nan
    with pytest.raises(NonFiniteError, match="row 6 or the query"):
        nearest(rows, rows[:1], 2)


def test_no_rows_and_no_queries() -> None:
    empty = np.empty((0, 4), np.float32)
    [(index, score)] = nearest(empty, np.ones((1, 4), np.float32) / 2, 5)
    assert len(index) == len(score) == 0 and nearest(empty, empty, 5) == []
