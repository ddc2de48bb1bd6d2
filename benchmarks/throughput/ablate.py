"""What each exact saving brings: our step with it and without it, in turn, in one run. Its gradient must be the same.

A row is two variants of our side. A switch that the product has is a change of the recipe; what the product always does is undone here,
through the interfaces of the library. To add a row, add a variant and name it in ROWS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, get_args, get_type_hints
from unittest import mock

import torch
from torch import Tensor

from benchmarks.throughput.measure import Ratio, Spent, in_turn, spent
from benchmarks.throughput.ours import Ours, differs
from benchmarks.throughput.setting import Setting
from benchmarks.throughput.workloads import Workload
from vlm2vec import step
from vlm2vec.batch import Batch
from vlm2vec.config import Recipe
from vlm2vec.data.types import Pair

EVERYTHING = 10**9  # tokens: more than any batch has


@dataclass(frozen=True)
class Variant:
    """One way to run our step: changes of the recipe's sections, something entered while it runs, or another batch of the same pairs."""

    changes: tuple[tuple[str, str, Any], ...] = ()  # (section, key, value)
    inside: Callable[[Ours], AbstractContextManager[Any]] = lambda ours: nullcontext()
    batch: Callable[[Batch], Batch] = lambda batch: batch

    def recipe(self, recipe: Recipe) -> Recipe:
        """`recipe` with the changes."""
        for section, key, value in self.changes:
            recipe = replace(recipe, **{section: replace(getattr(recipe, section), **{key: value})})
        return recipe

    def offered(self, recipe: Recipe) -> bool:
        """Whether this version of the library knows the keys and values."""
        return all(_knows(getattr(recipe, section), key, value) for section, key, value in self.changes)


def _knows(section: Any, key: str, value: Any) -> bool:
    if key not in {field.name for field in fields(section)}:
        return False
    choices = get_args(get_type_hints(type(section))[key])
    return not isinstance(value, str) or not choices or value in choices


class Built:
    """A variant ready to run on some pairs."""

    def __init__(self, variant: Variant, setting: Setting, pairs: Sequence[Pair]) -> None:
        self.variant = variant
        self.ours = Ours(setting, variant.recipe(setting.recipe))
        self.ours.fill_cache(pairs)
        self.batch = variant.batch(self.ours.prepare(pairs))

    def train(self) -> None:
        """One step, from features."""
        with self.variant.inside(self.ours):
            self.ours.train(self.batch)

    def timed(self) -> dict[str, Spent]:
        """What a step takes."""
        return {"train": spent(self.train)[0]}

    def gradients(self) -> dict[str, Tensor]:
        """Of one step; in float64 where weights are float32, so that rounding does not hide what a saving would change."""
        model, stored = self.ours.encoder.model, next(self.ours.encoder.model.parameters()).dtype
        if stored == torch.float32:
            model.double()
        try:
            with self.variant.inside(self.ours):
                return self.ours.gradients(self.batch)
        finally:
            if stored == torch.float32:
                model.float()


def _compiled(ours: Ours) -> AbstractContextManager[Any]:
    """What the trainer enters where the recipe compiles; asked for only where the recipe can."""
    from vlm2vec.engines.compiled import compiled

    return compiled(ours.encoder, ours.recipe.train)


# -- what is undone


def _with_head(ours: Ours) -> AbstractContextManager[Any]:
    """Call the whole model, scores over the vocabulary included, and read the last of all its layers' states."""
    backbone = ours.encoder.backbone

    def hidden(batch: dict[str, Tensor]) -> Tensor:
        return backbone.model(**batch, use_cache=False, output_hidden_states=True).hidden_states[-1]

    return mock.patch.object(backbone, "hidden", hidden)


def _whole_last_layer(ours: Ours) -> AbstractContextManager[Any]:
    """The last layer computes every token."""
    return mock.patch.object(ours.encoder.backbone, "narrows", False)


def _without_replay(ours: Ours) -> AbstractContextManager[Any]:
    """Nothing to replay: towers run in both passes."""
    return mock.patch.object(step, "leading_frozen", lambda modules: [])


@contextmanager
def _in_input_order(ours: Ours) -> Iterator[None]:
    """Chunks of a fixed number of items as they come: as many as fit the budget if all were as long as the longest of each chunk."""

    def plan(lengths: Sequence[int], budget: int, packed: bool) -> list[list[int]]:
        size = max(size for size in range(1, len(lengths) + 1) if size == 1 or _widest(lengths, size) <= budget)
        cut = (range(start, min(start + size, len(lengths))) for start in range(0, len(lengths), size))
        return [sorted(rows, key=lambda row: -lengths[row]) for rows in cut]  # a step takes the first of a chunk for its longest

    with mock.patch.object(step, "plan_chunks", plan):
        yield


def _widest(lengths: Sequence[int], size: int) -> int:
    """Padded tokens of the largest of the chunks of `size` items."""
    return max(len(rows) * max(rows) for rows in (lengths[start : start + size] for start in range(0, len(lengths), size)))


def _every_occurrence(batch: Batch) -> Batch:
    """A row for each occurrence: equal ids still say which rows are one item, so the loss is the same."""
    rows = torch.cat([batch.query_B, batch.positive_B, batch.negative_K])
    queries, positives = len(batch.query_B), len(batch.positive_B)
    place = torch.arange(len(rows))
    return replace(
        batch,
        features=[batch.features[row] for row in rows.tolist()],
        item_id_I=batch.item_id_I[rows],
        query_B=place[:queries],
        positive_B=place[queries : queries + positives],
        negative_K=place[queries + positives :],
    )


# -- the table

VARIANTS: dict[str, Variant] = {
    "ours": Variant(),
    "with head": Variant(inside=_with_head),
    "whole last layer": Variant(inside=_whole_last_layer),
    "towers twice": Variant(inside=_without_replay),
    "every occurrence": Variant(batch=_every_occurrence),
    "input order": Variant(inside=_in_input_order),
    "graphs kept": Variant((("train", "keep_tokens", EVERYTHING),)),
    "checkpointed": Variant((("train", "activation_checkpointing", True),)),
    "packed": Variant((("model", "attention", "packed"),)),
    "settled": Variant((("model", "attention", "packed"), ("train", "keep_tokens", None))),
    "features cached": Variant((("data", "feature_cache", 1.0),)),
    "compiled": Variant((("train", "compile", True),), inside=_compiled),
}


@dataclass(frozen=True)
class Row:
    """A saving by the names of two variants."""

    saving: str
    on: str
    off: str


ROWS = (
    Row("inner model without its head", "ours", "with head"),
    Row("last layer only where it is read", "ours", "whole last layer"),
    Row("frozen towers once (replay)", "ours", "towers twice"),
    Row("distinct items only", "ours", "every occurrence"),
    Row("chunks by tokens, sorted by length", "ours", "input order"),
    Row("all graphs kept (train.keep_tokens)", "graphs kept", "ours"),
    Row("activation checkpointing", "checkpointed", "ours"),
    Row("packed chunks (model.attention)", "packed", "ours"),
    Row("frozen features from disk (data.feature_cache)", "features cached", "ours"),
    Row("compiled layers (train.compile)", "compiled", "ours"),
)


def measure_row(
    row: Row, setting: Setting, workload: Workload, repeats: int, memory: Callable[[str], dict[str, int]] | None
) -> dict[str, Any] | None:
    """Ratio of times without and with the saving, memory of both, difference of gradients; None if this version has no such switch."""
    variants = VARIANTS[row.on], VARIANTS[row.off]
    if not all(variant.offered(setting.recipe) for variant in variants):
        return None
    built = [Built(variant, setting, workload.pairs) for variant in variants]
    difference = differs(*(side.gradients() for side in built))
    times = in_turn([side.timed for side in built], repeats)
    passed, computed = ([[getattr(found["train"], kind) for found in side] for side in times] for kind in ("passed", "computed"))
    return {
        "saving": row.saving,
        "difference": difference,
        "ratio": Ratio.of(*passed),
        "computed": Ratio.of(*computed),
        "memory": {name: memory(name)["training"] for name in (row.on, row.off)} if memory else {},
        "sides": [row.on, row.off],
    }
