"""Chunks hold each item once, within the budget where that is possible; padding goes to the side asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm2vec.collate import Features, join_tokens, pad_tokens, plan_chunks, tokens_laid_out


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


def test_chunks_by_hand() -> None:
    assert plan_chunks([3, 10, 2, 3], budget=9) == [[1], [0, 3, 2]]
    assert plan_chunks([3, 10, 2, 3], budget=8) == [[1], [0, 3], [2]]
    assert plan_chunks([], budget=8) == []
    assert plan_chunks([3, 10, 2, 3], budget=13, packed=True) == [[1, 0], [3, 2]]
    assert plan_chunks([3, 10, 2, 3], budget=9, packed=True) == [[1], [0, 3, 2]]


def test_every_chunk_takes_as_many_as_fit() -> None:
    chunks = plan_chunks([4] * 10, budget=12)
    assert [len(chunk) for chunk in chunks] == [3, 3, 3, 1]


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [
        ("right", [[5, 6, 7], [8, 9, 9], [9, 9, 9]], [[1, 1, 1], [1, 0, 0], [0, 0, 0]]),
        ("left", [[5, 6, 7], [9, 9, 8], [9, 9, 9]], [[1, 1, 1], [0, 0, 1], [0, 0, 0]]),
    ],
)
def test_pad_tokens(side: str, ids: list[list[int]], mask: list[list[int]]) -> None:
    rows = [torch.tensor([5, 6, 7]), torch.tensor([8]), torch.tensor([], dtype=torch.long)]
    input_ids, attention_mask = pad_tokens(rows, pad_id=9, side=side)
    assert input_ids.tolist() == ids
    assert attention_mask.tolist() == mask
    assert input_ids.dtype == attention_mask.dtype == torch.long


def test_join_tokens() -> None:
    input_ids, attention_mask = join_tokens([torch.tensor([5, 6, 7]), torch.tensor([8]), torch.tensor([9, 9])])
    assert input_ids.tolist() == [[5, 6, 7, 8, 9, 9]]
    assert attention_mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert input_ids.dtype == attention_mask.dtype == torch.long


def test_length_of_features_is_their_tokens() -> None:
    assert len(Features(torch.arange(7))) == 7
