"""Which items of a batch are embedded together: chunks that hold little padding, and not more tokens than a budget allows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# What a chunk costs besides its tokens, as a share of the budget. The budget that is tried out (probe.py) is the smallest at which twice as
# many tokens would run less than 3 % faster, so about this share of a full chunk's time does not depend on its tokens.
FIXED = 1 / 32


def tokens_laid_out(lengths: Sequence[int], packed: bool = False) -> int:
    """Tokens that a chunk of items of these `lengths` takes: with padding (longest x count), or their own where it is packed."""
    return sum(lengths) if packed else max(lengths) * len(lengths)


def plan_chunks(lengths: Sequence[int], budget: int, packed: bool = False) -> list[list[int]]:
    """Group item indices so that each group takes at most `budget` tokens, as `tokens_laid_out` counts them.

    Longest first; sorted by length, so that little is padded, and that items of one length are neighbours. An item longer than the budget
    gets a chunk of its own. Ties keep the input order: the plan is a pure function of its arguments.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    tokens = np.array([lengths[index] for index in order], dtype=np.int64)
    sizes = _filled(tokens, budget) if packed else _least_padded(tokens, budget)
    stops = np.cumsum(sizes, dtype=np.int64)
    return [order[stop - size : stop] for size, stop in zip(sizes, stops, strict=True)]


def _filled(tokens_I: np.ndarray, budget: int) -> list[int]:
    """Sizes of packed chunks of items in this order: each takes what fits."""
    sizes: list[int] = []
    room = 0
    for tokens in tokens_I.tolist():
        if sizes and tokens <= room:
            sizes[-1] += 1
        else:
            sizes.append(1)
            room = budget
        room -= tokens
    return sizes


def _least_padded(tokens_I: np.ndarray, budget: int) -> list[int]:
    """Sizes of padded chunks of items from long to short, with the least padded tokens, and chunks as `FIXED` weighs them.

    The best cut of the items from I on is the best first chunk and the best cut of what follows (dynamic programming); of equal ones the
    one with the larger first chunk. Costs are whole numbers, so that no rounding decides.
    """
    count = len(tokens_I)
    fixed = int(FIXED * budget)
    cost = np.zeros(count + 1, dtype=np.int64)  # of the items from an index on
    size = np.ones(count, dtype=np.int64)  # of the first chunk of that cut
    upto = np.arange(1, count + 1)
    for first in range(count - 1, -1, -1):
        longest = int(tokens_I[first])
        largest = min(max(1, budget // longest), count - first)
        costs = longest * upto[:largest] + cost[first + 1 : first + 1 + largest]
        size[first] = largest - int(costs[::-1].argmin())
        cost[first] = fixed + costs[size[first] - 1]
    sizes, first = [], 0
    while first < count:
        sizes.append(int(size[first]))
        first += sizes[-1]
    return sizes
