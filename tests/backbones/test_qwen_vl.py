"""Qwen-VL against transformers: token ids and pixels of its processor, positions and hidden states of its model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.backbones.common import embed, mixed_items, picture, stock_processor
from vlm2vec.backbones import load_backbone, registry
from vlm2vec.backbones.base import Backbone
from vlm2vec.config import ModelConfig
from vlm2vec.errors import ImageError, RecipeError
from vlm2vec.pooling import normalize, pool

REFERENCE = Path(__file__).parents[1] / "data" / "qwen2vl"
Tiny = Callable[..., Backbone]
TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
STOCK = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("size", [(64, 64), (300, 90), (20, 30), (57, 500)])
def test_ids_and_pixels_equal_those_of_the_stock_processor(tiny: Tiny, model_type: str, size: tuple[int, int]) -> None:
    processor = tiny(model_type).processor
    stock = stock_processor(STOCK[model_type], tokenizer=processor.tokenizer, image_processor=processor.image_processor)
    image = picture(*size)
    ours = processor.features("<|image_1|>\nWhat is this?\n", [image])
    theirs = stock(text=["<|image_pad|>\nWhat is this?\n"], images=[[image]], return_tensors="pt")
    assert torch.equal(ours.input_ids, theirs["input_ids"][0])
    assert torch.equal(ours.images[0]["pixel_values"], theirs["pixel_values"])
    assert torch.equal(ours.images[0]["image_grid_thw"], theirs["image_grid_thw"])


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_and_states_equal_those_of_the_model_itself(tiny: Tiny, model_type: str, side: str) -> None:
    backbone = tiny(model_type, padding_side=side)
    batch = backbone.processor.collate(mixed_items(backbone))
    types = (batch["input_ids"] == backbone.model.config.image_token_id).long()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "image_grid_thw": batch["image_grid_thw"]}
    native, _ = backbone.model.model.get_rope_index(**inputs, mm_token_type_ids=types)
    assert torch.equal(batch["position_ids"], native)
    with torch.no_grad():
        states = backbone.model.model(**inputs, mm_token_type_ids=types, pixel_values=batch["pixel_values"]).last_hidden_state
        assert torch.equal(backbone.hidden(batch), states)


def test_code_that_comes_with_the_weights_is_left_alone(tmp_path: Path) -> None:
    folder = registry()["qwen2_vl"].tiny_checkpoint(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "modeling_x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Model: ...\n")
    automatic = {"AutoConfig": "modeling_x.Model", "AutoModel": "modeling_x.Model", "AutoModelForImageTextToText": "modeling_x.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": automatic}))
    assert type(load_backbone(ModelConfig(path=str(folder))).model).__name__ == "Qwen2VLForConditionalGeneration"
    assert not (tmp_path / "ran").exists()


def test_text_alone_has_equal_positions_on_all_axes(tiny: Tiny) -> None:
    processor = tiny("qwen2_vl", padding_side="left").processor
    rows = [processor.features(text, []) for text in ("ab", "abcd")]
    expected = torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]])
    assert torch.equal(processor.collate(rows)["position_ids"], expected.expand(3, -1, -1))


def test_pictures_that_touch_keep_their_own_positions(tiny: Tiny) -> None:
    processor = tiny("qwen2_vl").processor
    row = processor.features("<|image_1|><|image_2|>x", [picture(84, 56), picture(56, 56)])  # 2 x 3 and 2 x 2 tokens
    time, height, width = processor.collate([row])["position_ids"][:, 0].tolist()
    assert time == [0] * 6 + [3] * 4 + [5]
    assert height == [0, 0, 0, 1, 1, 1, 3, 3, 4, 4, 5]
    assert width == [0, 1, 2, 0, 1, 2, 3, 4, 3, 4, 5]


def test_a_chunk_does_not_see_the_chunk_before(tiny: Tiny) -> None:
    backbone, fresh = tiny("qwen2_vl"), tiny("qwen2_vl")
    words = [backbone.processor.features("just words\n", [])]
    embed(backbone, mixed_items(backbone))
    assert torch.equal(embed(backbone, words), embed(fresh, words))


def test_flat_positions_count_through_pictures(tiny: Tiny) -> None:
    processor = tiny("qwen2_vl", positions="flat", padding_side="left").processor
    rows = [processor.features("<|image_1|>xy", [picture(56, 56)]), processor.features("z", [])]
    expected = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]])
    assert torch.equal(processor.collate(rows)["position_ids"], expected.expand(3, -1, -1))
    assert processor.fingerprint != tiny("qwen2_vl", padding_side="left").processor.fingerprint


def test_flat_positions_are_refused_where_there_is_nothing_to_flatten(tiny: Tiny) -> None:
    with pytest.raises(RecipeError, match="model.positions: flat is only for models"):
        tiny("smolvlm", positions="flat")


def test_pixel_limits_bound_the_tokens(tiny: Tiny) -> None:
    small = tiny("qwen2_vl", max_pixels=56 * 56).processor
    large = tiny("qwen2_vl", min_pixels=112 * 112).processor
    assert small.image_tokens_estimate(1000, 1000) == 4
    assert large.image_tokens_estimate(30, 30) == 16
    assert len(small.image_token_ids(small.image_inputs(picture(1000, 1000)))) == 4
    assert len(large.image_token_ids(large.image_inputs(picture(30, 30)))) == 16


def test_a_strip_of_a_picture_is_refused(tiny: Tiny) -> None:
    processor = tiny("qwen2_vl").processor
    with pytest.raises(ImageError, match="402 x 2 pixels is longer than 200:1"):
        processor.image_inputs(picture(402, 2))
    with pytest.raises(ImageError, match="longer than 200:1"):
        processor.image_tokens_estimate(402, 2)


def test_the_merger_is_the_projector(tiny: Tiny) -> None:
    backbone = tiny("qwen3_vl")
    assert backbone.part_of("model.visual.merger.linear_fc1.weight") == "projector"
    assert backbone.part_of("model.visual.deepstack_merger_list.0.norm.weight") == "projector"
    assert backbone.part_of("model.visual.blocks.0.attn.qkv.lora_A.default.weight") == "vision"
    assert backbone.part_of("base_model.model.model.language_model.layers.0.mlp.up_proj") == "language"


def test_the_published_code_makes_the_same_of_a_batch() -> None:
    expected = load_file(REFERENCE / "expected.safetensors")
    backbone = load_backbone(ModelConfig(path=str(REFERENCE), padding_side="left", positions="flat"))
    first, third = (Image.open(REFERENCE / f"image_row{row}.png").convert("RGB") for row in (0, 2))
    items = [("<|image_1|> Represent the given image\n", [first]), ("What is the question", []), ("<|image_1|> What\n", [third])]
    batch = backbone.processor.collate([backbone.processor.features(*item) for item in items])
    for name in ("input_ids", "attention_mask", "image_grid_thw"):
        assert torch.equal(batch[name], expected[name])
    with torch.no_grad():
        states = backbone.hidden(batch)
    real = expected["attention_mask"].bool()
    assert torch.equal(batch["position_ids"][:, real], expected["position_ids"][:, real])
    assert (states - expected["last_hidden_state"])[real].abs().max() < 2e-5
    assert (normalize(pool(states, batch["attention_mask"], "last")) - expected["pooled_last_l2"]).abs().max() < 1e-6
