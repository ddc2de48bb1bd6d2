"""Our side: the library's own encoder, step and engine, as the trainer puts them together."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.throughput.measure import Label, language_pass
from benchmarks.throughput.setting import Setting
from vlm2vec import batch as batches
from vlm2vec.batch import Batch, make_batch
from vlm2vec.config import Recipe
from vlm2vec.data.types import Item, Pair
from vlm2vec.engines import prepare
from vlm2vec.feature_cache import FeatureCache
from vlm2vec.losses import InfoNCE
from vlm2vec.precompute import precompute
from vlm2vec.step import Step
from vlm2vec.trainer import load_encoder

RATE = 0.0  # the learning rate: weights stay what they are, so every repetition computes the same


class Ours:
    """`recipe` is the setting's, or one that differs in what an ablation switches."""

    def __init__(self, setting: Setting, recipe: Recipe | None = None) -> None:
        recipe = recipe or setting.recipe
        folder = tempfile.mkdtemp(dir=setting.folder)  # a run keeps to the chunks that its folder says, and these may be another variant's
        self.setting, self.recipe = setting, replace(recipe, run=replace(recipe.run, dir=folder))
        self.encoder = load_encoder(self.recipe, setting.adapter).to(setting.device)
        self.engine = prepare(self.recipe.train, self.encoder, InfoNCE(self.recipe.loss).to(setting.device))
        self.step = Step(self.recipe, self.engine)
        self.said: dict[str, float] = {}  # the row of the log of the last step
        self.cache: FeatureCache | None = None

    def fill_cache(self, pairs: Sequence[Pair]) -> None:
        """Encode the pictures of the pairs beforehand, if the recipe asks for it."""
        self.cache = precompute(self.recipe, self.encoder, Listed(pairs), 1)

    def prepare(self, pairs: Sequence[Pair]) -> Batch:
        """From files to features, as a loader worker does it."""
        processor = self.encoder.processor
        items = {item.key: item for pair in pairs for item in (pair.query, pair.positive)}
        return make_batch(pairs, processor, known={key: batches.featurize(processor, item, self.cache) for key, item in items.items()})

    def train(self, batch: Batch) -> None:
        """One step: encode, contrast, go back, update."""
        self.said, _ = self.step(0, [batch], RATE)

    def encode(self, items: Sequence[Item]) -> Tensor:
        """Embeddings from files."""
        return self.encoder.encode(items, chunk_tokens=self.setting.chunk_tokens)

    def gradients(self, batch: Batch) -> dict[str, Tensor]:
        """What a step would hand to the optimizer, by names inside the model."""
        found: dict[str, Tensor] = {}

        def note(lr: float) -> None:
            found.update({inner(name): parameter.grad.clone() for name, parameter in self.engine.parameters.items()})  # type: ignore[union-attr]
            self.engine.forget()

        with mock.patch.object(self.engine, "step", note):
            self.train(batch)
        return found

    def stages(self) -> list[tuple[Any, str, Label]]:
        """What to time under which name."""
        encoder, processor = self.encoder, self.encoder.processor
        return [
            (batches, "load_image", "decode"),
            (processor, "image_inputs", "process pictures"),
            (processor, "features", "tokenize"),
            (processor, "collate", "collate"),
            (self.engine, "embed", "transfer"),
            (encoder, "embed", language_pass),
            *((tower, "forward", "towers") for tower in encoder.backbone.towers()),
            (self.step.loss, "forward", "loss"),
            (self.engine, "backward", "backward"),
            *((self.engine, name, "optimizer") for name in ("reduce", "clip", "step")),
        ]


class Listed:
    """Pairs as a mixture of one source gives them: all in one global batch."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.sources = [_Rows(pairs)]

    def draws(self, index: int, rank: int = 0, world_size: int = 1) -> NDArray[np.int64]:
        """(source, row) of each pair."""
        return np.array([(0, row) for row in range(rank, len(self.sources[0]), world_size)], dtype=np.int64)


class _Rows(list[Pair]):
    def id(self, index: int) -> str:
        return self[index].id


def inner(name: str) -> str:
    """A parameter's name as the model without its head calls it."""
    return name.removeprefix("encoder.").removeprefix("model.")


def differs(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest relative difference of a gradient: the norm of the difference over the norm, tensor by tensor. Names must agree."""
    assert first.keys() == second.keys() and first, "the two sides train different tensors"
    return max(float((first[name].double() - second[name].double()).norm() / first[name].double().norm()) for name in first)
