"""Is one model better than another on the same queries? Paired tests and intervals over per-query differences, numpy only.

The null hypothesis is that the two models could be swapped query by query: every difference is as likely with the other sign (Fisher 1935).
For hits and misses that test is exact and is McNemar's; for real values and for means over sets the signs are drawn at random. Queries are
the only thing that varies: sets are held fixed, and nothing here speaks of another training run.

Shape letters: Q queries of a set, S draws.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
ENUMERATED = 13  # differences up to which all 2^n signs are tried
Z95 = 1.959963984540054
AT_ONCE = 4_000_000  # signs held in memory
ROUNDING = 1e-9  # of the largest sum that the signs can make: sums equal but for rounding count as equal


@dataclass(frozen=True)
class Sample:
    """Per-query differences of one set, and the set's weight in the mean that is asked about (1 for the set itself)."""

    name: str
    difference_Q: NDArray[np.float64]
    weight: float = 1.0


def sign_test(won: int, lost: int) -> float:
    """Two-sided exact p-value of `won` against `lost` flips: twice the smaller tail of Binomial(won + lost, 1/2), at most 1."""
    flips = won + lost
    tail = ways = 1  # of `flips` queries, how many choices of 0, of 1, ... go one way: integers, so that nothing is rounded
    for count in range(min(won, lost)):
        ways = ways * (flips - count) // (count + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**flips)


def p_value(sample: Sample, draws: int = DRAWS, seed: int = 0) -> float:
    """Two-sided p-value of one set's mean difference: exact for hits and misses and for few differences, else from `draws` random signs.

    A p-value from draws counts the observed signs among them, so it is never 0 and the test holds its level (Phipson & Smyth 2010).
    """
    moved = sample.difference_Q[sample.difference_Q != 0]
    if _is_hits(moved):
        return sign_test(int((moved > 0).sum()), int((moved < 0).sum()))
    if len(moved) <= ENUMERATED:
        signs = 1.0 - 2.0 * ((np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved))) & 1)
        return float(_reaches(signs @ moved, moved.sum(), np.abs(moved).sum()).mean())
    return mean_p_value([sample], draws, seed)


def mean_p_value(samples: Sequence[Sample], draws: int = DRAWS, seed: int = 0) -> float:
    """Two-sided p-value of the weighted mean over sets, signs drawn within each set. Deterministic: the stream of a set depends on `seed`
    and its name only. 1 where no query differs.
    """
    null_S = np.zeros(draws)
    observed = most = 0.0
    for sample in samples:
        scale = sample.weight / len(sample.difference_Q)
        moved = sample.difference_Q[sample.difference_Q != 0]
        null_S += scale * _signed_sums(moved, draws, _stream(seed, sample.name))
        observed += scale * moved.sum()
        most += abs(scale) * np.abs(moved).sum()
    return float((1 + _reaches(null_S, observed, most).sum()) / (1 + draws)) if most else 1.0


def interval(samples: Sequence[Sample]) -> tuple[float, float]:
    """95 % interval of the weighted mean difference, clipped to [-1, 1]; per-query values are taken to lie in [0, 1].

    The variance of the paired differences within each set, plus that of one more query flipped each way: the adjustment of Bonett and Price
    (2012) for paired proportions, without which few flips give far too short an interval, and no flip one of length 0.
    """
    centre = variance = extra = 0.0
    for sample in samples:
        count = len(sample.difference_Q)
        share_Q = sample.difference_Q * (sample.weight / count)
        centre += float(share_Q.sum())
        spread = float(share_Q @ share_Q) - float(share_Q.sum()) ** 2 / count
        variance += max(0.0, spread) * count / max(1, count - 1)
        extra += (sample.weight / count) ** 2
    half = Z95 * math.sqrt(variance + 2 * extra / len(samples))
    return max(-1.0, centre - half), min(1.0, centre + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number (Holm 1979): those below 0.05 are together wrong at most once in twenty times."""
    adjusted, floor = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        floor = max(floor, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = floor
    return adjusted


def _is_hits(moved: NDArray[np.float64]) -> bool:
    return bool((np.abs(moved) == 1).all())


def _reaches(sums: NDArray[np.float64], observed: float, most: float) -> NDArray[np.bool_]:
    """Which sums are at least as far from 0 as the observed one, whatever the rounding."""
    return np.abs(sums) >= abs(observed) - ROUNDING * most


def _stream(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")])


def _signed_sums(moved: NDArray[np.float64], draws: int, stream: np.random.Generator) -> NDArray:
    """Sums of the differences under random signs (S,). Flips of hits are alike, so only the number of those with a plus is drawn."""
    if _is_hits(moved):
        return 2.0 * stream.binomial(len(moved), 0.5, size=draws) - len(moved)
    sums_S = np.empty(draws)
    rows = max(1, AT_ONCE // len(moved))
    for start in range(0, draws, rows):
        here = min(rows, draws - start)
        bits = np.unpackbits(np.frombuffer(stream.bytes(-(-here * len(moved) // 8)), np.uint8), count=here * len(moved))
        sums_S[start : start + here] = moved.sum() - 2.0 * (bits.reshape(here, -1).astype(np.float64) @ moved)
    return sums_S
