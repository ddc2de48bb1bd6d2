"""The pairs of one step as distinct features plus indices that say who is whose; built in loader workers.

Shape letters: B queries, I distinct items of the batch, K explicit negatives.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlm2vec import prompts
from vlm2vec.backbones.base import Processor
from vlm2vec.collate import Features
from vlm2vec.data.images import load_image
from vlm2vec.data.types import Item, Pair


@dataclass
class Batch:
    """One micro-batch: each distinct item once, and index tensors into that list."""

    features: list[Features]  # I
    item_id_I: Tensor  # int64 identity of each item, equal across ranks for equal items
    query_B: Tensor
    positive_B: Tensor
    negative_K: Tensor
    pair_ids: list[str]


def featurize(processor: Processor, item: Item) -> Features:
    """Tokens and pixels of one item: render its prompt, decode its pictures, process. A chat has a turn of its own for the instruction."""
    options = processor.options
    shown = replace(item, instruction="") if options.prompt == "chat" else item
    images = [load_image(image) for image in item.images]
    return processor.features(prompts.render(shown, options.keep_stray), images, item.instruction)


def make_batch(pairs: Sequence[Pair], processor: Processor, explicit_negatives: bool = True) -> Batch:
    """Encode-once view of `pairs`: equal items share a row."""
    rows: dict[str, int] = {}
    items: list[Item] = []

    def row_of(item: Item) -> int:
        if item.key not in rows:
            rows[item.key] = len(items)
            items.append(item)
        return rows[item.key]

    def rows_of(group: Iterable[Item]) -> Tensor:
        return torch.tensor([row_of(item) for item in group], dtype=torch.long)

    query_B = rows_of(pair.query for pair in pairs)
    positive_B = rows_of(pair.positive for pair in pairs)
    negative_K = rows_of(negative for pair in pairs if explicit_negatives for negative in pair.negatives)
    # 60 bits of the content hash fit a signed int64; a collision among 10^6 items has probability below 10^-6.
    item_id_I = torch.tensor([int(item.key[:15], 16) for item in items], dtype=torch.long)
    features = [featurize(processor, item) for item in items]
    return Batch(features, item_id_I, query_B, positive_B, negative_K, [pair.id for pair in pairs])


class PairSource(Protocol):
    """What a mixture gives: the pairs of global batch `index`, those of one rank only."""

    def pairs(self, index: int, rank: int = 0, world_size: int = 1) -> list[Pair]: ...


class BatchDataset(Dataset[Batch]):
    """Map-style: global batch index -> this rank's `Batch`. Reading batch n touches no other batch, so a resumed run skips nothing."""

    def __init__(self, mixture: PairSource, processor: Processor, explicit_negatives: bool, rank: int, world_size: int) -> None:
        self.mixture = mixture
        self.processor = processor
        self.explicit_negatives = explicit_negatives
        self.rank, self.world_size = rank, world_size

    def __getitem__(self, index: int) -> Batch:
        return make_batch(self.mixture.pairs(index, self.rank, self.world_size), self.processor, self.explicit_negatives)
