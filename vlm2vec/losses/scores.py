"""Scores of all queries against all targets, without the matrix that would hold them.

The objective reads two things off the B x N scores s = q . t / temperature: the few of related pairs, and the log-sum-exp of the unrelated
ones of each row (and column). Both are computed tile by tile, in the manner of FlashAttention (Dao et al. 2022, arXiv 2205.14135, section
3.1): running log-sum-exps in the forward pass; in the backward pass the tile again, then its gradient, which is softmax times incoming
gradient, multiplied into those of queries and targets. That is four matrix products, rows and columns together, and a few tiles of memory.

Shape letters: B queries, N target columns, D embedding, E related pairs, R rows and K columns of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate, product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm2vec.losses.related import Related

Tile = tuple[slice, slice, slice, tuple[Tensor, Tensor]]  # its rows, columns and pairs, and where in the tile those pairs are


class Scores(torch.autograd.Function):
    """`apply(query_BD, target_ND, temperature, related, columns)` -> (score_E, negative_B, negative_N, best_B), all of one dtype.

    `score_E` are the scores of related pairs. `negative_B` is the log-sum-exp of a row's unrelated scores, each exponential times the part
    that the target is of its item; `negative_N`, computed if `columns`, that of a column, with the parts of queries. Both are -inf where
    everything is related. `best_B`, the largest unrelated score of a row, is a constant for autograd. Can be differentiated once.
    """

    @staticmethod
    def forward(
        ctx: Any, query_BD: Tensor, target_ND: Tensor, temperature: Tensor, related: Related, columns: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        score_E = query_BD.new_empty(len(related.row_E))
        negative_B, best_B = query_BD.new_full((2, len(query_BD)), -math.inf)
        negative_N = query_BD.new_full((len(target_ND),), -math.inf)
        for rows, cols, pairs, place in _tiles(related):
            score_RK = _score(query_BD[rows], target_ND[cols], temperature)
            score_E[pairs] = score_RK[place]
            score_RK[place] = -math.inf
            best_B[rows] = torch.maximum(best_B[rows], score_RK.amax(1))
            negative_B[rows] = torch.logaddexp(negative_B[rows], _logsumexp(score_RK, related.target_part_N[cols]))
            if columns:
                negative_N[cols] = torch.logaddexp(negative_N[cols], _logsumexp(score_RK.T, related.query_part_B[rows]))
        only_RK = score_RK if len(related.per_tile) == 1 else None  # a single tile is kept, and not computed again
        ctx.save_for_backward(query_BD, target_ND, temperature, negative_B, negative_N, only_RK)
        ctx.mark_non_differentiable(best_B)
        ctx.related, ctx.columns = related, columns
        return score_E, negative_B, negative_N, best_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_E: Tensor, grad_B: Tensor, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query_BD, target_ND, temperature, negative_B, negative_N, only_RK = ctx.saved_tensors
        query_grad_BD, target_grad_ND = torch.zeros_like(query_BD), torch.zeros_like(target_ND)
        for rows, cols, pairs, place in _tiles(ctx.related):
            score_RK = _score(query_BD[rows], target_ND[cols], temperature) if only_RK is None else only_RK
            grad_RK = _softmax(score_RK, negative_B[rows], ctx.related.target_part_N[cols], grad_B[rows])
            if ctx.columns:
                grad_RK += _softmax(score_RK.T, negative_N[cols], ctx.related.query_part_B[rows], grad_N[cols]).T
            grad_RK[place] = grad_E[pairs]  # these scores were left out of the sums; what stood there may be NaN
            query_grad_BD[rows].addmm_(grad_RK, target_ND[cols])
            target_grad_ND[cols].addmm_(grad_RK.T, query_BD[rows])
        query_grad_BD /= temperature
        target_grad_ND /= temperature
        strips = zip(query_BD.split(ctx.related.side), query_grad_BD.split(ctx.related.side), strict=True)
        through_scores = torch.stack([(query_RD * grad_RD).sum() for query_RD, grad_RD in strips]).sum()
        return query_grad_BD, target_grad_ND, -through_scores / temperature, None, None


def _tiles(related: Related) -> Iterator[Tile]:
    """Row by row, the last of a row or column smaller. No tile makes the host wait for the device."""
    corners = product(*(range(0, len(parts), related.side) for parts in (related.query_part_B, related.target_part_N)))
    for (row, column), count, end in zip(corners, related.per_tile, accumulate(related.per_tile), strict=True):
        pairs = slice(end - count, end)
        place = related.row_E[pairs] - row, related.column_E[pairs] - column
        yield slice(row, row + related.side), slice(column, column + related.side), pairs, place


def _score(query_RD: Tensor, target_KD: Tensor, temperature: Tensor) -> Tensor:
    with torch.autocast(query_RD.device.type, enabled=False):  # the backward pass may stand under one
        return (query_RD / temperature) @ target_KD.T


def _logsumexp(score_RK: Tensor, part_K: Tensor) -> Tensor:
    """Over columns (R,), each exponential times its part; -inf for a row of -inf."""
    top_R1 = score_RK.amax(1, keepdim=True).clamp(min=torch.finfo(score_RK.dtype).min)
    return ((score_RK - top_R1).exp_() @ part_K).log() + top_R1[:, 0]


def _softmax(score_RK: Tensor, logsumexp_R: Tensor, part_K: Tensor, grad_R: Tensor) -> Tensor:
    """(R, K): the gradient of `_logsumexp` over all tiles of these rows, times that of its result."""
    return (score_RK - logsumexp_R[:, None]).exp_().mul_(grad_R[:, None]).mul_(part_K)
