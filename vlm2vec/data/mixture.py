"""The training data of a recipe: its sources, and which of their pairs make up each global batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm2vec import io
from vlm2vec.data.mmeb import TrainRows, read_train
from vlm2vec.data.own.read import OwnPairs, is_own, read_pairs
from vlm2vec.data.readers import find_files
from vlm2vec.data.sampler import Array, Order
from vlm2vec.data.tiny import TINY_ROOT, tiny_root
from vlm2vec.data.types import Pair
from vlm2vec.errors import RecipeError

if TYPE_CHECKING:
    from vlm2vec.config import DataConfig, Recipe, SourceConfig


@dataclass(frozen=True, eq=False)
class Mixture:
    """Pairs by global batch. A batch is read when asked for, on its own: what came before it is neither read nor counted through."""

    sources: tuple[TrainRows | OwnPairs, ...]
    order: Order
    caps: tuple[int | None, ...]

    def __len__(self) -> int:
        """Pairs drawn in an epoch."""
        return len(self.order)

    def draws(self, index: int, rank: int = 0, world_size: int = 1) -> Array:
        """(source, row) of each pair of global batch `index`, or of the equal, contiguous share that falls to `rank`. Reads nothing.

        Raises RecipeError when the batch cannot be shared equally.
        """
        batch = self.order.global_batch
        if batch % world_size:
            unit = math.lcm(world_size, max(1, self.order.block))
            near = [size for size in (batch // unit * unit, (batch // unit + 1) * unit) if size]
            choice = " or ".join(map(str, near))
            raise RecipeError(f"train.global_batch ({batch}) is not divisible by {world_size} processes; nearest: {choice}")
        share = batch // world_size
        return self.order.batch(index)[rank * share : (rank + 1) * share]

    def batch_ids(self, index: int, rank: int = 0, world_size: int = 1) -> list[str]:
        """Ids of the pairs that `pairs` would give. Reads nothing."""
        return [self.sources[source].id(row) for source, row in self.draws(index, rank, world_size).tolist()]

    def pairs(self, index: int, rank: int = 0, world_size: int = 1) -> list[Pair]:
        """The pairs of global batch `index`, counted from 0 (step x accumulate + micro-step), or the share of one rank."""
        return [self.sources[source][row] for source, row in self.draws(index, rank, world_size).tolist()]

    def table(self) -> list[dict[str, Any]]:
        """Per source: name, rows in its files, cap, rows used, weight and share of the draws (0 to 1)."""
        columns = zip(self.sources, self.caps, self.order.weights, self.order.shares, strict=True)
        return [
            {"name": source.name, "rows": source.total, "cap": cap, "used": len(source), "weight": weight, "share": share}
            for source, cap, weight, share in columns
        ]

    @cached_property
    def digest(self) -> str:
        """Fingerprint of the rows: sha256 over name, rows used and content of the files of each source. Pictures are not part of it."""
        return io.digest([[source.name, len(source), [io.sha256_file(file) for file in source.files]] for source in self.sources])


def build_mixture(data: DataConfig, loss_uses_negatives: bool, global_batch: int, seed: int) -> Mixture:
    """Open the sources of `data`, check every row, and lay out the order of their pairs.

    Negatives that the loss does not use are not read, so their pictures are never decoded. The root "builtin/tiny" stands for made-up rows
    under the same names. Raises DataError naming the file or row, RecipeError for weights, blocks or batches that make no sense.
    """
    folders = [source.path or source.name for source in data.sources]
    root = tiny_root(folders) if data.root == TINY_ROOT else Path(data.root)
    sources = tuple(_open(root, source, folder, seed, loss_uses_negatives) for source, folder in zip(data.sources, folders, strict=True))
    order = Order(
        names=[source.name for source in sources],
        sizes=[len(source) for source in sources],
        weights=[source.weight for source in data.sources],
        block=data.block,
        global_batch=global_batch,
        seed=seed,
    )
    return Mixture(sources, order, tuple(source.cap for source in data.sources))


def _open(root: Path, source: SourceConfig, path: str, seed: int, negatives: bool) -> TrainRows | OwnPairs:
    """A source in the layout that its first file has: MMEB's, or the schema of one's own data."""
    files = find_files(root, path, source.split)
    if is_own(files[0]):
        return read_pairs(root, source.name, files, source.cap, seed, negatives, source.take)
    return read_train(root, source.name, path, source.split, source.cap, seed, negatives, source.take)


def mixture_of(recipe: Recipe) -> Mixture:
    """The pairs of the recipe, in the order that its seed, blocks and global batch fix."""
    return build_mixture(recipe.data, recipe.loss.explicit_negatives, recipe.train.global_batch, recipe.run.seed)


def total_steps(recipe: Recipe, mixture: Mixture) -> int:
    """Optimizer steps of the whole run."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    per_epoch = len(mixture) / (recipe.train.global_batch * recipe.train.accumulate)
    return max(1, math.floor(per_epoch * (recipe.train.epochs or 0)))
