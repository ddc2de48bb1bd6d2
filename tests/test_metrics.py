"""Metrics against trec_eval, pencil results and a plain reading of their definitions; intervals against pencil results and simulation."""

from __future__ import annotations

from collections.abc import Callable
from math import log2

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm2vec.errors import DataError, InputError
from vlm2vec.metrics import METRICS, interval, per_query, wilson
from vlm2vec.ranking import TIES, rank

CUTS = (1, 3, 5, 10, 100)
POSITIONS, GRADES = [[1], [4, 2], [3, 9, 1]], [[1], [1, 3], [2, 1, 1]]


# -- metrics -----------------------------------------------------------------------------------------------------------------------------


def random_rankings(seed: int, queries: int = 60, candidates: int = 40) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Positions of one to twelve relevant candidates each, and their grades, 1 to 3."""
    stream = np.random.default_rng(seed)
    sizes = stream.integers(1, 13, queries)
    return [1 + stream.permutation(candidates)[:size] for size in sizes], [stream.integers(1, 4, size) for size in sizes]


def trec_eval(positions: list, grades: list, measure: str, k: int, keep: int | None = None) -> np.ndarray:
    """`measure` of trec_eval per query, over runs of 40 documents cut to the first `keep`; document p is the one at position p."""
    judged = {str(q): {str(p): int(g) for p, g in zip(*row, strict=True)} for q, row in enumerate(zip(positions, grades, strict=True))}
    runs = {str(q): {str(p): -float(p) for p in range(1, min(keep or 40, 40) + 1)} for q in range(len(positions))}
    name = measure if keep else f"{measure}.{k}"
    found = pytrec_eval.RelevanceEvaluator(judged, {name}).evaluate(runs)
    return np.array([found[str(q)][name.replace(".", "_")] for q in range(len(positions))])


@pytest.mark.parametrize("k", CUTS)
def test_metrics_are_those_of_trec_eval(k: int) -> None:
    positions, grades = random_rankings(seed=k)
    count_Q = np.array([len(row) for row in positions])

    def measure(name: str) -> np.ndarray:
        return trec_eval(positions, grades, name, k)

    precision, recall = measure("P"), measure("recall")
    expected = {
        "hit": measure("success"),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / np.maximum(precision + recall, 1e-300),
        "map": measure("map_cut") * count_Q / np.minimum(count_Q, k),  # trec_eval divides by all relevant ones
        "mrr": trec_eval(positions, grades, "recip_rank", k, keep=k),
        "ndcg_linear": measure("ndcg_cut"),
        "ndcg_exponential": trec_eval(positions, [2**row - 1 for row in grades], "ndcg_cut", k),
    }
    assert expected.keys() == METRICS.keys()
    for name, value_Q in expected.items():
        found_Q = per_query(f"{name}@{k}", positions, grades)
        assert found_Q.dtype == np.float64 and found_Q.min() >= 0 and found_Q.max() <= 1
        np.testing.assert_allclose(found_Q, value_Q, atol=1e-12, err_msg=name)


def test_from_embeddings_to_the_values_of_trec_eval() -> None:
    stream = np.random.default_rng(0)
    query, target = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (stream.normal(size=(n, 24)) for n in (25, 80)))
    relevant = [stream.choice(80, 4, replace=False) for _ in range(25)]
    grades = [stream.integers(1, 5, 4) for _ in range(25)]
    found = rank(query, target, None, relevant, grades)
    judged = {str(q): dict(zip(map(str, relevant[q]), grades[q].tolist(), strict=True)) for q in range(25)}
    runs = {str(q): {str(n): float(score) for n, score in enumerate(target @ query[q])} for q in range(25)}
    values = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10"}).evaluate(runs)
    expected = [values[str(q)]["ndcg_cut_10"] for q in range(25)]
    np.testing.assert_allclose(per_query("ndcg_linear@10", found.position_QR, grades), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hit@1", [1, 0, 1]),
        ("precision@1", [1, 0, 1]),
        ("hit@3", [1, 1, 1]),
        ("precision@3", [1 / 3, 1 / 3, 2 / 3]),
        ("recall@3", [1, 1 / 2, 2 / 3]),
        ("f1@3", [1 / 2, 2 / 5, 2 / 3]),
        ("map@3", [1, 1 / 4, (1 + 2 / 3) / 3]),
        ("map@1", [1, 0, 1]),
        ("mrr@3", [1, 1 / 2, 1]),
        ("mrr@1", [1, 0, 1]),
        ("ndcg_linear@3", [1, (3 / log2(3)) / (3 + 1 / log2(3)), (1 + 2 / 2) / (2 + 1 / log2(3) + 1 / 2)]),
        ("ndcg_exponential@3", [1, (7 / log2(3)) / (7 + 1 / log2(3)), (1 + 3 / 2) / (3 + 1 / log2(3) + 1 / 2)]),
        ("ndcg_linear@1", [1, 0, 1 / 2]),
    ],
)
def test_by_hand(name: str, expected: list[float]) -> None:
    assert per_query(name, POSITIONS, GRADES).tolist() == pytest.approx(expected, abs=1e-15)


def naive(family: str, order: list[int], grade: dict[int, int], k: int) -> float:
    """A metric over a sorted list of candidates, by its definition."""
    found = [place for place, index in enumerate(order[:k], start=1) if index in grade]
    gain = {"ndcg_linear": lambda g: g, "ndcg_exponential": lambda g: 2**g - 1}.get(family)
    if gain:
        dcg, ideal = (sum(gain(g) / log2(p + 1) for p, g in enumerate(row[:k], 1))
                      for row in ([grade.get(i, 0) for i in order], sorted(grade.values(), reverse=True)))  # fmt: skip
        return dcg / ideal
    precision, recall = len(found) / k, len(found) / len(grade)
    return {
        "hit": float(bool(found)),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if found else 0.0,
        "map": sum(seen / place for seen, place in enumerate(found, 1)) / min(len(grade), k),
        "mrr": 1 / found[0] if found else 0.0,
    }[family]


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("family", METRICS)
def test_ties_against_a_naive_scorer(family: str, ties: str) -> None:
    """Two numbers of +-1 per embedding: 30 candidates have three scores."""
    stream = np.random.default_rng(1)
    query, target = (stream.choice([-1, 1], size=(count, 2)) for count in (40, 30))
    relevant = [stream.choice(30, stream.integers(1, 6), replace=False) for _ in range(40)]
    grades = [stream.integers(1, 4, len(row)) for row in relevant]
    found = rank(query * 0.5**0.5, target * 0.5**0.5, None, relevant, grades, ties)
    for k in (1, 3, 10):
        expected = []
        for q in range(40):
            grade = dict(zip(relevant[q].tolist(), grades[q].tolist(), strict=True))
            order = sorted(
                range(30), key=lambda n, q=q, grade=grade: (-int(query[q] @ target[n]), (ties == "pessimistic") * grade.get(n, 0), n)
            )
            expected.append(naive(family, order, grade, k))
        assert per_query(f"{family}@{k}", found.position_QR, grades) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("family", METRICS)
def test_a_constant_embedder_scores_zero(family: str) -> None:
    rows = np.repeat(np.float32([[0.6, 0.8]]), 50, 0)
    for candidates in (None, [np.arange(50)] * 50):
        found = rank(rows, rows, candidates, np.arange(50)[:, None], np.ones((50, 1)))
        assert not per_query(f"{family}@10", found.position_QR, np.ones((50, 1))).any()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), family=st.sampled_from(list(METRICS)), k=st.integers(1, 50))
def test_values_belong_to_the_query_and_do_not_depend_on_order(seed: int, family: str, k: int) -> None:
    positions, grades = random_rankings(seed, queries=8)
    expected = per_query(f"{family}@{k}", positions, grades)
    stream = np.random.default_rng(seed)
    shuffles = [stream.permutation(len(row)) for row in positions]
    for q in stream.permutation(8):
        assert per_query(f"{family}@{k}", [positions[q][shuffles[q]]], [grades[q][shuffles[q]]]) == expected[q]


@pytest.mark.parametrize(
    "name", ["hit", "hit@0", "hit@-1", "hit@1.0", "hit@", "hit@01", "hit@²", "hit@٥", "accuracy@1", "ndcg@5", "", "@1"]
)
def test_unknown_metrics_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="unknown metric .*expected hit, precision, .* with a cut-off, as in hit@1"):
        per_query(name, POSITIONS, GRADES)


@pytest.mark.parametrize(
    ("positions", "grades", "message"),
    [
        ([], [], "0 lists of positions and 0 of grades"),
        ([[1]], [[1], [1]], "1 lists of positions and 2 of grades"),
        ([[1], []], [[1], []], "query 1: 0 positions with 0 grades"),
        ([[1], [1, 2]], [[1], [1]], "query 1: 2 positions with 1 grades"),
        ([[1], [0]], [[1], [1]], "query 1: position 0 with grade 1"),
        ([[1, 2], [1]], [[1, 0], [1]], "query 0: position 2 with grade 0"),
        ([[1]], [[np.nan]], "query 0: position 1 with grade nan"),
        ([[1], [3]], [[1], [np.inf]], "query 1: position 3 with grade inf"),
    ],
)
def test_lists_that_cannot_be_scored_are_refused(positions: list, grades: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        per_query("hit@1", positions, grades)


# -- intervals ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "queries", "expected"),
    [(0, 10, (0, 0.2775)), (1, 10, (0.0179, 0.4042)), (81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0, 0.1611))],
)
def test_hits_of_one_set_have_the_interval_of_wilson(hits: int, queries: int, expected: tuple[float, float]) -> None:
    """Textbook values: three of them are in Newcombe (1998), table I."""
    assert interval(np.arange(queries) < hits) == pytest.approx(expected, abs=5e-5)
    assert interval(np.arange(queries) >= hits) == pytest.approx((1 - expected[1], 1 - expected[0]), abs=5e-5)
    assert interval(np.arange(queries) < hits) == pytest.approx(wilson(hits / queries, queries), abs=1e-12)


def test_many_graded_values_have_the_normal_interval() -> None:
    value_Q = np.random.default_rng(2).beta(2, 3, size=4000)
    error = value_Q.std(ddof=1) / 4000**0.5
    assert interval(value_Q) == pytest.approx((value_Q.mean() - 1.96 * error, value_Q.mean() + 1.96 * error), abs=0.01 * error)


def test_interval_of_a_mean_takes_its_spread_from_within_the_sets() -> None:
    """Sets that differ widely add nothing; k sets shrink the interval by the square root of k."""
    half = np.arange(400) < 200
    apart = {"a": np.arange(400) < 4, "b": np.arange(400) >= 4}
    assert np.diff(interval(apart))[0] < np.diff(interval({"a": half, "b": half}))[0] / 4
    sixteen = interval({str(k): half for k in range(16)})
    assert np.diff(interval(half))[0] / np.diff(sixteen)[0] == pytest.approx(4, rel=0.01)
    assert sum(sixteen) == pytest.approx(1)


def test_interval_of_groups_weighs_groups_equally() -> None:
    stream = np.random.default_rng(3)
    small, large = stream.random(30) < 0.8, {name: stream.random(60) < 0.1 for name in "bcd"}
    low, high = interval({"small": {"a": small}, "large": large})
    mean = (small.mean() + np.mean([row.mean() for row in large.values()])) / 2
    error = (small.var(ddof=1) / 30 / 4 + sum(row.var(ddof=1) / 60 / 36 for row in large.values())) ** 0.5
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.1 * error)
    assert interval({"only": {"a": small}}) == interval({"a": small}) == interval(small)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_nothing_but_hits_is_no_certainty(value: float) -> None:
    """Queries count as trials then, over all sets."""
    assert interval([value] * 50) == wilson(value, 50)
    low, high = interval({"a": [value] * 40, "b": [value] * 40})
    assert (low, high) == pytest.approx(wilson(value, 80)) and low <= value <= high and high - low > 0.04


def test_equal_values_are_no_certainty() -> None:
    low, high = interval([0.1] * 50)
    assert low < 0.095 and high > 0.105


def test_single_queries_tell_no_spread() -> None:
    low, high = interval({str(k): [k % 2] for k in range(36)})
    assert low < 0.36 and high > 0.64


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=8), min_size=1, max_size=5))
def test_the_mean_lies_within_and_order_does_not_matter(sets: list[list[float]]) -> None:
    named = {str(index): values for index, values in enumerate(sets)}
    low, high = interval(named)
    mean = np.mean([np.mean(values) for values in sets])
    assert 0 <= low <= mean + 1e-12 and mean - 1e-12 <= high <= 1 and high > low
    assert interval({name: values[::-1] for name, values in reversed(named.items())}) == (low, high)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a": [1.0], "b": []}, "set 'b' has no query"),
        ({}, "group 'values' has no set"),
        ({"retrieval": {}}, "group 'retrieval' has no set"),
        ({"a": [0, 1.5]}, r"set 'a' has values from 0 to 1\.5; expected values from 0 to 1"),
        ([-1.0], "set 'values' has values from -1 to -1"),
        ([0.5, np.nan], "set 'values' has values from 0.5 to nan"),
    ],
)
def test_what_has_no_interval(values: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        interval(values)  # type: ignore[arg-type]


Draw = Callable[[np.random.Generator, float, int], np.ndarray]


def hits(stream: np.random.Generator, mean: float, queries: int) -> np.ndarray:
    return stream.random(queries) < mean


def reciprocal_ranks(stream: np.random.Generator, mean: float, queries: int) -> np.ndarray:
    """Graded values with mass at 0 and 1: 1, 1/2, 1/3, 1/5 or 0."""
    levels = np.array([1, 1 / 2, 1 / 3, 1 / 5, 0])
    between = min(mean, 1 - mean)  # share of values that are neither 0 nor 1
    share = np.array([0, between / 3, between / 3, between / 3, 0])
    share[0] = mean - share @ levels
    share[4] = 1 - share.sum()
    return stream.choice(levels, queries, p=share)


def coverage(draw: Draw, sets: int, queries: int, means: np.ndarray, trials: int) -> float:
    """How often the interval of a mean over sets holds the true mean, in %, averaged over true means."""
    stream = np.random.default_rng([sets, queries, round(1000 * means.mean())])
    held = 0
    for trial in range(trials):
        mean = float(means[trial % len(means)])
        low, high = interval({str(k): draw(stream, mean, queries) for k in range(sets)})
        held += low <= mean <= high
    return 100 * held / trials


@pytest.mark.parametrize("mean", [0.02, pytest.param(0.5, marks=pytest.mark.slow), 0.9])
@pytest.mark.parametrize(("sets", "queries"), [(1, 50), (1, 200), (1, 1000), (4, 50), (12, 20)])
@pytest.mark.parametrize("draw", [hits, reciprocal_ranks])
def test_95_of_100_intervals_hold_the_true_mean(draw: Draw, sets: int, queries: int, mean: float) -> None:
    """Within two points. True means lie around the nominal one, as the coverage of counted hits jumps with each."""
    means = mean + 0.5 * min(mean, 1 - mean) * np.linspace(-1, 1, 25)
    assert coverage(draw, sets, queries, means, trials=1500) == pytest.approx(95, abs=2)


def test_intervals_of_groups_hold_the_true_mean_too() -> None:
    stream = np.random.default_rng(4)
    truth = {
        group: {f"{group}{k}": float(stream.uniform(0.02, 0.6)) for k in range(size)}
        for group, size in zip("abcd", (10, 10, 12, 4), strict=True)
    }
    mean = np.mean([np.mean(list(sets.values())) for sets in truth.values()])
    held = 0
    for _ in range(1000):
        low, high = interval({group: {name: hits(stream, p, 40) for name, p in sets.items()} for group, sets in truth.items()})
        held += low <= mean <= high
    assert held / 10 == pytest.approx(95, abs=2)
