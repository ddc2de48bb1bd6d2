"""What nobody can beat: the operations that a step needs over the rate that this device really multiplies at.

The rate is measured in the run, in its number format and with its threads, on the products of the model: each of its matrices once, on as
many rows as a chunk has. Operations come from the library's own arithmetic, which is held against torch's counter of operations.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear

from benchmarks.throughput.measure import spent
from benchmarks.throughput.ours import Ours
from benchmarks.throughput.setting import DTYPES, Setting
from vlm2vec.backbones.shapes import shape_of
from vlm2vec.collate import Features
from vlm2vec.data.images import load_image
from vlm2vec.data.types import Item
from vlm2vec.estimate import kept_chunks
from vlm2vec.flops import Chunk, Linear, Stack, step_cost, useful_cost
from vlm2vec.inventory import Inventory, take
from vlm2vec.workload import Entry, Looker, Workload

TRIES, CALLS = 3, 4
COPY = 2**26  # bytes that a copy moves when bandwidth is measured


@dataclass(frozen=True)
class Rates:
    """Operations per second of the model's own products, and bytes per second of a copy, read and written; of a CPU per second of a thread,
    so that it does not matter what else runs.
    """

    products: float
    copying: float


def measure_rates(inventory: Inventory, setting: Setting) -> Rates:
    """The best of some tries each: others on the machine, who share its caches, only make it worse."""
    sizes = Counter((op.inputs, op.outputs) for stack in inventory.stacks for op in stack.ops if isinstance(op, Linear))
    options: dict[str, Any] = {"dtype": getattr(torch, DTYPES[setting.precision]), "device": setting.device}
    rows = setting.chunk_tokens
    operations = taken = 0.0
    for (inputs, outputs), count in sizes.items():
        given, weight = torch.randn((rows, inputs), **options), torch.randn((outputs, inputs), **options)
        operations += count * 2.0 * rows * inputs * outputs
        taken += count * _best(partial(linear, given, weight))
    source = torch.zeros(COPY // 4, device=setting.device)
    return Rates(operations / taken, 2 * COPY / _best(partial(torch.empty_like(source).copy_, source)))


def _best(function: Callable[[], Any]) -> float:
    """Busy seconds of one call; the calls of a try overlap on a GPU."""

    def calls() -> None:
        for _ in range(CALLS):
            function()

    calls()
    return min(spent(calls)[0].busy for _ in range(TRIES)) / CALLS


class Arithmetic:
    """Operations of batches on one model."""

    def __init__(self, ours: Ours) -> None:
        shape = shape_of(ours.recipe.model)
        self.recipe, self.inventory = ours.recipe, take(shape.backbone, ours.recipe)
        assert ours.step.budget is not None, "the setting leaves nothing open"
        self.budget = ours.step.budget
        self.looker = Looker(shape, self.inventory.patch)

    def entries(self, items: Sequence[Item], features: Sequence[Features]) -> list[Entry]:
        """What items cost, of which features are there."""
        pictures = [tuple(self.looker.look(load_image(image).size) for image in item.images) for item in items]
        return [Entry(len(tokens), looked) for tokens, looked in zip(features, pictures, strict=True)]

    def ours(self, entries: Sequence[Entry]) -> dict[str, float]:
        """Our step over the distinct items: `useful` and `done` operations, tokens, padding."""
        (chunks,) = Workload((tuple(entries),), 1, "").chunks(self.budget.chunk_tokens)
        return {"useful": self.useful(entries), **self._done(self.inventory.stacks, chunks, kept_chunks(chunks, self.budget.keep_tokens))}

    def peer(self, columns: Sequence[Sequence[Entry]], cuts: Sequence[list[list[int]]]) -> dict[str, float]:
        """The peer's step on its mini-batches: the towers run in both passes, the last layer at every token."""
        cut = [[column[row] for row in rows] for column, groups in zip(columns, cuts, strict=True) for rows in groups]
        return self._done([_plain(stack) for stack in self.inventory.stacks], [_one_chunk(group) for group in cut], 0)

    def useful(self, entries: Sequence[Entry]) -> float:
        """What the mathematics of a step needs."""
        return sum(useful_cost(self.inventory.stacks, [_one_chunk(entries)], self.inventory.extra).values())

    def forward(self, entries: Sequence[Entry]) -> float:
        """What an encoding needs."""
        chunk, extra = _one_chunk(entries), self.inventory.extra
        stacks = [stack for stack in self.inventory.stacks if stack.part == "language" or chunk.pictures]
        return sum(stack.cost(chunk.load(stack.part, extra, padded=False), lean=True).forward for stack in stacks)

    def bytes_read(self, chunks: float) -> float:
        """Weights once per pass over a chunk, of which a training step makes three."""
        return 3 * chunks * self.inventory.total * torch.finfo(getattr(torch, self.recipe.model.dtype)).bits / 8

    def _done(self, stacks: Sequence[Stack], chunks: Sequence[Chunk], kept: int) -> dict[str, float]:
        tokens, padded = sum(sum(chunk.lengths) for chunk in chunks), sum(chunk.padded for chunk in chunks)
        return {
            "done": sum(step_cost(stacks, chunks, self.inventory.extra, kept).values()),
            "tokens": tokens,
            "padding": 1 - tokens / padded,
            "largest": max(chunk.padded for chunk in chunks),
            "chunks": len(chunks),
        }


def _plain(stack: Stack) -> Stack:
    """The stack of who does not save what we do."""
    ops = tuple(replace(op, last=False) if isinstance(op, Linear) else op for op in stack.ops)
    return replace(stack, ops=ops, replayed=False)


def _one_chunk(entries: Sequence[Entry]) -> Chunk:
    """All entries in one chunk."""
    ((chunk,),) = Workload((tuple(entries),), 1, "").chunks(sys.maxsize)
    return chunk
