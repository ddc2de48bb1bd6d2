"""InfoNCE over in-batch and explicit negatives that knows which items are the same.

Sources: InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, eq. 4); several positives per anchor (Khosla et al. 2020, arXiv 2004.11362,
eq. 2); the average of both directions (Radford et al. 2021, arXiv 2103.00020, section 2.3).

Definition. Let s_iu = q_i . t_u / temperature, and let u run over the DISTINCT targets of the batch: columns with equal ids are one target
that counts once, however many copies are presented. Query i is related to P(i), the positives of every query that is the same item as i (i
included). Then

    L_i = 1/|P(i)| * sum_{u in P(i)} ( log sum_{v in D(i,u)} exp(s_iv) - s_iu )

    duplicates = "positive":  D(i,u) = all targets: cross entropy with a label uniform over P(i), whose members end up equally near
    duplicates = "mask":      D(i,u) = {u} and all targets not in P(i): members of P(i) are compared with the rest, never with one another

and the loss is the mean of L_i over the B queries. An equal target under another index is thus never a negative, in either mode; the modes
differ only where |P(i)| > 1, that is where one query has several different positives. Without repeated items both are the usual cross
entropy of the softmax over targets. Targets that are nobody's positive (explicit negatives, any number per query) are negatives of every
query. `symmetric` adds the same expression with the roles exchanged: each distinct positive against the distinct queries, averaged over the
distinct positives (here |P| > 1 is common: two queries with one label); the loss is then the mean of both directions.

Where copies of a target differ (dropout), each takes an equal part: its exponential and its numerator are divided by the number of copies.

The B x N matrix of scores is never held: it is computed tile by tile, and again in the backward pass.

Shape letters: B queries, N target columns, D embedding; R anchors and K counterparts of one direction (P anchors that are positives); U
groups of equal items.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm2vec.errors import RecipeError

if TYPE_CHECKING:
    from vlm2vec.config import LossConfig

# Half the smallest published temperature (0.01), and the plain cosine: a learnable temperature is projected into this range.
TEMPERATURE_RANGE = (0.005, 1.0)
SCORES = 2**18  # similarities held at once: 1 MiB in float32, and a few temporaries of that size


class InfoNCE(nn.Module):
    """The objective of a recipe's `loss` section; see the module's docstring for the equations.

    A learnable temperature is the scalar parameter `log_temperature`, projected into TEMPERATURE_RANGE at each call so that it can always
    come back. Raises RecipeError if the temperature cannot be used.
    """

    def __init__(self, options: LossConfig) -> None:
        super().__init__()
        if not (math.isfinite(options.temperature) and options.temperature > 0):
            raise RecipeError(f"loss.temperature must be > 0 and finite, got {options.temperature}")
        low, high = TEMPERATURE_RANGE
        if options.learnable_temperature and not low <= options.temperature <= high:
            raise RecipeError(f"loss.temperature must start in [{low}, {high}] to be learnable, got {options.temperature}")
        self.options = options
        self.log_temperature = nn.Parameter(torch.tensor(math.log(options.temperature))) if options.learnable_temperature else None

    def temperature(self) -> Tensor:
        """Scalar, differentiable if learnable."""
        if self.log_temperature is None:
            return torch.tensor(self.options.temperature, dtype=torch.float64)
        low, high = TEMPERATURE_RANGE
        with torch.no_grad():
            self.log_temperature.clamp_(math.log(low), math.log(high))
        return self.log_temperature.exp()

    def forward(
        self, query_BD: Tensor, target_ND: Tensor, positive_B: Tensor, target_id_N: Tensor, query_id_B: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar loss and detached statistics of unit rows; logits are float32 (float64 for float64 input).

        `positive_B` (int64) is the column of each query's own positive; columns with equal `target_id_N` (int64) are the same item, and so
        are rows with equal `query_id_B` (absent: all queries differ). Under distribution all arguments are those of the global batch, on
        every rank.

        Statistics: `accuracy` (share of queries whose best related target beats every other one; a tie is a miss), `positive_similarity`
        and `negative_similarity` (mean cosine of own positives, and over distinct unrelated pairs, 0 if there are none), `temperature`,
        `duplicate_rate` (share of the pairs of different queries where the positive of one is related to the other).
        """
        dtype = torch.promote_types(query_BD.dtype, torch.float32)
        query_BD, target_ND = query_BD.to(dtype), target_ND.to(dtype)
        row_B = torch.arange(len(query_BD), device=query_BD.device)
        query_group_B, query_copies_B = _groups(row_B if query_id_B is None else query_id_B)
        target_group_N, target_copies_N = _groups(target_id_N)
        query_copies_B, target_copies_N = query_copies_B.to(dtype), target_copies_N.to(dtype)
        pair_2B = torch.stack([query_group_B, target_group_N[positive_B]])
        temperature = self.temperature().to(query_BD.device, dtype)

        def to_targets(row_R: Tensor) -> tuple[Tensor, ...]:
            cosine_RN = _cosine(query_BD[row_R], target_ND)
            related_RN = _related(query_group_B[row_R], target_group_N, pair_2B)
            loss_R = _anchor_losses(cosine_RN / temperature, related_RN, target_copies_N, self.options.duplicates)
            return loss_R, *_row_statistics(cosine_RN.detach(), related_RN, positive_B, query_copies_B[row_R], target_copies_N)

        def to_queries(row_R: Tensor) -> tuple[Tensor, ...]:
            cosine_RB = _cosine(target_ND[row_R], query_BD)
            related_RB = _related(target_group_N[row_R], query_group_B, pair_2B.flip(0))
            return (_anchor_losses(cosine_RB / temperature, related_RB, query_copies_B, self.options.duplicates),)

        loss_B, hit_B, negative_B, negatives_B, others_B = _in_tiles(to_targets, row_B, len(target_ND))
        loss = loss_B.mean()
        if self.options.symmetric:
            row_P = torch.isin(target_group_N, pair_2B[1]).nonzero()[:, 0]
            (loss_P,) = _in_tiles(to_queries, row_P, len(query_BD))
            loss = (loss + _mean(loss_P, 1 / target_copies_N[row_P])) / 2
        with torch.no_grad():
            count = len(query_BD)
            return loss, {
                "accuracy": hit_B.mean(),
                "positive_similarity": (query_BD * target_ND[positive_B]).sum(1).mean(),
                "negative_similarity": _mean(negative_B, negatives_B),
                "duplicate_rate": others_B.sum() / max(1, count * (count - 1)),
                "temperature": temperature.detach().clone(),
            }


def _groups(id_K: Tensor) -> tuple[Tensor, Tensor]:
    """Number equal ids alike, 0..G-1 (K,), and count how many rows hold the id of each row (K,)."""
    _, group_K, count_G = torch.unique(id_K, return_inverse=True, return_counts=True)
    return group_K, count_G[group_K]


def _in_tiles(function: Callable[[Tensor], tuple[Tensor, ...]], row_R: Tensor, width: int) -> list[Tensor]:
    """What `function` gives for rows `row_R`, a tile of them at a time, so that SCORES scores or a single row are held at once.

    More than one tile: each is computed again in the backward pass, which costs little beside the encoder.
    """
    tiles = row_R.split(max(1, SCORES // width))
    run = function if len(tiles) == 1 else partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    return [torch.cat(parts) for parts in zip(*map(run, tiles), strict=True)]


def _cosine(anchor_RD: Tensor, counterpart_KD: Tensor) -> Tensor:
    with torch.autocast(anchor_RD.device.type, enabled=False):
        return anchor_RD @ counterpart_KD.T


def _related(anchor_group_R: Tensor, counterpart_group_K: Tensor, pair_2B: Tensor) -> Tensor:
    """(R, K) bool: some pair joins the group of anchor r with the group of counterpart k."""
    group_U, place_R = torch.unique(anchor_group_R, return_inverse=True)
    place_B = torch.searchsorted(group_U, pair_2B[0]).clamp(max=len(group_U) - 1)
    here_B = group_U[place_B] == pair_2B[0]
    table = torch.zeros((len(group_U), int(counterpart_group_K.max()) + 1), dtype=torch.bool, device=group_U.device)
    table[place_B[here_B], pair_2B[1, here_B]] = True
    return table[place_R][:, counterpart_group_K]


def _anchor_losses(score_RK: Tensor, related_RK: Tensor, copies_K: Tensor, duplicates: str) -> Tensor:
    """The L_i (R,) of the module's docstring; every row needs a related column. `copies_K` is how many columns hold the same item."""
    counted_RK = score_RK - copies_K.log()  # copies together weigh one exponential
    if duplicates == "positive":
        total_RK = counted_RK.logsumexp(1, keepdim=True)
    else:
        negatives_R1 = counted_RK.masked_fill(related_RK, -math.inf).logsumexp(1, keepdim=True)
        total_RK = torch.logaddexp(score_RK, negatives_R1)
    share_RK = related_RK / copies_K
    return ((total_RK - score_RK) * share_RK).sum(1) / share_RK.sum(1)


def _row_statistics(cosine_RN: Tensor, related_RN: Tensor, positive_B: Tensor, copies_R: Tensor, copies_N: Tensor) -> tuple[Tensor, ...]:
    """Per query (R,): whether a related target is nearest; mean similarity of unrelated targets and the weight of that mean, each item
    counted once; how many positives of other queries are related to it.
    """
    hit_R = cosine_RN.masked_fill(~related_RN, -math.inf).amax(1) > cosine_RN.masked_fill(related_RN, -math.inf).amax(1)
    weight_RN = ~related_RN / (copies_R[:, None] * copies_N)
    weight_R = weight_RN.sum(1)
    mean_R = (cosine_RN * weight_RN).sum(1) / weight_R.clamp(min=torch.finfo(cosine_RN.dtype).tiny)
    others_R = related_RN[:, positive_B].sum(1) - 1
    return hit_R.to(cosine_RN.dtype), mean_R, weight_R, others_R.to(cosine_RN.dtype)


def _mean(value: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean, 0 if nothing has weight."""
    return (value * weight).sum() / weight.sum().clamp(min=torch.finfo(value.dtype).tiny)
