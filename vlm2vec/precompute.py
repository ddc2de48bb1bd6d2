"""Fill the feature cache before the first step: each picture that the run draws goes through the frozen towers once, over all ranks.

Which pictures are cached is a pure function of recipe and data: those that the run draws most often, then those it draws first, as many of
that list as the bound has room for. Each is encoded by itself, so its features depend on nothing else. A run that was killed, or shares the
folder with others, therefore sees the same bits. A kill costs the block at hand.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from vlm2vec import dist, log
from vlm2vec.backbones.base import Processor
from vlm2vec.batch import PairSource, decoded, items_of
from vlm2vec.config import Recipe
from vlm2vec.data.images import content_key
from vlm2vec.data.types import ImageRef
from vlm2vec.encoder import Encoder
from vlm2vec.errors import ImageError, RecipeError, Vlm2VecError
from vlm2vec.feature_cache import FeatureCache, Picture, size_of
from vlm2vec.transport import read_ahead

FOLDER = "features"  # in the run folder, unless data.feature_folder names another
BLOCK = 32  # pictures of a shard; one of the largest models' has 7 MB
WINDOW = 4096  # pairs of each rank whose keys are told at once
GIB = 2**30
_logger = log.get_logger(__name__)


@dataclass(frozen=True)
class Seen:
    """A picture by its content, and one place where it stands: (source, row, number in the pair)."""

    key: str
    source: int
    row: int
    number: int


def precompute(recipe: Recipe, encoder: Encoder, mixture: PairSource, batches: int) -> FeatureCache | None:
    """The feature cache of a run that draws global batches 0 to `batches` - 1, filled; None where the recipe asks for none.

    Every rank calls, before weights are spread. Raises RecipeError for a model that cannot be given features. A picture that cannot be
    read is left to the run, as without a cache.
    """
    if not recipe.data.feature_cache:
        return None
    if not encoder.backbone.takes_features:
        kind = encoder.model.config.model_type
        raise RecipeError(f"data.feature_cache: a {kind} model takes pixels only, not features of pictures; write 0")
    cache = FeatureCache(Path(recipe.data.feature_folder or Path(recipe.run.dir) / FOLDER), encoder.towers_fingerprint())
    options = mixture, recipe.loss.explicit_negatives, recipe.data.workers
    plan = by_use(batches, *options)
    cache.keep(Filler(cache, encoder, *options).fill(plan, int(recipe.data.feature_cache * GIB)))
    _logger.info("features of %d of this run's %d pictures lie in %s", len(cache.kept), len(plan), cache.directory)
    return cache


# -- which pictures, in which order --------------------------------------------------------------------------------------------------------


def by_use(batches: int, mixture: PairSource, explicit_negatives: bool, workers: int) -> list[Seen]:
    """The distinct readable pictures of global batches 0 to `batches` - 1: most used first, then first used first. Every rank calls."""
    draws = np.concatenate([mixture.draws(index) for index in range(batches)])
    rows, first, counts = np.unique(draws, axis=0, return_index=True, return_counts=True)
    order = np.argsort(first)
    places = rows[order].tolist()
    uses: Counter[str] = Counter()
    seen: dict[str, Seen] = {}
    with log.progress(len(places), "looking at pictures", "pair") as bar:
        reader = _Keys(places[dist.rank() :: dist.world_size()], mixture, explicit_negatives)
        keys_of_places = _shared(reader, workers, len(places))
        for (source, row), count, keys in zip(places, counts[order].tolist(), keys_of_places, strict=True):
            for number, key in enumerate(keys):
                uses[key] += count
                seen.setdefault(key, Seen(key, source, row, number))
            bar.update()
    seen.pop("", None)  # those that cannot be read
    return sorted(seen.values(), key=lambda picture: -uses[picture.key])


def _shared(mine: _Reader, workers: int, total: int) -> Iterator[Any]:
    """What ranks read of every world-size-th place each, put together in order; travels as JSON."""
    found, world = _read(mine, workers), dist.world_size()
    for start in range(0, total, WINDOW * world):
        told = dist.gather_objects(list(islice(found, WINDOW)))
        yield from (told[index % world][index // world] for index in range(min(WINDOW * world, total - start)))


def _read(reader: _Reader, workers: int) -> Iterator[Any]:
    """What a reader makes of each of its places, in order; raises its errors here."""
    for found in read_ahead(reader, range(len(reader)), workers):
        if isinstance(found, Vlm2VecError):
            raise found
        yield found


class _Reader(Dataset[Any]):
    """One place after the other. An error that can be explained is returned: torch would wrap it in the traceback of a worker."""

    def __init__(self, places: Sequence[Any], mixture: PairSource, explicit_negatives: bool) -> None:
        self.places, self.mixture, self.explicit_negatives = places, mixture, explicit_negatives

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.read(self.places[index])
        except Vlm2VecError as error:
            return error

    def read(self, place: Any) -> Any:
        """What is wanted of a place."""
        raise NotImplementedError

    def pictures(self, source: int, row: int) -> list[ImageRef]:
        """The pictures of a pair in the order in which they are read; none of a pair that names one outside its root."""
        try:
            pair = self.mixture.sources[source][row]
        except ImageError:
            return []
        return [image for item in items_of(pair, self.explicit_negatives) for image in item.images]


class _Keys(_Reader):
    """(source, row) -> content keys of the pictures of that pair, "" for one that cannot be read. A file is read once in each worker."""

    def __init__(self, places: Sequence[Any], mixture: PairSource, explicit_negatives: bool) -> None:
        super().__init__(places, mixture, explicit_negatives)
        self.known: dict[str, str] = {}

    def read(self, place: tuple[int, int]) -> list[str]:
        return [self._key(image) for image in self.pictures(*place)]

    def _key(self, image: ImageRef) -> str:
        if image.key not in self.known:
            try:
                self.known[image.key] = content_key(image)
            except ImageError:
                self.known[image.key] = ""
        return self.known[image.key]


class _Inputs(_Reader):
    """Seen -> the model inputs of that picture, None where it cannot be decoded."""

    def __init__(self, places: Sequence[Seen], mixture: PairSource, explicit_negatives: bool, processor: Processor) -> None:
        super().__init__(places, mixture, explicit_negatives)
        self.processor = processor

    def read(self, place: Seen) -> Picture | None:
        try:
            return self.processor.picture(decoded(self.processor, self.pictures(place.source, place.row)[place.number]))
        except ImageError:
            return None


# -- encoding ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Filler:
    """Encodes pictures of a mixture into a cache; `workers` processes decode them."""

    cache: FeatureCache
    encoder: Encoder
    mixture: PairSource
    explicit_negatives: bool
    workers: int

    def fill(self, plan: Sequence[Seen], room: int) -> list[str]:
        """Encode from the start of `plan` what is not in the cache, until a picture would take more than `room` bytes; keys of what fits.

        Ranks encode a block each, tell each other the sizes and publish what fits. What a rank does not find afterwards it encodes itself:
        nothing where all ranks see the same folder.
        """
        kept: list[str] = []
        with log.progress(len(plan), "encoding pictures", "picture") as bar, self.encoder.evaluating():
            for block, fresh in self._turns(plan):
                fits, room, full = _fitting(block, fresh, self.cache, room)
                self._publish(fits, fresh)
                kept += fits
                bar.update(len(fits))
                if full:
                    _logger.info("data.feature_cache has no room for the other pictures; every step decodes and encodes those it draws")
                    break
            dist.barrier()
            lost = set(self.cache.missing(kept))
            for block in _blocks([seen for seen in plan if seen.key in lost]):
                self._publish([seen.key for seen in block], dict(self._encoded(block)))
        return kept

    def _turns(self, plan: Sequence[Seen]) -> Iterator[tuple[Sequence[Seen], dict[str, Picture]]]:
        """This rank's blocks, and of each the pictures that were not in the cache. Every rank has equally many, the last may be empty."""
        absent = set(self.cache.missing([seen.key for seen in plan]))
        mine = _blocks(plan)[dist.rank() :: dist.world_size()]
        made = self._encoded([seen for block in mine for seen in block if seen.key in absent])
        for turn in range(math.ceil(len(plan) / (BLOCK * dist.world_size()))):
            block = mine[turn] if turn < len(mine) else []
            yield block, dict(islice(made, sum(seen.key in absent for seen in block)))

    def _encoded(self, part: Sequence[Seen]) -> Iterator[tuple[str, Picture]]:
        """Key and features of each picture of `part` in order, {} for one that cannot be decoded."""
        inputs = _read(_Inputs(part, self.mixture, self.explicit_negatives, self.encoder.processor), self.workers)
        for seen, picture in zip(part, inputs, strict=True):
            yield seen.key, self.encoder.picture_features(picture) if picture else {}

    def _publish(self, keys: Sequence[str], made: dict[str, Picture]) -> None:
        if pictures := {key: made[key] for key in keys if made.get(key)}:
            self.cache.put(pictures)


def _fitting(block: Sequence[Seen], fresh: dict[str, Picture], cache: FeatureCache, room: int) -> tuple[list[str], int, bool]:
    """Of all ranks' blocks the keys that fit, the room that is left, and whether one did not fit."""
    sizes = {key: size_of(picture) for key, picture in fresh.items() if picture}
    told = dist.gather_objects([[seen.key, size] for seen in block if (size := sizes.get(seen.key) or cache.sizes.get(seen.key))])
    entries = [entry for of_rank in told for entry in of_rank]
    totals = list(accumulate((size for _, size in entries), initial=0))
    count = sum(total <= room for total in totals[1:])
    return [key for key, _ in entries[:count]], room - totals[count], count < len(entries)


def _blocks(plan: Sequence[Seen]) -> list[Sequence[Seen]]:
    return [plan[start : start + BLOCK] for start in range(0, len(plan), BLOCK)]
