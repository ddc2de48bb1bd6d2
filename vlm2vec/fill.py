"""Bring the items of an evaluation into the cache: each distinct item once over all sets, several ranks side by side.

Items are encoded set by set in blocks that depend on the items alone, so that a resumed run, and a run on another number of ranks, repeats
whole blocks in the same company. A kill costs the block at hand.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm2vec import dist, log, prompts
from vlm2vec.cache import EmbeddingCache
from vlm2vec.data.types import Item
from vlm2vec.errors import NonFiniteError
from vlm2vec.evalsets import Intake, Task

BLOCK = 512  # items per shard of the cache
logger = log.get_logger(__name__)


@dataclass(frozen=True)
class Block:
    """Consecutive items, by content digest, of one set; an item that several sets need belongs to the first."""

    name: str
    contents: list[str]


@dataclass
class Filled:
    """How many items this rank encoded, and the seconds it spent on each set."""

    encoded: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


def fill(encoder: Any, cache: EmbeddingCache, intake: Intake, chunk_tokens: int, workers: int = 0, progress: bool | None = None) -> Filled:
    """Encode what is not in the cache yet.

    Every rank fills its own blocks and then what is missing still, which is nothing where all ranks see the same folder. Raises
    NonFiniteError for an embedding that is NaN or infinite.
    """
    blocks = blocks_of(intake.tasks)
    done = Filled()
    for share in (blocks[dist.rank() :: dist.world_size()], blocks):
        todo = [found for block in share if (found := _missing(cache, block)).contents]
        rows = encoder.stream(
            [intake.items[content] for block in todo for content in block.contents],
            [len(block.contents) for block in todo],
            chunk_tokens=chunk_tokens,
            workers=workers,
        )
        _publish(todo, rows, cache, intake.items, done, progress)
        dist.barrier()
    return done


def blocks_of(tasks: Sequence[Task]) -> list[Block]:
    """Every item of all sets once, set after set, in blocks of BLOCK."""
    seen: set[str] = set()
    blocks = []
    for task in tasks:
        fresh = sorted({*task.queries, *task.targets} - seen)
        seen.update(fresh)
        blocks += [Block(task.spec.name, fresh[start : start + BLOCK]) for start in range(0, len(fresh), BLOCK)]
    return blocks


def _missing(cache: EmbeddingCache, block: Block) -> Block:
    keys = {cache.key(content): content for content in block.contents}
    return Block(block.name, [keys[key] for key in cache.missing(list(keys))])


def _publish(
    todo: Sequence[Block], rows: Iterator[Any], cache: EmbeddingCache, items: Mapping[str, Item], done: Filled, progress: bool | None
) -> None:
    """Keep the rows of each block as they come, with a bar for the set at hand and one for all sets."""
    with log.progress(sum(len(block.contents) for block in todo), "all sets", "item", enabled=progress) as whole:
        for name, blocks in groupby(todo, key=lambda block: block.name):
            start = time.monotonic()
            mine = list(blocks)
            count = sum(len(block.contents) for block in mine)
            with log.progress(count, name, "item", enabled=progress, leave=False) as bar:
                for block, rows_ND in zip(mine, rows, strict=False):
                    cache.put([cache.key(content) for content in block.contents], _finite(block, np.asarray(rows_ND, np.float32), items))
                    bar.update(len(block.contents))
                    whole.update(len(block.contents))
            done.encoded += count
            done.seconds[name] = done.seconds.get(name, 0.0) + time.monotonic() - start
            logger.info("%s: %d items encoded in %.1f s", name, count, time.monotonic() - start)


def _finite(block: Block, rows_ND: NDArray[np.float32], items: Mapping[str, Item]) -> NDArray[np.float32]:
    bad = ~np.isfinite(rows_ND).all(axis=1)
    if bad.any():
        first = items[block.contents[int(bad.argmax())]]
        name = first.images[0].label if first.images else repr(prompts.render(first)[:80])
        raise NonFiniteError(f"{int(bad.sum())} of {len(rows_ND)} embeddings are NaN or infinite, first {name}; nothing was scored")
    return rows_ND
