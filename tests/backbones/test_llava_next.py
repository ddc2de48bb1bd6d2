"""LLaVA-1.6 against the published code: token counts, ids, pixels and hidden states."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.backbones.common import picture
from vlm2vec.backbones import load_backbone
from vlm2vec.backbones.base import Backbone
from vlm2vec.config import ModelConfig
from vlm2vec.pooling import normalize, pool

REFERENCE = Path(__file__).parents[1] / "data" / "llava_next"
COUNTS = json.loads((REFERENCE / "image_token_counts.json").read_text())["rows"]
PROMPTS = {
    "high_1344": "<|image_1|> Represent the given image with the following question: What is in the image\n",
    "low_128": "<|image_1|> Represent the given image\n",
}


@pytest.fixture(scope="module")
def published() -> Backbone:
    return load_backbone(ModelConfig(path=str(REFERENCE), padding_side="left"))


@pytest.mark.parametrize("name", PROMPTS)
def test_the_published_code_makes_the_same_of_an_item(published: Backbone, name: str) -> None:
    expected = {key.removeprefix(f"{name}."): tensor for key, tensor in load_file(REFERENCE / "expected.safetensors").items()}
    row = published.processor.features(PROMPTS[name], [Image.open(REFERENCE / f"{name}.png").convert("RGB")])
    assert torch.equal(row.input_ids, expected["input_ids"])
    assert torch.equal(row.images[0]["image_sizes"], expected["image_sizes"])
    assert torch.equal(row.images[0]["pixel_values"][..., ::21, ::21], expected["pixel_values_stride21"])
    batch = published.processor.collate([row])
    with torch.no_grad():
        states_1LD = published.hidden(batch)
    assert (states_1LD[0, expected["positions"]] - expected["states"]).abs().max() <= 2e-5
    assert (normalize(pool(states_1LD, batch["attention_mask"], "last"))[0] - expected["pooled_last_l2"]).abs().max() <= 1e-6


@pytest.mark.parametrize("size", COUNTS)
def test_token_counts_and_tiles_are_those_of_the_published_code(published: Backbone, size: str) -> None:
    width, height = map(int, size.split("x"))
    tokens, (_, *shape) = COUNTS[size]
    assert published.processor.image_tokens_estimate(width, height) == tokens
    inputs = published.processor.image_inputs(picture(width, height))
    assert list(inputs["pixel_values"].shape) == shape
    assert len(published.processor.image_token_ids(inputs)) == tokens


@pytest.mark.parametrize(("resize", "edge", "tokens"), [("high", 1344, 2928), ("mid", 672, 2928), ("low", 128, 1176), (336, 336, 1176)])
def test_resolutions_of_the_published_code(resize: str | int, edge: int, tokens: int) -> None:
    processor = load_backbone(ModelConfig(path=str(REFERENCE), resize=resize)).processor
    assert processor.edge_after_resize == edge
    assert processor.image_tokens_estimate(640, 480) == tokens == COUNTS[f"{edge}x{edge}"][0]


def test_only_the_tiles_of_a_picture_are_computed(tiny: Callable[..., Backbone]) -> None:
    backbone = tiny("llava_next")
    rows = [backbone.processor.features("<|image_1|>x", [picture(*size)]) for size in ((32, 64), (64, 64))]
    assert [len(row.images[0]["pixel_values"]) for row in rows] == [3, 5]
    assert backbone.processor.collate(rows)["pixel_values"].shape == (8, 3, 32, 32)


def test_the_newline_of_a_picture_is_learnt_with_the_projector(tiny: Callable[..., Backbone]) -> None:
    assert tiny("llava_next").part_of("model.image_newline") == "projector"
