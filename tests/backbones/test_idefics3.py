"""Idefics3 and SmolVLM against transformers: the expansion, the tiles and the hidden states of its own batching."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from tests.backbones.common import mixed_items, picture, stock_processor
from vlm2vec.backbones import load_backbone
from vlm2vec.backbones.base import Backbone
from vlm2vec.backbones.idefics3 import Idefics3Processor
from vlm2vec.config import ModelConfig
from vlm2vec.errors import ModelError, RecipeError

Tiny = Callable[..., Backbone]
STOCK = {"idefics3": "Idefics3Processor", "smolvlm": "SmolVLMProcessor"}
SIZES = [(64, 64), (300, 90), (20, 30), (57, 500), (32, 32), (33, 64)]


def _stock(processor: Idefics3Processor, model_type: str):
    parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
    return stock_processor(STOCK[model_type], image_seq_len=processor.tokens_per_tile, **parts)


@pytest.mark.parametrize("model_type", STOCK)
@pytest.mark.parametrize("splitting", [True, False])
def test_ids_and_pixels_equal_those_of_the_stock_processor(tiny: Tiny, model_type: str, splitting: bool) -> None:
    processor = tiny(model_type).processor
    processor.image_processor.do_image_splitting = splitting
    stock = _stock(processor, model_type)
    grids = set()
    for size in SIZES:
        image = picture(*size)
        ours = processor.features("<|image_1|>\nWhat is this?\n", [image])
        theirs = stock(text=["<image>\nWhat is this?\n"], images=[[image]], return_tensors="pt")
        assert torch.equal(ours.input_ids, theirs["input_ids"][0])
        assert torch.equal(ours.images[0]["pixel_values"], theirs["pixel_values"][0])
        grids.add(tuple(ours.images[0]["grid"].tolist()))
    assert grids == ({(2, 2), (1, 2), (2, 1)} if splitting else {(0, 0)})


@pytest.mark.parametrize("model_type", STOCK)
def test_a_tokenizer_that_begins_texts_does_so_here_too(tiny: Tiny, model_type: str) -> None:
    original = tiny(model_type).processor
    bos = original.tokenizer.bos_token
    frame = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, original.tokenizer.bos_token_id)])
    original.tokenizer.backend_tokenizer.post_processor = frame
    config = tiny(model_type).model.config
    processor = Idefics3Processor(original.tokenizer, original.image_processor, original.options, config)
    theirs = _stock(processor, model_type)(text=["<image>\nhi\n"], images=[[picture(60, 40)]], return_tensors="pt")
    assert processor.prefix == [original.tokenizer.bos_token_id]
    assert torch.equal(processor.features("<|image_1|>\nhi\n", [picture(60, 40)]).input_ids, theirs["input_ids"][0])


def test_a_marker_that_a_repository_added_as_plain_text_is_a_control_token_too(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder("smolvlm"), tmp_path / "model"))
    settings = json.loads((folder / "tokenizer.json").read_text())
    for token in settings["added_tokens"]:
        token["special"] = "row" not in token["content"]
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    processor = load_backbone(ModelConfig(path=str(folder))).processor
    marker = processor.tokenizer.convert_tokens_to_ids("<row_1_col_2>")
    assert marker not in processor.features("<row_1_col_2>", []).input_ids
    assert processor.features("<|image_1|><row_1_col_2>", [picture(64, 64)]).input_ids.tolist().count(marker) == 1


@pytest.mark.parametrize("model_type", STOCK)
def test_states_equal_those_of_the_padded_batch_of_the_stock_processor(tiny: Tiny, model_type: str) -> None:
    backbone = tiny(model_type)
    images = [[picture(90, 60)], [picture(60, 60, 1), picture(40, 100, 2)]]
    texts = ["<image>\nhi\n", "<image> and <image>\n"]
    batch = _stock(backbone.processor, model_type)(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
    prompts = ["<|image_1|>\nhi\n", "<|image_1|> and <|image_2|>\n"]
    rows = [backbone.processor.features(prompt, pictures) for prompt, pictures in zip(prompts, images, strict=True)]
    ours = backbone.processor.collate(rows)
    assert torch.equal(ours["input_ids"], batch["input_ids"])
    with torch.no_grad():
        difference = backbone.hidden(ours) - backbone.model.model(**batch).last_hidden_state
    assert difference[ours["attention_mask"].bool()].abs().max() < 1e-5


def test_no_tile_is_padding(tiny: Tiny) -> None:
    backbone = tiny("smolvlm")
    rows = mixed_items(backbone)
    tiles = sum(len(image["pixel_values"]) for row in rows for image in row.images)
    assert backbone.processor.collate(rows)["pixel_values"].shape == (1, tiles, 3, 32, 32)


def test_max_pixels_bounds_the_longest_edge_in_whole_tiles(tiny: Tiny) -> None:
    def grid(max_pixels: int | None) -> list[int]:
        return tiny("idefics3", max_pixels=max_pixels).processor.image_inputs(picture(200, 200))["grid"].tolist()

    assert grid(None) == grid(64 * 64) == grid(10**9) == [2, 2]
    assert grid(63 * 63) == grid(1) == [0, 0]


def test_min_pixels_is_refused(tiny: Tiny) -> None:
    with pytest.raises(RecipeError, match="model.min_pixels: this family scales every picture"):
        tiny("idefics3", min_pixels=100)


def test_a_tokenizer_of_another_model_is_refused(tiny: Tiny) -> None:
    backbone = tiny("idefics3")
    backbone.model.config.image_token_id = 5000
    with pytest.raises(ModelError, match="tokenizer has no token 5000, which stands for a picture"):
        Idefics3Processor(backbone.processor.tokenizer, backbone.processor.image_processor, backbone.options, backbone.model.config)
