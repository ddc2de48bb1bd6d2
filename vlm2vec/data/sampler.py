"""Which rows make up which global batch, as arithmetic: `Order.batch(step)` is a pure function of the settings, the seed and the step.

Nothing is read and nothing is remembered but caches, so that every worker, every rank and every resumed run sees the same sequence.

Random numbers are the raw 64-bit words of Philox4x64-10 (Salmon et al. 2011), keyed by a sha256 of (seed, what for, source, pass), and a
permutation is the stable sort of such words. Numpy promises that stream for good, unlike the results of `Generator.permutation`.

Terms: a source's *pass* is one reshuffled run through its rows; a *block* is a run of pairs from one source; a *draw* is one place in the
endless sequence that is cut into global batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from vlm2vec.errors import DataError, RecipeError

Array = NDArray[np.int64]

_MIN_ROUND, _MAX_ROUND = 2**12, 2**20  # blocks in a round of a weighted mixture
_KEPT = 2  # passes, epochs or rounds kept: a batch may straddle two


def random_words(count: int, *key: object) -> NDArray[np.uint64]:
    """`count` random 64-bit words that depend on `key` alone."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode("utf-8", "surrogatepass")).digest()
    return np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)).random_raw(count)


def permutation(size: int, *key: object) -> Array:
    """The numbers 0..size-1 in an order that depends on `key` alone."""
    return np.argsort(random_words(size, *key), kind="stable")


def choose_rows(size: int, cap: int | None, *key: object) -> Array:
    """At most `cap` of the rows 0..size-1, ascending: a random choice that depends on `key` alone.

    A smaller cap chooses a subset of what a larger one chooses.
    """
    if cap is None or cap >= size:
        return np.arange(size)
    return np.sort(permutation(size, *key)[:cap])


@dataclass(frozen=True)
class Order:
    """The composition of every global batch of a mixture.

    `names`, `sizes` and `weights` go by source. `block` is the length of the homogeneous blocks and divides `global_batch`; 0 or 1 draws
    pairs one by one. An epoch is as many draws as the sources have rows, and the sources are spread evenly over it, with a random jitter,
    so that every stretch has the right mix.

    All weights None: every pair occurs exactly once in an epoch. A source whose size is no multiple of `block` has one shorter block per
    epoch. The shorter blocks, and as many others as it takes, fill the batches that an epoch shares with its neighbours and the last ones
    before its end; all other batches consist of whole blocks. What an epoch has left over shares a batch with the first pairs of the next:
    no pair is dropped.

    Some weight given: a source is drawn in proportion to its weight (None: its size; 0: never) and goes through its own passes, without a
    repeat inside one; every batch consists of whole blocks.

    Raises RecipeError for weights or a block that make no sense, DataError when there are fewer pairs than one global batch.
    """

    names: Sequence[str]
    sizes: Sequence[int]
    weights: Sequence[float | None]
    block: int
    global_batch: int
    seed: int
    _kept: dict[str, dict[int, Array]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.block < 0 or self.global_batch % self._block:
            raise RecipeError(f"data.block ({self.block}) must divide train.global_batch ({self.global_batch})")
        if bad := [weight for weight in self.weights if weight is not None and not 0 <= weight < float("inf")]:
            raise RecipeError(f"data.sources: a weight must be >= 0 and finite, got {bad[0]}")
        if not any(self._shares):
            raise RecipeError("data.sources: the weights are all zero; at least one must be > 0")
        if len(self) < self.global_batch:
            problem = f"the mixture has {len(self)} pairs, fewer than one global batch of {self.global_batch}"
            raise DataError(f"{problem}; lower train.global_batch or add data")

    def __len__(self) -> int:
        """Draws in an epoch; a source of weight 0 has none."""
        return sum(size for size, share in zip(self.sizes, self._shares, strict=True) if share)

    @property
    def weighted(self) -> bool:
        """Whether weights, rather than sizes alone, decide how often a source is drawn."""
        return any(weight is not None for weight in self.weights)

    @property
    def shares(self) -> list[float]:
        """Each source's share of the draws; they add up to 1."""
        return [float(share) for share in self._shares]

    def batch(self, step: int) -> Array:
        """The (source, row) of each pair in global batch `step`, counted from 0: shape (global_batch, 2)."""
        draws = np.arange(step * self.global_batch, (step + 1) * self.global_batch)
        sources, places = self._weighted(draws) if self.weighted else self._unweighted(draws)
        rows = np.empty_like(places)
        for source in np.unique(sources):
            mine = sources == source
            rows[mine] = self._rows(int(source), places[mine])
        return np.stack([sources, rows], axis=1)

    @property
    def _block(self) -> int:
        return max(1, self.block)

    @cached_property
    def _shares(self) -> list[Fraction]:
        """Exact shares, so that rounding them is the same everywhere."""
        weights = [Fraction(size if weight is None else weight) for size, weight in zip(self.sizes, self.weights, strict=True)]
        return [weight / (sum(weights) or 1) for weight in weights]

    def _cached(self, kind: str, number: int, make: Callable[[], Array]) -> Array:
        kept = self._kept.setdefault(kind, {})
        if number not in kept:
            if len(kept) >= _KEPT:
                kept.pop(next(iter(kept)))
            kept[number] = make()
        return kept[number]

    def _rows(self, source: int, places: Array) -> Array:
        """Rows of a source at `places` of its endless sequence of passes."""
        passes, indices = np.divmod(places, self.sizes[source])
        rows = np.empty_like(places)
        for number in np.unique(passes).tolist():
            mine = passes == number
            key = (self.seed, "pass", self.names[source], number)
            order = self._cached(f"pass {source}", number, partial(permutation, self.sizes[source], *key))
            rows[mine] = order[indices[mine]]
        return rows

    # -- all weights None: epochs --------------------------------------------------------------------------------------------------------

    def _unweighted(self, draws: Array) -> tuple[Array, Array]:
        """(source, place in the source's sequence) of each draw."""
        epochs, indices = np.divmod(draws, len(self))
        flat = np.empty_like(draws)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            flat[mine] = self._cached("epoch", epoch, partial(self._epoch, epoch))[indices[mine]]
        sources = np.searchsorted(self._offsets, flat, side="right") - 1
        return sources, flat - self._offsets[sources] + epochs * np.asarray(self.sizes)[sources]

    @cached_property
    def _offsets(self) -> Array:
        """First number of each source when all pairs are numbered through."""
        return np.cumsum([0, *self.sizes])[:-1]

    def _epoch(self, epoch: int) -> Array:
        """The numbers 0..len-1 in the order of the epoch: head | whole batches of whole blocks | tail.

        The head completes the batch that the epoch before left open, so that the whole blocks after it start with a batch.
        """
        block, batch = self._block, self.global_batch
        whole = np.asarray(self.sizes) // block
        order, nth = _spread(whole.tolist(), self.seed, "epoch", epoch)
        starts = self._offsets[order] + nth * block
        head = -epoch * len(self) % batch
        aligned = min(len(starts) * block, len(self) - head) // batch * (batch // block)
        loose = [np.arange(start, start + block) for start in starts[aligned:].tolist()]
        ends = self._offsets + np.asarray(self.sizes)
        loose += [np.arange(start, end) for start, end in zip((self._offsets + whole * block).tolist(), ends.tolist(), strict=True)]
        edges = np.concatenate([loose[index] for index in permutation(len(loose), self.seed, "loose", epoch).tolist()])
        middle = (starts[:aligned, None] + np.arange(block)).ravel()
        return np.concatenate([edges[:head], middle, edges[head:]])

    # -- some weight given: rounds -------------------------------------------------------------------------------------------------------

    def _weighted(self, draws: Array) -> tuple[Array, Array]:
        """(source, place in the source's sequence) of each draw."""
        blocks, inside = np.divmod(draws, self._block)
        rounds, indices = np.divmod(blocks, int(self._quotas.sum()))
        sources, nth = np.empty_like(draws), np.empty_like(draws)
        for number in np.unique(rounds).tolist():
            mine = rounds == number
            plan = self._cached("round", number, partial(_spread, self._quotas.tolist(), self.seed, "round", number))
            sources[mine], nth[mine] = plan[:, indices[mine]]
        return sources, (rounds * self._quotas[sources] + nth) * self._block + inside

    @cached_property
    def _quotas(self) -> Array:
        """Blocks of each source in a round: long enough that the rarest source has 16 or more, and rounding hides in the noise."""
        rarest = min(share for share in self._shares if share)
        length = _MIN_ROUND
        while length * rarest < 16 and length < _MAX_ROUND:
            length *= 2
        quotas = _apportion(self._shares, length)
        if starved := [name for name, share, quota in zip(self.names, self._shares, quotas, strict=True) if share and not quota]:
            raise RecipeError(f"data.sources: the weight of {starved[0]} is below a millionth of the sum; set it to 0 or raise it")
        return np.asarray(quotas, dtype=np.int64)


def _apportion(shares: Sequence[Fraction], total: int) -> list[int]:
    """Whole numbers that add up to `total`, nearest to the shares by largest remainder; equal remainders go to the first."""
    counts = [int(share * total) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: (counts[index] - shares[index] * total, index))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _spread(counts: Sequence[int], *key: object) -> Array:
    """Source `s` occurs `counts[s]` times, evenly with jitter: rows (source) and (how many of it came before) over all places.

    The i-th of n occurrences falls at a random moment of the i-th of n equal stretches of time: at any moment, a source has occurred as
    often as it should have, to within one.
    """
    sources = np.repeat(np.arange(len(counts)), counts)
    nth = np.concatenate([np.arange(count) for count in counts])
    jitter = (random_words(len(sources), *key) >> np.uint64(11)) * 2.0**-53  # exact: [0, 1) in steps of 2^-53
    moments = (nth + jitter) / np.asarray(counts)[sources]
    order = np.argsort(moments, kind="stable")
    return np.stack([sources[order], nth[order]])
