"""The score of one set: its candidates ranked, its queries valued, and what came of each query in words that a person can read.

Shape letters: Q queries, N targets of a set, M candidates of one query, R relevant ones among them, K retrieved ones, D embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm2vec import log, metrics, prompts
from vlm2vec.cache import EmbeddingCache
from vlm2vec.data.types import Item
from vlm2vec.errors import EnvError
from vlm2vec.evalsets import Task, picture_name
from vlm2vec.io import digest
from vlm2vec.quantize import Quantized, quantize
from vlm2vec.ranking import Ranking, rank

COLLAPSED = 1e-6
EXAMPLES, RETRIEVED = 4, 5  # hits and misses shown per set, items shown per query
TILE = 4096  # targets of a corpus read at once
CUTOFFS = (1, 5, 10)
logger = log.get_logger(__name__)


@dataclass(frozen=True)
class Variant:
    """Vectors as a store would keep them: the first `dims` numbers (None: all) in a precision of `quantize.PRECISIONS`."""

    dims: int | None = None
    precision: str = "float32"


@dataclass(frozen=True, eq=False)
class Scored:
    """The outcome of one set, for embeddings of `dims` numbers.

    `value_Q` is the metric of the set for each query, `variants` the same for other forms of the vectors.
    """

    task: Task
    dims: int
    ranking: Ranking
    value_Q: NDArray[np.float64]
    variants: list[NDArray[np.float64]]
    interval: tuple[float, float]
    warning: str

    @property
    def rank_Q(self) -> NDArray[np.int64]:
        """Rank of the best relevant candidate, from 1."""
        return np.array([positions.min() for positions in self.ranking.position_QR])

    def values(self, variant: int | None) -> NDArray[np.float64]:
        """The metric for each query (Q,), as the embeddings are or in one of the variants."""
        return self.value_Q if variant is None else self.variants[variant]

    def entry(self) -> dict[str, Any]:
        """What the results say about this set."""
        spec, positions, grades = self.task.spec, self.ranking.position_QR, self.task.grades
        names = [f"{family}@{cutoff}" for family in metrics.METRICS for cutoff in CUTOFFS]
        return {
            "meta_task": spec.meta_task,
            "split": spec.split,
            "metric": spec.metric,
            "score": float(self.value_Q.mean()),
            "interval": list(self.interval),
            "n": len(self.value_Q),
            "candidates": self.task.listed,
            "chance": self.task.chance,
            "ties": int((self.ranking.ties_Q > 0).sum()),
            "metrics": {name: float(metrics.per_query(name, positions, grades).mean()) for name in names},
        }

    def examples(self, items: Mapping[str, Item], root: Path, seed: int) -> list[dict[str, Any]]:
        """Hits, then misses: of each the first few in an order that a hash of the query decides."""
        said = [digest([seed, self.task.spec.name, query]) for query in self.task.queries]
        order = sorted(range(len(said)), key=lambda query: said[query])
        hit_Q = self.rank_Q == 1
        chosen = [query for query in order if hit_Q[query]][:EXAMPLES] + [query for query in order if not hit_Q[query]][:EXAMPLES]
        return [self.example(query, items, root) for query in chosen]

    def predictions(self, items: Mapping[str, Item], root: Path) -> Iterator[dict[str, Any]]:
        """What came of every query, in canonical order."""
        return (self.example(query, items, root) for query in range(len(self.task.queries)))

    def example(self, query: int, items: Mapping[str, Item], root: Path) -> dict[str, Any]:
        """What came of one query: its best relevant candidate as the gold, and the first few retrieved."""
        task, relevant = self.task, self.task.relevant[query]
        gold = int(relevant[self.ranking.position_QR[query].argmin()])
        best, right = int(self.ranking.position_QR[query].min()), set(relevant.tolist())
        retrieved = zip(self.ranking.top_QK[query].tolist(), self.ranking.top_score_QK[query].tolist(), strict=True)
        return {
            "set": task.spec.name,
            "query_id": digest([task.queries[query], [task.targets[index] for index in relevant]])[:16],
            "row": task.rows[query],
            "value": float(self.value_Q[query]),
            "hit": best == 1,
            "gold_rank": best,
            "ties": int(self.ranking.ties_Q[query]),
            "query": _shown(items[task.queries[query]], root),
            "gold": _shown(items[task.targets[gold]], root),
            "retrieved": [
                {**_shown(items[task.targets[index]], root), "score": round(score, 3), "gold": index in right} for index, score in retrieved
            ],
        }


def _shown(item: Item, root: Path) -> dict[str, Any]:
    return {"text": prompts.render(item), "image": picture_name(item.images[0], root) if item.images else None}


def score(task: Task, cache: EmbeddingCache, ties: str, variants: Sequence[Variant]) -> Scored:
    """Rank the candidates of every query and value the outcome.

    Where all targets lie within 1e-6 of each other, only rounding tells them apart: under the pessimistic rule all their scores are ties.
    """
    query_QD, targets = _Rows(cache, task.queries)[:], _Rows(cache, task.targets)
    target_ND: Any = targets if task.candidates is None else targets[:]  # a corpus may be larger than memory, lists are not
    collapsed = len(target_ND) > 1 and _spread(target_ND) <= COLLAPSED
    if collapsed and ties == "pessimistic":
        target_ND = np.broadcast_to(target_ND[:1], (len(target_ND), query_QD.shape[1]))

    def ranked(variant: Variant, top: int) -> Ranking:
        queries = quantize(query_QD, variant.dims, variant.precision, "query")
        candidates = Quantized(target_ND, variant.dims, variant.precision)
        return rank(queries, candidates, task.candidates, task.relevant, task.grades, ties, top)

    def valued(ranking: Ranking) -> NDArray[np.float64]:
        return metrics.per_query(task.spec.metric, ranking.position_QR, task.grades)

    ranking = ranked(Variant(), RETRIEVED)
    value_Q = valued(ranking)
    low, high = metrics.interval(value_Q)
    warning = f"{task.spec.name}: all {len(target_ND)} candidates within {COLLAPSED:g}: model collapsed?" if collapsed else ""
    if warning:
        logger.warning(warning)
    span = f"{100 * value_Q.mean():.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    logger.info("%s: %s %s, %d queries", task.spec.name, task.spec.metric, span, len(value_Q))
    return Scored(task, query_QD.shape[1], ranking, value_Q, [valued(ranked(variant, 0)) for variant in variants], (low, high), warning)


class _Rows:
    """Embeddings by position, read from the cache as they are asked for."""

    def __init__(self, cache: EmbeddingCache, contents: Sequence[str]) -> None:
        self.cache, self.contents = cache, contents

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, part: slice) -> NDArray[np.float32]:
        found, rows_ND = self.cache.get([self.cache.key(content) for content in self.contents[part]])
        if not found.all():
            lost = int((~found).sum())
            raise EnvError(f"{lost} embeddings vanished from {self.cache.directory} while they were in use; run again to encode them anew")
        return rows_ND


def _spread(target_ND: Any) -> float:
    """Largest range of a dimension over all targets."""
    low_D, high_D = np.full(1, np.inf, np.float32), np.full(1, -np.inf, np.float32)
    for start in range(0, len(target_ND), TILE):
        tile_ND = target_ND[start : start + TILE]
        low_D, high_D = np.minimum(low_D, tile_ND.min(axis=0)), np.maximum(high_D, tile_ND.max(axis=0))
    return float((high_D - low_D).max())
