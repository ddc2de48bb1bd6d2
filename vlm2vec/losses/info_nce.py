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

Shape letters: B queries, N target columns, D embedding; R anchors and K counterparts of one direction.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vlm2vec.errors import RecipeError

if TYPE_CHECKING:
    from vlm2vec.config import LossConfig

# Half the smallest published temperature (0.01), and the plain cosine: a learnable temperature is projected into this range.
TEMPERATURE_RANGE = (0.005, 1.0)


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
        query_group_B, query_copies_B = _groups(torch.arange(len(query_BD), device=query_BD.device) if query_id_B is None else query_id_B)
        target_group_N, target_copies_N = _groups(target_id_N)
        query_copies_B, target_copies_N = query_copies_B.to(dtype), target_copies_N.to(dtype)
        related_BN = _related(query_group_B, target_group_N, positive_B)
        temperature = self.temperature().to(query_BD.device, dtype)
        with torch.autocast(query_BD.device.type, enabled=False):
            cosine_BN = query_BD.to(dtype) @ target_ND.to(dtype).T
        score_BN = cosine_BN / temperature
        loss = _anchor_losses(score_BN, related_BN, target_copies_N, self.options.duplicates).mean()
        if self.options.symmetric:
            positive_N = related_BN.any(0)
            loss_R = _anchor_losses(score_BN.T[positive_N], related_BN.T[positive_N], query_copies_B, self.options.duplicates)
            loss = (loss + _mean(loss_R, 1 / target_copies_N[positive_N])) / 2
        stats = _statistics(cosine_BN.detach(), related_BN, positive_B, target_copies_N, query_copies_B)
        return loss, stats | {"temperature": temperature.detach().clone()}


def _groups(id_K: Tensor) -> tuple[Tensor, Tensor]:
    """Number equal ids alike, 0..G-1 (K,), and count how many rows hold the id of each row (K,)."""
    _, group_K, count_G = torch.unique(id_K, return_inverse=True, return_counts=True)
    return group_K, count_G[group_K]


def _related(query_group_B: Tensor, target_group_N: Tensor, positive_B: Tensor) -> Tensor:
    """(B, N) bool: column n holds the positive of some query that is the same item as query i."""
    table = torch.zeros((len(query_group_B), len(target_group_N)), dtype=torch.bool, device=query_group_B.device)
    table[query_group_B, target_group_N[positive_B]] = True
    return table[query_group_B][:, target_group_N]


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


def _statistics(
    cosine_BN: Tensor, related_BN: Tensor, positive_B: Tensor, target_copies_N: Tensor, query_copies_B: Tensor
) -> dict[str, Tensor]:
    """The statistics that `InfoNCE.forward` documents, but for the temperature."""
    best_positive_B = cosine_BN.masked_fill(~related_BN, -math.inf).amax(1)
    best_negative_B = cosine_BN.masked_fill(related_BN, -math.inf).amax(1)
    other_BB = related_BN[:, positive_B] & ~torch.eye(len(positive_B), dtype=torch.bool, device=positive_B.device)
    count = len(positive_B)
    return {
        "accuracy": (best_positive_B > best_negative_B).to(cosine_BN.dtype).mean(),
        "positive_similarity": cosine_BN.gather(1, positive_B[:, None]).mean(),
        "negative_similarity": _mean(cosine_BN, ~related_BN / (query_copies_B[:, None] * target_copies_N)),
        "duplicate_rate": other_BB.sum().to(cosine_BN.dtype) / max(1, count * (count - 1)),
    }


def _mean(value: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean, 0 if nothing has weight."""
    return (value * weight).sum() / weight.sum().clamp(min=torch.finfo(value.dtype).tiny)
