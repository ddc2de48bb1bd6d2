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

The B x N matrix of scores is never held (`losses.scores`): any batch whose embeddings fit in memory will do.

Shape letters: B queries, N target columns, D embedding; E related pairs of a row and a column; R anchors of one direction (P columns that
are positives).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm2vec.errors import RecipeError
from vlm2vec.losses.related import Related
from vlm2vec.losses.scores import Scores

if TYPE_CHECKING:
    from vlm2vec.config import LossConfig

# Half the smallest published temperature (0.01), and the plain cosine: a learnable temperature is projected into this range.
TEMPERATURE_RANGE = (0.005, 1.0)
SCORES = 2**22  # similarities held at once: a square tile, 16 MiB in float32, and a few temporaries of that size


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
        """Return the scalar loss and detached statistics of unit rows; logits are float32 (float64 for float64 input). The loss can be
        differentiated once.

        `positive_B` (int64) is the column of each query's own positive; columns with equal `target_id_N` (int64) are the same item, and so
        are rows with equal `query_id_B` (absent: all queries differ). Under distribution all arguments are those of the global batch, on
        every rank.

        Statistics: `accuracy` (share of queries whose best related target beats every other one; a tie is a miss), `positive_similarity`
        and `negative_similarity` (mean cosine of own positives, and over distinct unrelated pairs, 0 if there are none), `temperature`,
        `duplicate_rate` (share of the pairs of different queries where the positive of one is related to the other).
        """
        dtype = torch.promote_types(query_BD.dtype, torch.float32)
        related = Related.find(positive_B, target_id_N, query_id_B, math.isqrt(SCORES), dtype)
        with torch.autocast(query_BD.device.type, enabled=False):
            return self._contrast(query_BD.to(dtype), target_ND.to(dtype), positive_B, related)

    def _contrast(self, query_BD: Tensor, target_ND: Tensor, positive_B: Tensor, related: Related) -> tuple[Tensor, dict[str, Tensor]]:
        temperature = self.temperature().to(query_BD)
        part_B, part_N, row_E, column_E = related.query_part_B, related.target_part_N, related.row_E, related.column_E
        score_E, negative_B, negative_N, best_B = Scores.apply(query_BD, target_ND, temperature, related, self.options.symmetric)
        loss = _direction(score_E, row_E, negative_B, part_N[column_E], self.options.duplicates).mean()
        if self.options.symmetric:
            column_P, anchor_E = torch.unique(column_E, return_inverse=True)
            loss_P = _direction(score_E, anchor_E, negative_N.index_select(0, column_P), part_B[row_E], self.options.duplicates)
            loss = (loss + (loss_P * part_N[column_P]).sum() / part_N[column_P].sum()) / 2
        with torch.no_grad():
            everything = (part_B @ query_BD) @ (part_N @ target_ND)
            stats = _statistics(score_E * temperature, best_B * temperature, everything, positive_B, related)
            return loss, {**stats, "temperature": temperature.detach().clone()}


def _direction(score_E: Tensor, anchor_E: Tensor, negative_R: Tensor, part_E: Tensor, duplicates: str) -> Tensor:
    """The L_i (R,) of the module's docstring: from the scores of related pairs, the anchor of each pair (all of 0..R-1 occur), the
    log-sum-exp of every anchor's negatives, and the part that the counterpart of each pair is of its item.

    A score is compared with log(exp(own) + exp(negative)) = own - log sigmoid(own - negative), where `own` is the score itself or the
    log-sum-exp of all positives of its anchor. So a tiny loss is no difference of large numbers.
    """
    count = len(negative_R)
    share_E = part_E / _sums(part_E, anchor_E, count)[anchor_E]
    own_E = score_E
    if duplicates == "positive" and len(score_E) > count:  # otherwise each anchor has one positive
        own_E = _logsumexps(score_E + part_E.log(), anchor_E, count).index_select(0, anchor_E)
    loss_E = own_E - score_E - F.logsigmoid(own_E - negative_R.index_select(0, anchor_E))
    return _sums(share_E * loss_E, anchor_E, count)


def _sums(value_E: Tensor, anchor_E: Tensor, count: int) -> Tensor:
    """Per anchor (R,)."""
    return value_E.new_zeros(count).index_add(0, anchor_E, value_E)


def _largest(value_E: Tensor, anchor_E: Tensor, count: int) -> Tensor:
    """Per anchor (R,), a constant for autograd."""
    return value_E.new_full((count,), -math.inf).scatter_reduce(0, anchor_E, value_E.detach(), "amax")


def _logsumexps(value_E: Tensor, anchor_E: Tensor, count: int) -> Tensor:
    """Per anchor (R,)."""
    top_R = _largest(value_E, anchor_E, count)
    return top_R + _sums((value_E - top_R[anchor_E]).exp(), anchor_E, count).log()


def _statistics(cosine_E: Tensor, best_B: Tensor, everything: Tensor, positive_B: Tensor, related: Related) -> dict[str, Tensor]:
    """Those of `InfoNCE.forward`, from the cosines of related pairs, the largest of an unrelated target for each query, and the sum over
    all pairs of a distinct query and a distinct target.
    """
    count, row_E, column_E = len(positive_B), related.row_E, related.column_E
    unrelated = everything - (cosine_E * related.query_part_B[row_E] * related.target_part_N[column_E]).sum()
    others = column_E.bincount(minlength=len(related.target_part_N))[positive_B].sum() - count
    return {
        "accuracy": (_largest(cosine_E, row_E, count) > best_B).to(best_B).mean(),
        "positive_similarity": (cosine_E * (column_E == positive_B[row_E])).sum() / count,
        "negative_similarity": unrelated / related.unrelated if related.unrelated else torch.zeros_like(unrelated),
        "duplicate_rate": others.to(best_B) / max(1, count * (count - 1)),
    }
