"""The pairs of one step as distinct features plus indices that say who is whose; built in loader workers.

Shape letters: B queries, I distinct items of the batch, K explicit negatives.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from vlm2vec import prompts
from vlm2vec.backbones.base import Processor
from vlm2vec.collate import Features
from vlm2vec.data.bad import BadPair, too_many
from vlm2vec.data.images import DEFAULT_LIMITS, Limits, load_image
from vlm2vec.data.types import ImageRef, Item, Pair
from vlm2vec.errors import ImageError, Vlm2VecError
from vlm2vec.feature_cache import FeatureCache


@dataclass
class Batch:
    """One micro-batch: each distinct item once, and index tensors into that list."""

    features: list[Features]  # I
    item_id_I: Tensor  # int64 identity of each item, equal across ranks for equal items
    query_B: Tensor
    positive_B: Tensor
    negative_K: Tensor
    pair_ids: list[str]
    bad: list[BadPair] = field(default_factory=list)


def featurize(processor: Processor, item: Item, cache: FeatureCache | None = None, limits: Limits = DEFAULT_LIMITS) -> Features:
    """Tokens and pixels of one item: render its prompt, decode its pictures, process. A chat has a turn of its own for the instruction.

    A picture that `cache` holds is not decoded: its features take the place of pixels. `limits` say which pictures are read at all.
    """
    options = processor.options
    shown = replace(item, instruction="") if options.prompt == "chat" else item
    images = [(cache.known(image) if cache else None) or decoded(processor, image, limits) for image in item.images]
    return processor.features(prompts.render(shown, options.keep_stray), images, item.instruction)


def decoded(processor: Processor, image: ImageRef, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
    """The pixels of a picture for this processor, as `model.decode` says."""
    return load_image(image, limits=limits, needed=processor.needed_size if processor.options.decode == "draft" else None)


def make_batch(
    pairs: Sequence[Pair], processor: Processor, explicit_negatives: bool = True, known: Mapping[str, Features] | None = None
) -> Batch:
    """Encode-once view of `pairs`: equal items share a row. `known` holds features that were made already, by item key."""
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
    features = [known[item.key] if known and item.key in known else featurize(processor, item) for item in items]
    return Batch(features, item_id_I, query_B, positive_B, negative_K, [pair.id for pair in pairs])


class Rows(Protocol):
    """A source: its pairs by index, each made when asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Pair: ...
    def id(self, index: int) -> str: ...


class PairSource(Protocol):
    """What a mixture gives: its sources, and which (source, row) make up global batch `index`, those of one rank only."""

    @property
    def sources(self) -> Sequence[Rows]: ...
    def draws(self, index: int, rank: int = 0, world_size: int = 1) -> NDArray[np.int64]: ...


class Whereabouts:
    """What each loader worker is at, in memory that outlives it: when one dies, nobody else can say on which sample."""

    def __init__(self, workers: int) -> None:
        self._at_WF = torch.full((workers, 4), -1, dtype=torch.long).share_memory_()  # F: process id, source, row, item of the pair

    def note(self, source: int, row: int, item: int) -> None:
        """Called by a worker before it reads an item; does nothing in the main process."""
        if (worker := get_worker_info()) is not None:
            self._at_WF[worker.id] = torch.tensor([os.getpid(), source, row, item])

    def of_the_dead(self, grace: float) -> list[tuple[int, int, int]]:
        """(source, row, item) of workers that are no more, given up to `grace` seconds to end. Called by the process that started them."""
        until = time.monotonic() + grace
        while True:
            alive = {child.pid for child in multiprocessing.active_children()}
            places = [(source, row, item) for process, source, row, item in self._at_WF.tolist() if process >= 0 and process not in alive]
            if places or time.monotonic() >= until:
                return places
            time.sleep(0.05)


class BatchDataset(Dataset[Batch | Vlm2VecError]):
    """Map-style: global batch index -> this rank's `Batch`. Reading batch n touches no other batch, so a resumed run skips nothing.

    With `skip`, a pair with a picture that cannot be read is replaced by the next index of its source, and that one by the next: a pure
    function of the files, so every rank, worker and resumed run agrees. At most `skip` pairs are passed over for one place; None
    replaces nothing. An error that can be explained is returned rather than raised: torch would wrap it in the traceback of a worker.
    """

    def __init__(
        self,
        mixture: PairSource,
        processor: Processor,
        explicit_negatives: bool,
        rank: int,
        world_size: int,
        skip: int | None = None,
        whereabouts: Whereabouts | None = None,
        cache: FeatureCache | None = None,
    ) -> None:
        self.mixture = mixture
        self.processor = processor
        self.explicit_negatives = explicit_negatives
        self.rank, self.world_size = rank, world_size
        self.skip, self.whereabouts, self.cache = skip, whereabouts, cache

    def __getitem__(self, index: int) -> Batch | Vlm2VecError:
        known: dict[str, Features] = {}
        pairs: list[Pair] = []
        bad: list[BadPair] = []
        try:
            for source, row in self.mixture.draws(index, self.rank, self.world_size).tolist():
                pair, passed = self._readable(source, row, known)
                pairs.append(pair)
                bad += passed
        except Vlm2VecError as error:
            return error
        return replace(make_batch(pairs, self.processor, self.explicit_negatives, known), bad=bad)

    def _readable(self, source: int, row: int, known: dict[str, Features]) -> tuple[Pair, list[BadPair]]:
        """The first pair from `row` on whose pictures can all be read, and those before it; adds its features to `known`."""
        rows = self.mixture.sources[source]
        reasons: dict[int, str] = {}
        for at in (index % len(rows) for index in range(row, row + len(rows))):
            try:
                pair = rows[at]
                known.update(self._features(pair, (source, at), known))
            except ImageError as error:
                reasons[at] = str(error)
                if self.skip is None:
                    raise type(error)(f"{error}; repair it, or replace such pairs with data.bad_pictures=skip") from error
                if len(reasons) > self.skip:
                    break
            else:
                return pair, [BadPair(rows.id(index), reason, pair.id) for index, reason in reasons.items()]
        raise too_many(reasons.values(), f"{len(reasons)} pairs in a row from {rows.id(row)} on")

    def _features(self, pair: Pair, place: tuple[int, int], known: Mapping[str, Features]) -> dict[str, Features]:
        """Features by item key of what this pair brings that is not `known`; a pair that fails must leave nothing behind."""
        fresh: dict[str, Features] = {}
        for number, item in enumerate(items_of(pair, self.explicit_negatives)):
            if item.key not in known and item.key not in fresh:
                if self.whereabouts is not None:
                    self.whereabouts.note(*place, number)
                fresh[item.key] = featurize(self.processor, item, self.cache)
        return fresh


def items_of(pair: Pair, explicit_negatives: bool) -> Iterator[Item]:
    """What is read of a pair, in the order in which it is read."""
    yield from (pair.query, pair.positive, *(pair.negatives if explicit_negatives else ()))
