"""The order of pairs: a pure function, every pair once per epoch or in proportion to weights, in homogeneous blocks."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm2vec.data.sampler import Array, Order, _apportion, choose_rows, permutation, random_words
from vlm2vec.errors import DataError, RecipeError


def make(sizes: list[int], weights: list[float | None] | None = None, block: int = 0, batch: int = 8, seed: int = 17) -> Order:
    names = [f"source-{index}" for index in range(len(sizes))]
    return Order(names, sizes, weights or [None] * len(sizes), block, batch, seed)


def first_draws(order: Order, count: int) -> Array:
    """The first `count` draws (source, row)."""
    steps = -(-count // order.global_batch)
    return np.concatenate([order.batch(step) for step in range(steps)])[:count]


def is_whole(batch: Array, block: int) -> bool:
    """Whether a batch consists of blocks of one source each, without a repeated row."""
    blocks = batch.reshape(-1, max(1, block), 2)
    return all(len(set(rows[:, 0])) == 1 and len(set(rows[:, 1])) == len(rows) for rows in blocks)


def random_order(case: int, weighted: bool) -> Order:
    """One of the 200 configurations: 1 to 6 sources of 1 to 300 rows, any block, weight and batch."""
    rng = random.Random(case)
    block = rng.choice([0, 1, 2, 3, 4, 8, 16])
    batch = max(1, block) * rng.randint(1, 6)
    sizes = [rng.randint(1, 300) for _ in range(rng.randint(1, 6))]
    sizes[0] += batch  # never fewer pairs than one batch
    weights: list[float | None] = [rng.choice([None, 0.5, 1.0, 3.0, 0.0]) for _ in sizes] if weighted else []
    if weighted:
        weights[0] = 2.0
    return make(sizes, weights or None, block, batch, seed=case)


# -- all weights null --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(100))
def test_every_pair_occurs_once_per_epoch(case: int) -> None:
    order = random_order(case, weighted=False)
    planned = {(source, row) for source, size in enumerate(order.sizes) for row in range(size)}
    assert len(order) == len(planned)
    draws = first_draws(order, 3 * len(order)).reshape(3, len(order), 2)
    for epoch in draws:
        assert Counter(map(tuple, epoch.tolist())) == Counter(planned)


@pytest.mark.parametrize("case", range(100))
def test_all_batches_but_those_at_the_edge_of_an_epoch_are_whole_blocks(case: int) -> None:
    order = random_order(case, weighted=False)
    block, batch, epochs = max(1, order.block), order.global_batch, 3
    short = sum(size % block for size in order.sizes)
    steps = epochs * len(order) // batch
    mixed = sum(not is_whole(order.batch(step), block) for step in range(steps))
    assert mixed <= epochs * (short // batch + 3)


def test_blocks_are_whole_when_sizes_allow_it() -> None:
    order = make([64, 128, 32], block=8, batch=32)
    assert all(is_whole(order.batch(step), 8) for step in range(21))


def test_one_source_per_batch_stays_so_in_later_epochs() -> None:
    """An epoch that does not end with a batch must not push the blocks of the next one out of step."""
    order = make([1000, 1003], block=32, batch=32)
    mixed = [step for step in range(4 * len(order) // 32) if not is_whole(order.batch(step), 32)]
    assert len(mixed) <= 4 * 4


def test_epochs_are_shuffled_anew() -> None:
    order = make([40], batch=40)
    rows = [order.batch(step)[:, 1].tolist() for step in range(3)]
    assert rows[0] != rows[1] != rows[2] and rows[0] != list(range(40))


# -- weights -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(100))
def test_weighted_batches_are_whole_blocks_and_passes_have_no_repeats(case: int) -> None:
    order = random_order(case, weighted=True)
    draws = first_draws(order, order.global_batch * 150)
    blocks = draws[:, 0].reshape(-1, max(1, order.block))
    assert (blocks == blocks[:, :1]).all()
    for source, (size, share) in enumerate(zip(order.sizes, order.shares, strict=True)):
        rows = draws[draws[:, 0] == source, 1]
        assert bool(len(rows)) == bool(share) or share * len(blocks) < 3
        for start in range(0, len(rows), size):
            one_pass = rows[start : start + size]
            assert len(set(one_pass)) == len(one_pass) and max(one_pass) < size


def test_passes_go_on_from_round_to_round() -> None:
    """A round of the weighted plan has 4096 blocks; the rows of a source must not start anew with it."""
    order = make([30_000, 7_000], [3.0, 1.0], batch=512)
    draws = first_draws(order, 6 * 4096)
    for source, size in enumerate(order.sizes):
        rows = draws[draws[:, 0] == source, 1][:size]
        assert len(rows) > 4096 and len(set(rows)) == len(rows)


@given(weights=st.lists(st.integers(0, 1000), min_size=1, max_size=30).filter(any), total=st.integers(0, 5000))
def test_apportioned_counts_are_nearest_to_the_shares(weights: list[int], total: int) -> None:
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    counts = _apportion(shares, total)
    assert sum(counts) == total
    assert all(abs(count - share * total) < 1 for count, share in zip(counts, shares, strict=True))


PROPORTIONS: list[tuple[list[int], list[float | None] | None, int]] = [
    ([100_000, 49_000, 8_000, 8_000, 20_000], None, 0),
    ([100_000, 49_000, 8_000, 8_000, 20_000], None, 64),
    ([100_000, 49_000, 8_000], [1.0, 0.5, 0.5], 0),
    ([100_000, 49_000, 8_000], [1.0, 0.5, 0.5], 64),
    ([100_000, 49_000, 8_000, 300], [1.0, 0.5, None, 0.0], 32),
    ([1_000] * 23, [*[1.0] * 20, 10.0, 12.0, 5.0], 64),
    ([1_000, 2_000], [1.0, 0.001], 8),
]


@pytest.mark.parametrize(("sizes", "weights", "block"), PROPORTIONS)
@pytest.mark.parametrize("start", [0, 10_007])
def test_mixture_proportions_over_100k_draws(sizes: list[int], weights: list[float | None] | None, block: int, start: int) -> None:
    order = make(sizes, weights, block, batch=1024)
    sources = np.concatenate([order.batch(start + step)[:, 0] for step in range(98)])
    shares = np.bincount(sources, minlength=len(sizes)) / len(sources)
    assert np.abs(shares - order.shares).max() < 0.005


def test_shares() -> None:
    assert make([300, 100]).shares == [0.75, 0.25]
    assert make([300, 100], [1.0, None]).shares == [1 / 101, 100 / 101]
    assert make([300, 100], [0.0, 2.0]).shares == [0.0, 1.0]
    assert len(make([300, 100], [0.0, 2.0])) == 100


def test_every_stretch_has_the_right_mix() -> None:
    order = make([10_000] * 10, batch=100)
    for step in range(0, 1000, 37):
        counts = np.bincount(order.batch(step)[:, 0], minlength=10)
        assert counts.min() >= 8 and counts.max() <= 12


# -- purity ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("case", range(20))
def test_a_batch_depends_on_its_step_alone(case: int, weighted: bool) -> None:
    steps = list(range(60))
    in_order = {step: random_order(case, weighted).batch(step).tolist() for step in steps}
    random.Random(case).shuffle(steps)
    shuffled = random_order(case, weighted)
    assert all(shuffled.batch(step).tolist() == in_order[step] for step in steps)


@pytest.mark.parametrize("weights", [None, [1.0, 2.0]])
def test_a_copy_in_another_process_gives_the_same_far_batch(weights: list[float | None] | None) -> None:
    order = make([50, 70], weights, block=4, batch=8)
    far = order.batch(10**6)
    assert pickle.loads(pickle.dumps(order)).batch(10**6).tolist() == far.tolist()


def test_seeds_and_names_matter() -> None:
    batches = [make([100, 100], seed=seed).batch(0).tolist() for seed in (1, 2)]
    assert batches[0] != batches[1]
    assert permutation(50, 1, "a").tolist() != permutation(50, 1, "b").tolist()


def test_the_random_stream_is_pinned() -> None:
    """Literal values: another platform or numpy must give the same order, or runs could not be resumed there."""
    assert [int(word) for word in random_words(2, 17, "pass", "OK-VQA", 0)] == PINNED_WORDS
    assert permutation(12, 17, "pass", "OK-VQA", 0).tolist() == PINNED_PERMUTATION
    assert make([5, 7], block=2, batch=4).batch(2).tolist() == PINNED_BATCH
    assert make([5, 7], [1.0, 3.0], block=2, batch=4).batch(2).tolist() == PINNED_WEIGHTED


PINNED_WORDS = [936331980374229739, 4908582140472199777]
PINNED_PERMUTATION = [3, 0, 9, 4, 1, 6, 8, 2, 5, 10, 11, 7]
PINNED_BATCH = [[0, 0], [1, 3], [0, 4], [0, 3]]
PINNED_WEIGHTED = [[1, 3], [1, 4], [1, 2], [1, 3]]


# -- caps and errors ---------------------------------------------------------------------------------------------------------------------


def test_a_cap_chooses_rows_at_random_but_always_the_same() -> None:
    rows = choose_rows(1000, 100, 17, "cap", "a")
    assert len(set(rows)) == 100 and sorted(rows) == rows.tolist() and rows.max() > 900
    assert set(choose_rows(1000, 40, 17, "cap", "a")) < set(rows)
    assert set(choose_rows(1000, 100, 18, "cap", "a")) != set(rows)
    assert choose_rows(5, 9, 17).tolist() == choose_rows(5, None, 17).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sizes": [10], "block": 3}, RecipeError, r"data.block \(3\) must divide train.global_batch \(8\)"),
        ({"sizes": [10], "block": 16}, RecipeError, "must divide"),
        ({"sizes": [10], "block": -1}, RecipeError, "must divide"),
        ({"sizes": [10], "weights": [0.0]}, RecipeError, "all zero"),
        ({"sizes": [10, 10], "weights": [1.0, -1.0]}, RecipeError, "weight must be >= 0 and finite, got -1.0"),
        ({"sizes": [10], "weights": [float("nan")]}, RecipeError, "got nan"),
        ({"sizes": [10], "weights": [float("inf")]}, RecipeError, "got inf"),
        ({"sizes": [3, 4]}, DataError, "the mixture has 7 pairs, fewer than one global batch of 8"),
    ],
)
def test_settings_that_make_no_sense(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**arguments)


def test_a_weight_too_small_to_be_drawn() -> None:
    with pytest.raises(RecipeError, match="the weight of source-1 is below a millionth"):
        make([100, 100], [1.0, 1e-9]).batch(0)
