"""Padding goes to the side asked for, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from vlm2vec.collate import Features, join_tokens, pad_tokens


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
