"""Paired tests and intervals against closed forms, full enumeration, scipy and simulated worlds in which the truth is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from vlm2vec.paired import Sample, holm, interval, mean_p_value, p_value, sign_test

Array = NDArray[np.float64]


def flips(won: int, lost: int, same: int = 0, name: str = "set", weight: float = 1.0) -> Sample:
    return Sample(name, np.array([1.0] * won + [-1.0] * lost + [0.0] * same), weight)


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (5, 0), (3, 4), (10, 2), (60, 40), (700, 500)])
def test_hits_have_the_exact_binomial_p_value(won: int, lost: int) -> None:
    both = [math.comb(won + lost, count) for count in range(won + lost + 1)]
    closed = sum(ways for count, ways in enumerate(both) if abs(2 * count - won - lost) >= abs(won - lost)) / 2 ** (won + lost)
    assert sign_test(won, lost) == p_value(flips(won, lost, 100)) == pytest.approx(closed, rel=1e-12)
    assert sign_test(won, lost) == sign_test(lost, won)


def test_hits_agree_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for won, lost in [(3, 11), (50, 31), (400, 350)]:
        assert sign_test(won, lost) == pytest.approx(stats.binomtest(won, won + lost).pvalue, rel=1e-9)


def test_few_real_differences_are_enumerated() -> None:
    values = np.array([0.5, -0.25, 0.125, 0.3, 0.3, -0.7])
    sums = [abs(sum(sign * value for sign, value in zip(signs, values, strict=True))) for signs in itertools.product((1, -1), repeat=6)]
    expected = np.mean([total >= abs(values.sum()) - 1e-9 for total in sums])
    assert p_value(Sample("x", np.append(values, [0.0] * 20))) == pytest.approx(expected)


def test_many_real_differences_agree_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(3).normal(0.03, 0.2, 80)
    settings = {"permutation_type": "samples", "n_resamples": 20_000, "alternative": "two-sided", "rng": np.random.default_rng(0)}
    theirs = stats.permutation_test((values, np.zeros(80)), lambda first, second: np.mean(first - second), **settings).pvalue
    assert p_value(Sample("x", values), draws=20_000) == pytest.approx(theirs, abs=0.015)


def test_signs_of_real_values_and_of_hits_are_drawn_alike() -> None:
    """The same flips, once as hits and once spoilt by a tiny real difference, which takes the general way."""
    hits, real = flips(60, 40, 400), Sample("set", np.append(flips(60, 40, 399).difference_Q, 1e-6))
    assert mean_p_value([hits]) == pytest.approx(sign_test(60, 40), abs=0.01)
    assert mean_p_value([real]) == pytest.approx(sign_test(60, 40), abs=0.01)


def test_nothing_differs() -> None:
    assert p_value(flips(0, 0, 50)) == 1.0 == mean_p_value([flips(0, 0, 50), flips(0, 0, 5)])
    low, high = interval([flips(0, 0, 50)])
    assert low == -high and 0 < high < 0.06


def test_a_mean_can_differ_where_no_set_does() -> None:
    sets = [flips(12, 6, 100, name=str(index), weight=1 / 20) for index in range(20)]
    assert all(p_value(Sample(each.name, each.difference_Q)) > 0.2 for each in sets)
    assert mean_p_value(sets) < 0.001


def test_sets_of_a_mean_weigh_the_same_whatever_their_size() -> None:
    """One large set that rises and one small set that falls as far: the mean stands still."""
    small, large = flips(0, 20, 80, "small", 0.5), flips(200, 0, 800, "large", 0.5)
    low, high = interval([small, large])
    assert low + high == pytest.approx(0.0, abs=1e-12)
    assert mean_p_value([small, large]) == pytest.approx(1.0)


def test_equal_arguments_give_equal_numbers_in_any_order() -> None:
    values = np.random.default_rng(0).normal(0.02, 0.2, (2, 60))
    first, second = Sample("a", values[0], 0.5), Sample("b", values[1], 0.5)
    assert mean_p_value([first, second]) == mean_p_value([second, first]) != mean_p_value([first, second], seed=1)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def worlds(better: float, worse: float, count: int, trials: int, seed: int) -> Array:
    """Differences of hits (trials, count) where a query gets better or worse with these probabilities."""
    return np.random.default_rng(seed).choice([1.0, -1.0, 0.0], p=[better, worse, 1 - better - worse], size=(trials, count))


def test_false_positives_of_a_set_are_one_in_twenty() -> None:
    rate = np.mean([p_value(Sample("x", row)) < 0.05 for row in worlds(0.15, 0.15, 1000, 3000, 1)])
    assert 0.03 <= rate <= 0.06, rate
    few = np.mean([p_value(Sample("x", row)) < 0.05 for row in worlds(0.005, 0.005, 1000, 3000, 2)])
    assert few <= 0.05, few  # ten flips: the exact test is coarse, hence careful


def test_false_positives_of_real_values_and_of_means_are_one_in_twenty() -> None:
    stream = np.random.default_rng(5)
    real = np.mean([p_value(Sample("x", stream.standard_t(3, 100) / 20), draws=499, seed=trial) < 0.05 for trial in range(1500)])
    assert 0.03 <= real <= 0.07, real
    sets = worlds(0.05, 0.05, 100 * 12, 1500, 7).reshape(1500, 12, 100)
    means = [
        mean_p_value([Sample(str(index), row, 1 / 12) for index, row in enumerate(world)], draws=499, seed=trial) < 0.05
        for trial, world in enumerate(sets)
    ]
    assert 0.03 <= np.mean(means) <= 0.07, np.mean(means)


@pytest.mark.parametrize(
    ("better", "worse", "count"),
    [(0.2, 0.1, 50), (0.05, 0.02, 200), (0.1, 0.1, 200), (0.6, 0.1, 200), (0.01, 0.01, 1000), (0.05, 0.0, 1000), (0.2, 0.1, 1000)],
)
def test_intervals_hold_the_truth_nineteen_times_in_twenty(better: float, worse: float, count: int) -> None:
    ends = np.array([interval([Sample("x", row)]) for row in worlds(better, worse, count, 3000, 11)])
    held = np.mean((ends[:, 0] <= better - worse) & (better - worse <= ends[:, 1]))
    assert 0.93 <= held <= 0.97, held


def test_intervals_of_rare_flips_are_wide_rather_than_wrong() -> None:
    ends = np.array([interval([Sample("x", row)]) for row in worlds(0.002, 0.001, 1000, 2000, 12)])
    assert np.mean((ends[:, 0] <= 0.001) & (ends[:, 1] >= 0.001)) >= 0.95


def test_intervals_of_means_and_of_real_values_hold_the_truth() -> None:
    sets = worlds(0.05, 0.02, 200 * 36, 800, 13).reshape(800, 36, 200)
    ends = np.array([interval([Sample(str(index), row, 1 / 36) for index, row in enumerate(world)]) for world in sets])
    held = np.mean((ends[:, 0] <= 0.03) & (ends[:, 1] >= 0.03))
    assert 0.93 <= held <= 0.97, held
    real = np.random.default_rng(14).normal(0.02, 0.2, (2000, 500))
    ends = np.array([interval([Sample("x", row)]) for row in real])
    held = np.mean((ends[:, 0] <= 0.02) & (ends[:, 1] >= 0.02))
    assert 0.93 <= held <= 0.97, held
