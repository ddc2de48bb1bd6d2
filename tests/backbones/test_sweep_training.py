"""What training needs of every family in the registry, on its miniature in float64: exact gradients, and adapters that survive."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.backbones.common import embed, mixed_items, picture
from vlm2vec.backbones import registry
from vlm2vec.backbones.base import Backbone
from vlm2vec.backbones.pictures import PIXELS, VECTORS
from vlm2vec.collate import Features
from vlm2vec.config import LoraConfig
from vlm2vec.gradcache import cached_backward
from vlm2vec.lora import add_lora, load_adapter, save_adapter
from vlm2vec.pooling import normalize, pool
from vlm2vec.replay import Replay

Tiny = Callable[..., Backbone]
CHUNKS = [[4], [2, 0], [5, 1], [3]]
pytestmark = pytest.mark.parametrize("model_type", sorted(registry()))


def six_items(backbone: Backbone) -> list[Features]:
    return [*mixed_items(backbone), backbone.processor.features("<|image_1|>\nlast of six\n", [picture(80, 30, 5)])]


def unit(backbone: Backbone, rows: list[Features]) -> Tensor:
    """Embeddings (C, D) of one chunk with a graph; pixels follow the precision of the weights."""
    batch = backbone.processor.collate(rows)
    dtype = next(backbone.model.parameters()).dtype
    batch = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    return normalize(pool(backbone.hidden(batch), batch["attention_mask"], "last"))


def contrast(embedding_ID: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """InfoNCE of the first three items against the last three, whatever the order of the chunks."""
    order = torch.tensor([item for chunk in CHUNKS for item in chunk])
    item_ID = embedding_ID[torch.argsort(order)]
    return torch.nn.functional.cross_entropy(item_ID[:3] @ item_ID[3:].T / 0.1, torch.arange(3)), {}


def gradients(backbone: Backbone) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in backbone.model.named_parameters() if p.grad is not None and p.grad.any()}
    backbone.model.zero_grad()
    return found


def backward(backbone: Backbone, rows: list[Features], keep: int = 0, replay: Replay | None = None) -> dict[str, Tensor]:
    def encode(chunk: list[int]) -> Tensor:
        if replay is None:
            return unit(backbone, [rows[item] for item in chunk])
        with replay.chunk(chunk[0]):
            return unit(backbone, [rows[item] for item in chunk])

    cached_backward(CHUNKS, encode, contrast, seeds=range(len(CHUNKS)), keep=keep)
    return gradients(backbone)


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest error of a gradient, relative to the largest gradient of all: a tensor may have none but rounding."""
    assert found.keys() == expected.keys()
    largest = max(float(gradient.norm()) for gradient in expected.values())
    return max(float((found[name] - expected[name]).norm() / max(float(expected[name].norm()), 1e-3 * largest)) for name in expected)


def test_gradcache_is_the_gradient_of_the_whole_batch(tiny: Tiny, model_type: str) -> None:
    backbone = tiny(model_type)
    backbone.model.double().eval()
    rows = six_items(backbone)
    cached = backward(backbone, rows)
    order = [item for chunk in CHUNKS for item in chunk]
    contrast(unit(backbone, [rows[item] for item in order]))[0].backward()
    whole = gradients(backbone)
    assert {backbone.part_of(name) for name in whole} == {"language", "projector", "vision"}
    assert worst(cached, whole) <= 1e-6


def test_frozen_towers_run_once_and_change_no_bit(tiny: Tiny, model_type: str) -> None:
    backbone = tiny(model_type)
    backbone.model.eval()
    towers = backbone.towers()
    for name, parameter in backbone.model.named_parameters():
        parameter.requires_grad_(backbone.part_of(name) == "language")
    rows = six_items(backbone)
    plain = backward(backbone, rows)
    with Replay(towers) as replay:
        replayed = backward(backbone, rows, replay=replay)
    assert replay.runs == [3] * len(towers)  # chunks with a picture
    assert plain.keys() == replayed.keys()
    assert all(torch.equal(plain[name], replayed[name]) for name in plain)


@pytest.mark.parametrize("cached", ["all", "every second"])
def test_features_stand_for_pixels(tiny: Tiny, model_type: str, cached: str) -> None:
    """Each picture through the towers alone, and its features in place of its pixels; chunks of both kinds and without pictures."""
    backbone = tiny(model_type)
    backbone.model.double().eval()
    for name, parameter in backbone.model.named_parameters():
        parameter.requires_grad_(backbone.part_of(name) == "language")
    rows = six_items(backbone)
    expected = backward(backbone, rows)
    numbers = itertools.count()
    known = [
        Features(row.input_ids, [features(backbone, image) if cached == "all" or next(numbers) % 2 else image for image in row.images])
        for row in rows
    ]
    assert backbone.takes_features
    with Replay(backbone.towers()) as replay:
        found = backward(backbone, known, replay=replay)
    assert worst(found, expected) <= 1e-6
    assert set(replay.runs) == {0 if cached == "all" else 3}  # as many as pictures that come as pixels, though GradCache asks twice


@torch.no_grad()
def features(backbone: Backbone, image: dict[str, Tensor]) -> dict[str, Tensor]:
    vectors = backbone.picture_features({name: exact(tensor) for name, tensor in backbone.processor.joined([image]).items()})
    return {**{name: tensor for name, tensor in image.items() if name != PIXELS}, VECTORS: vectors}


def exact(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def test_activation_checkpointing_changes_no_gradient(tiny: Tiny, model_type: str) -> None:
    backbone = tiny(model_type)
    backbone.model.train()
    rows = six_items(backbone)
    linear = [m for n, m in backbone.model.named_modules() if isinstance(m, torch.nn.Linear) and backbone.part_of(n) == "language"]
    runs: list[int] = []
    linear[0].register_forward_hook(lambda *_: runs.append(1))
    plain = backward(backbone, rows, keep=len(CHUNKS))
    once = len(runs)
    backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = backward(backbone, rows, keep=len(CHUNKS))
    assert len(runs) == 3 * once  # and each once more when the backward pass needs it
    assert worst(checkpointed, plain) <= 1e-6


def test_an_adapter_survives_saving_and_merging(tiny: Tiny, model_type: str, tmp_path: Path) -> None:
    backbone = tiny(model_type)
    backbone.model.eval()
    rows = six_items(backbone)
    plain = embed(backbone, rows)
    torch.manual_seed(0)  # the adapter starts from the global stream
    adapter = add_lora(backbone, LoraConfig(rank=2, parts=("language",)))
    backbone.model.eval()
    assert (embed(backbone, rows) - plain).abs().max() <= 1e-6
    stream = torch.Generator().manual_seed(1)
    for parameter in (parameter for parameter in backbone.model.parameters() if parameter.requires_grad):
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=stream))
    trained = embed(backbone, rows)
    assert (trained - plain).abs().amax(1).min() > 1e-3
    save_adapter(adapter, tmp_path)
    again = tiny(model_type)
    load_adapter(again, tmp_path)
    again.model.eval()
    assert torch.equal(embed(again, rows), trained)
    backbone.model = adapter.merge_and_unload()
    assert (embed(backbone, rows) - trained).abs().max() <= 1e-6
