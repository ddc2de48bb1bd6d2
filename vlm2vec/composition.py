"""What a global batch looks like to the loss, from texts and picture paths alone: who shares it, what is there twice, how low losses get.

The loss is InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, eq. 4), in the form of `losses.info_nce`, where equal items are one item.
Let pair i have the query q_i and the positive t_i, and let

    C_i   columns (positives of all pairs and explicit negatives) that hold t_i
    m_i   pairs whose query is q_i;  n_i  those of them whose positive is t_i
    P_i   distinct positives of the pairs whose query is q_i
    U, V  distinct targets and distinct queries of the batch

Equal items have equal embeddings whatever the model. Were every column a target of its own, as in the usual cross entropy, the softmax of
q_i could at best be n_i / m_i on t_i, split over C_i columns:

    naive floor = mean over i of ln C_i + ln(m_i / n_i)

With one column per item and a label spread evenly over P_i (`duplicates: positive`) the cross entropy is at least the entropy of the label;
compared with items outside P_i only (`duplicates: mask`) it can vanish:

    floor = mean over i of ln |P_i|, or 0

`symmetric` averages that with the same expression for the distinct positives, |P| then being the distinct queries that share one. If all
similarities are equal, L_i = ln U, or ln(U - |P_i| + 1) with the mask; ranked at random, a query has a positive first in |P_i| / U of all
cases.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vlm2vec.data.types import Item, Pair

if TYPE_CHECKING:
    from vlm2vec.config import LossConfig

Floats = NDArray[np.float64]
ALL = "all sources"


@dataclass(frozen=True)
class Share:
    """One source in the batches that hold it: `pairs` of it in each, the rest means over its pairs, losses in nats.

    `same_query` and `same_target`: other pairs with its query, other columns with its positive. `start` is the loss where all similarities
    are equal. `negatives`: explicit ones; `without`: share of the pairs that have none.
    """

    pairs: float
    same_query: float
    same_target: float
    naive_floor: float
    floor: float
    start: float
    chance: float
    negatives: float
    without: float


@dataclass(frozen=True)
class Composition:
    """What some batches hold, by source and for all of them; the fewest and the most sources that share a batch."""

    batches: int
    shares: Mapping[str, Share]
    sources: tuple[int, int]

    def lines(self) -> list[tuple[str, str]]:
        """(source, its figures) under a line of headings."""
        headings = "pairs  same query  same target  naive floor  floor  start   chance  negatives  without"
        return [("source", headings), *((name, _figures(share)) for name, share in self.shares.items())]


def _figures(share: Share) -> str:
    return (
        f"{share.pairs:5.0f}  {share.same_query:10.2f}  {share.same_target:11.2f}  {share.naive_floor:11.2f}  {share.floor:5.2f}"
        f"  {share.start:5.2f}  {100 * share.chance:5.2f} %  {share.negatives:9.2f}  {100 * share.without:5.1f} %"
    )


def compose(batches: Iterable[Sequence[Pair]], loss: LossConfig) -> Composition:
    """What the loss sees in these global batches. No picture is opened: one file under two names counts as two pictures."""
    views = [_look(batch, loss) for batch in batches]
    names = sorted({name for view in views for name in view.source_B})
    shares = {name: _share(views, loss, name) for name in (*names, ALL)}
    counts = [len(set(view.source_B)) for view in views]
    return Composition(len(views), shares, (min(counts), max(counts)))


@dataclass(frozen=True, eq=False)
class _View:
    """Of every pair of a batch: its source, whether it is the first with its positive, and the figures of the module's docstring."""

    source_B: list[str]
    first_B: NDArray[np.bool_]
    same_query_B: Floats
    same_target_B: Floats
    naive_B: Floats
    positives_B: Floats
    queries_B: Floats
    negatives_B: Floats
    targets: int
    distinct_queries: int


def _look(pairs: Sequence[Pair], loss: LossConfig) -> _View:
    numbers: dict[str, int] = {}

    def number(item: Item) -> int:
        return numbers.setdefault(item.key, len(numbers))

    negatives = [pair.negatives if loss.explicit_negatives else () for pair in pairs]
    query_B = np.array([number(pair.query) for pair in pairs])
    positive_B = np.array([number(pair.positive) for pair in pairs])
    negative_K = np.array([number(item) for group in negatives for item in group], dtype=np.int64)
    columns_I = np.bincount(np.concatenate([positive_B, negative_K]), minlength=len(numbers))
    asked_I = np.bincount(query_B, minlength=len(numbers))
    kinds, kind_B, copies = np.unique(np.stack([query_B, positive_B]), axis=1, return_inverse=True, return_counts=True)
    same_B = copies[kind_B.reshape(-1)]  # n_i
    first_B = np.zeros(len(pairs), dtype=bool)
    first_B[np.unique(positive_B, return_index=True)[1]] = True
    return _View(
        [pair.source for pair in pairs],
        first_B,
        asked_I[query_B] - 1.0,
        columns_I[positive_B] - 1.0,
        np.log(columns_I[positive_B] * asked_I[query_B] / same_B),
        np.bincount(kinds[0], minlength=len(numbers))[query_B].astype(np.float64),
        np.bincount(kinds[1], minlength=len(numbers))[positive_B].astype(np.float64),
        np.array([float(len(group)) for group in negatives]),
        int(np.count_nonzero(columns_I)),
        int(np.count_nonzero(asked_I)),
    )


def _share(views: Sequence[_View], loss: LossConfig, name: str) -> Share:
    chosen = [np.array([name in (ALL, source) for source in view.source_B]) for view in views]
    once = [mine & view.first_B for view, mine in zip(views, chosen, strict=True)]

    def mean(figures: Iterable[Floats], rows: Sequence[NDArray[np.bool_]] = chosen) -> float:
        """Over these rows of all batches."""
        return float(np.concatenate([figure[mine] for figure, mine in zip(figures, rows, strict=True)]).mean())

    def loss_of(forward: Iterable[Floats], backward: Iterable[Floats]) -> float:
        return (mean(forward) + mean(backward, once)) / 2 if loss.symmetric else mean(forward)

    masked = loss.duplicates == "mask"
    return Share(
        pairs=sum(int(mine.sum()) for mine in chosen) / sum(bool(mine.any()) for mine in chosen),
        same_query=mean(view.same_query_B for view in views),
        same_target=mean(view.same_target_B for view in views),
        naive_floor=mean(view.naive_B for view in views),
        floor=0.0 if masked else loss_of((np.log(view.positives_B) for view in views), (np.log(view.queries_B) for view in views)),
        start=loss_of(
            (np.log(view.targets - masked * (view.positives_B - 1)) for view in views),
            (np.log(view.distinct_queries - masked * (view.queries_B - 1)) for view in views),
        ),
        chance=mean(view.positives_B / view.targets for view in views),
        negatives=mean(view.negatives_B for view in views),
        without=mean((view.negatives_B == 0).astype(np.float64) for view in views),
    )
