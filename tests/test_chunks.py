"""Chunks hold each item once, within the budget where that is possible, and no cut of the sorted items pads less."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm2vec.chunks import FIXED, plan_chunks, tokens_laid_out


@given(lengths=st.lists(st.integers(1, 50), max_size=60), budget=st.integers(1, 200), packed=st.booleans())
def test_chunks_partition_the_items_within_the_budget(lengths: list[int], budget: int, packed: bool) -> None:
    chunks = plan_chunks(lengths, budget, packed)
    assert sorted(index for chunk in chunks for index in chunk) == list(range(len(lengths)))
    for chunk in chunks:
        tokens = [lengths[index] for index in chunk]
        assert tokens_laid_out(tokens, packed) == (sum(tokens) if packed else len(chunk) * max(tokens))
        assert tokens_laid_out(tokens, packed) <= budget or len(chunk) == 1


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60), budget=st.integers(1, 200), packed=st.booleans())
def test_chunks_come_longest_first_and_ties_in_input_order(lengths: list[int], budget: int, packed: bool) -> None:
    flat = [index for chunk in plan_chunks(lengths, budget, packed) for index in chunk]
    assert flat == sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))


def cost(lengths: list[int], chunks: list[list[int]], budget: int) -> int:
    """Padded tokens and a fixed part of each chunk."""
    return sum(tokens_laid_out([lengths[index] for index in chunk]) + int(FIXED * budget) for chunk in chunks)


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=9), budget=st.integers(1, 400))
def test_no_cut_costs_less(lengths: list[int], budget: int) -> None:
    """Every way to cut the sorted items, tried one by one."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    inner = range(1, len(order))
    every = [[0, *cuts, len(order)] for count in range(len(order)) for cuts in combinations(inner, count)]
    plans = [[order[start:stop] for start, stop in zip(cuts, cuts[1:], strict=False)] for cuts in every]
    legal = [plan for plan in plans if all(len(rows) == 1 or tokens_laid_out([lengths[row] for row in rows]) <= budget for rows in plan)]
    assert cost(lengths, plan_chunks(lengths, budget), budget) == min(cost(lengths, plan, budget) for plan in legal)


def test_chunks_by_hand() -> None:
    assert plan_chunks([3, 10, 2, 3], budget=40) == [[1], [0, 3, 2]]  # a chunk counts as one token: dearer than none, cheaper than two
    assert plan_chunks([3, 10, 2, 3], budget=8) == [[1], [0, 3], [2]]
    assert plan_chunks([], budget=8) == []
    assert plan_chunks([3, 10, 2, 3], budget=13, packed=True) == [[1, 0], [3, 2]]
    assert plan_chunks([3, 10, 2, 3], budget=9, packed=True) == [[1], [0, 3, 2]]


@pytest.mark.parametrize("packed", [False, True])
def test_of_equal_items_the_first_chunks_are_full(packed: bool) -> None:
    assert [len(chunk) for chunk in plan_chunks([4] * 10, 12, packed)] == [3, 3, 3, 1]


def test_one_long_item_pads_no_short_ones() -> None:
    """Full chunks would put short items beside the long one: 100 + 9 x 10 tokens in one chunk of 1,000 padded ones."""
    lengths = [100] + [10] * 9
    assert plan_chunks(lengths, budget=1024) == [[0], list(range(1, 10))]
    assert plan_chunks(lengths, budget=10**6) == [list(range(10))]  # where starting a chunk costs more than all padding
