"""Ranks, ties and intervals against loops, pencil results and simulation."""

from __future__ import annotations

import numpy as np
import pytest

from vlm2vec.errors import DataError, InputError, NonFiniteError
from vlm2vec.metrics import BLOCK, bootstrap_interval, precision_at_1, rank_gold, similarity

RULES = ["pessimistic", "reference"]


def random_sets(seed: int, count: int = 200) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ragged candidate lists with many ties: few distinct scores, one to three gold candidates anywhere."""
    stream = np.random.default_rng(seed)
    sizes = stream.integers(1, 12, count)
    scores = [stream.integers(0, 4, size).astype(np.float32) / 4 for size in sizes]
    golds = [np.isin(np.arange(size), stream.choice(size, min(size, int(stream.integers(1, 4))), replace=False)) for size in sizes]
    return scores, golds


def rank_by_loop(score, gold, ties: str) -> int:
    """Position of the first gold candidate after sorting: by score, then gold last (pessimistic) or by place in the list (reference)."""
    order = sorted(range(len(score)), key=lambda index: (-score[index], gold[index] if ties == "pessimistic" else index))
    return next(place for place, index in enumerate(order) if gold[index]) + 1


@pytest.mark.parametrize("ties", RULES)
def test_ranks_equal_sorting_each_list(ties):
    scores, golds = random_sets(seed=0)
    found = rank_gold(scores, golds, ties)
    expected = [rank_by_loop(score, gold, ties) for score, gold in zip(scores, golds, strict=True)]
    assert found.rank_Q.tolist() == expected
    assert found.correct_Q.tolist() == [rank == 1 for rank in expected]
    assert precision_at_1(scores, golds, ties) == found.precision_at_1 == np.mean(np.array(expected) == 1)
    best = [score[gold].max() for score, gold in zip(scores, golds, strict=True)]
    assert found.ties_Q.tolist() == [int((score[~gold] == top).sum()) for score, gold, top in zip(scores, golds, best, strict=True)]


def test_reference_rule_is_argmax():
    scores, golds = random_sets(seed=1)
    hits = [bool(gold[np.argmax(score)]) for score, gold in zip(scores, golds, strict=True)]
    assert rank_gold(scores, golds, "reference").correct_Q.tolist() == hits


def test_by_hand():
    scores = [[0.9, 0.5], [0.5, 0.5, 0.1], [0.2, 0.7, 0.7, 0.7], [0.3]]
    golds = [[1, 0], [1, 0, 0], [1, 0, 1, 0], [1]]
    pessimistic, reference = (rank_gold(scores, golds, ties) for ties in RULES)
    assert pessimistic.rank_Q.tolist() == [1, 2, 3, 1]
    assert reference.rank_Q.tolist() == [1, 1, 2, 1]
    assert pessimistic.ties_Q.tolist() == reference.ties_Q.tolist() == [0, 1, 2, 0]
    assert (pessimistic.precision_at_1, reference.precision_at_1) == (0.5, 0.75)


def test_a_collapsed_model_scores_zero():
    """All embeddings equal, 1000 candidates: 0 under our rule, 1 under the published one."""
    point = np.random.default_rng(2).normal(size=(1, 333)).astype(np.float32)
    score_QN = similarity(np.repeat(point, 20, 0), np.repeat(point, 1000, 0))
    gold_QN = np.zeros((20, 1000), dtype=bool)
    gold_QN[:, 0] = True
    assert precision_at_1(score_QN, gold_QN) == 0.0
    assert precision_at_1(score_QN, gold_QN, "reference") == 1.0


def test_order_of_candidates_and_queries_changes_nothing():
    scores, golds = random_sets(seed=3)
    stream = np.random.default_rng(4)
    expected = rank_gold(scores, golds)
    for _ in range(100):
        shuffles = [stream.permutation(len(score)) for score in scores]
        queries = stream.permutation(len(scores))
        found = rank_gold([scores[q][shuffles[q]] for q in queries], [golds[q][shuffles[q]] for q in queries])
        assert np.array_equal(found.rank_Q, expected.rank_Q[queries])
        assert np.array_equal(found.ties_Q, expected.ties_Q[queries])


def test_scores_are_compared_in_float32():
    assert precision_at_1([[0.5 + 1e-12, 0.5]], [[True, False]]) == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_scores_are_an_error_that_counts_them(bad):
    scores, golds = [[0.1, 0.2], [0.3, bad, bad], [0.4]], [[1, 0], [1, 0, 0], [1]]
    with pytest.raises(NonFiniteError, match="2 of 6 scores are NaN or infinite, first in query 1"):
        rank_gold(scores, golds)


@pytest.mark.parametrize(
    ("scores", "golds", "message"),
    [
        ([[0.1], [0.2, 0.3]], [[1], [0, 0]], "query 1 has no gold candidate"),
        ([[0.1], []], [[1], []], r"query 1: scores have shape \(0,\)"),
        ([[0.1, 0.2]], [[1]], r"query 0: scores have shape \(2,\), gold marks \(1,\)"),
        ([], [], "0 queries"),
        ([[0.1]], [], "1 queries with scores and 0 with gold marks"),
    ],
)
def test_unusable_sets_are_refused(scores, golds, message):
    with pytest.raises(DataError, match=message):
        rank_gold(scores, golds)


def test_unknown_rule_is_refused():
    with pytest.raises(InputError, match="unknown rule for ties 'expected'"):
        rank_gold([[0.1]], [[1]], "expected")


def test_similarity_is_a_float32_dot_product():
    stream = np.random.default_rng(5)
    query_QD, target_ND = stream.normal(size=(3, 17)).astype(np.float32), stream.normal(size=(BLOCK + 5, 17)).astype(np.float32)
    found = similarity(query_QD, target_ND)
    expected = [[sum(float(a) * float(b) for a, b in zip(query, target, strict=True)) for target in target_ND] for query in query_QD]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("queries", "targets"), [(1, 7), (3, 7), (1, 1003), (50, 1003)])
def test_equal_targets_score_equally_wherever_they_stand(queries, targets):
    stream = np.random.default_rng(6)
    query_QD, target_D = stream.normal(size=(queries, 384)).astype(np.float32), stream.normal(size=384).astype(np.float32)
    score_QN = similarity(query_QD, np.tile(target_D, (targets, 1)))
    assert (score_QN == score_QN[:, :1]).all()


def test_interval_of_one_set_is_that_of_plain_resampling():
    correct_Q = np.random.default_rng(7).random(150) < 0.3
    low, high = bootstrap_interval(correct_Q, samples=20000, seed=1)
    stream = np.random.default_rng(8)
    means = [correct_Q[stream.integers(0, 150, 150)].mean() for _ in range(20000)]
    assert (low, high) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.007)  # one step of the grid 1/150
    assert low < correct_Q.mean() < high


def test_interval_of_graded_scores():
    """Scores need not be 0 or 1: a normal sample has mean +- 1.96 standard errors."""
    value_Q = np.random.default_rng(9).normal(size=400)
    low, high = bootstrap_interval(value_Q, samples=20000, seed=1)
    error = value_Q.std() / 20
    assert (low, high) == pytest.approx((value_Q.mean() - 1.96 * error, value_Q.mean() + 1.96 * error), abs=0.05 * error + 1e-3)


def test_interval_of_a_mean_resamples_within_each_set():
    """Two sets of constant score have no spread, though they differ; k independent sets shrink the spread by the square root of k."""
    assert bootstrap_interval({"a": np.zeros(50), "b": np.ones(50)}) == (0.5, 0.5)
    correct_Q = np.arange(400) < 200
    one = np.diff(bootstrap_interval({"a": correct_Q}, samples=20000))[0]
    sixteen = np.diff(bootstrap_interval({str(k): correct_Q for k in range(16)}, samples=20000))[0]
    assert one / sixteen == pytest.approx(4, rel=0.05)


def test_interval_of_groups_weighs_groups_equally():
    nested = {"small": {"a": np.ones(10)}, "large": {"b": np.zeros(10), "c": np.zeros(30), "d": np.zeros(5)}}
    assert bootstrap_interval(nested) == (0.5, 0.5)


def test_intervals_are_deterministic_and_belong_to_the_set():
    sets = {"a": np.arange(100) < 40, "b": np.arange(300) < 90}
    assert bootstrap_interval(sets, seed=5) == bootstrap_interval(dict(reversed(sets.items())), seed=5)
    assert bootstrap_interval({"a": sets["a"]}, seed=5) != bootstrap_interval({"a": sets["a"]}, seed=6)
    assert bootstrap_interval(sets["a"][::-1], seed=5) == bootstrap_interval(sets["a"], seed=5)


@pytest.mark.parametrize("sets", [1, 4])
def test_interval_covers_the_truth_about_95_times_in_100(sets):
    """2000 simulated evaluations of 200 queries at a true score of 0.6: 95 % +- 2 points, four standard errors of the simulation."""
    stream = np.random.default_rng(10)
    covered = 0
    for trial in range(2000):
        data = {str(k): stream.random(200) < 0.6 for k in range(sets)}
        low, high = bootstrap_interval(data, samples=500, seed=trial)
        covered += low <= 0.6 <= high
    assert covered / 2000 == pytest.approx(0.95, abs=0.02)


def test_an_empty_set_has_no_interval():
    with pytest.raises(DataError, match="set 'b' has no query"):
        bootstrap_interval({"a": [1.0], "b": []})
