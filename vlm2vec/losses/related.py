"""Which targets are related to which queries: the list of pairs (row, column) that are never negatives of one another.

Query i is related to the positives of every query that is the same item as i (i included), and to every copy of them. The list is found by
sorting ids, without a table of rows by columns; where nothing repeats it is one pair per query. A pair costs the loss and its gradient
some 70 bytes.

Shape letters: B queries, N target columns, E related pairs of a row and a column, A of a distinct query and a distinct target; K any.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Related:
    """The pairs in the order of the square tiles that cover the (B, N) scores, tiles row by row, and the part of its item that each row
    and column stands for: 1 / copies.
    """

    row_E: Tensor
    column_E: Tensor
    side: int  # of a tile
    per_tile: list[int]  # pairs
    query_part_B: Tensor
    target_part_N: Tensor
    unrelated: int  # pairs of a distinct query and a distinct target

    @classmethod
    def find(cls, positive_B: Tensor, target_id_N: Tensor, query_id_B: Tensor | None, side: int, dtype: torch.dtype) -> Related:
        """`positive_B` is the column of each query's own positive; equal ids (int64) are equal items, without `query_id_B` all queries
        differ. Parts are of type `dtype`.
        """
        if query_id_B is None:
            query_id_B = torch.arange(len(positive_B), device=positive_B.device)
        queries, query_group_B, query_copies = torch.unique(query_id_B, return_inverse=True, return_counts=True)
        targets, target_group_N, target_copies = torch.unique(target_id_N, return_inverse=True, return_counts=True)
        pair_A = torch.unique(query_group_B * len(targets) + target_group_N[positive_B])
        row_K, pair_K = _equal(query_group_B, pair_A // len(targets))
        place_E, column_E = _equal(pair_A[pair_K] % len(targets), target_group_N)
        row_E = row_K[place_E]
        down, across = (-(-count // side) for count in (len(query_id_B), len(target_id_N)))
        tile_E = row_E // side * across + column_E // side
        order_E = tile_E.argsort()
        return cls(
            row_E=row_E[order_E],
            column_E=column_E[order_E],
            side=side,
            per_tile=tile_E.bincount(minlength=down * across).tolist(),
            query_part_B=query_copies.to(dtype).reciprocal()[query_group_B],
            target_part_N=target_copies.to(dtype).reciprocal()[target_group_N],
            unrelated=len(queries) * len(targets) - len(pair_A),
        )


def _equal(left_K: Tensor, right_K: Tensor) -> tuple[Tensor, Tensor]:
    """Where a left value equals a right one: the places of all such pairs, ordered by the left. Values are small integers >= 0, and each
    left one occurs on the right.
    """
    order_K, count_V = right_K.argsort(), right_K.bincount()
    count_K = count_V[left_K]
    left_E = torch.repeat_interleave(count_K)
    nth_E = torch.arange(len(left_E), device=left_E.device) - (count_K.cumsum(0) - count_K)[left_E]
    return left_E, order_K[(count_V.cumsum(0) - count_V)[left_K[left_E]] + nth_E]
