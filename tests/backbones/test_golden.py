"""Ids, pixels and hidden states of every family that transformers has a processor for, against that processor and the model's own forward.

The expected ids are made from the family's native string by the processor class of transformers; the product never uses that class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from tests.backbones.common import embed, mixed_items, picture, stock_processor
from vlm2vec.backbones import load_backbone
from vlm2vec.backbones.base import Backbone, Processor
from vlm2vec.backbones.toy import small, write_checkpoint
from vlm2vec.config import ModelConfig

Tiny = Callable[..., Backbone]
SIZES = [(64, 64), (300, 90), (20, 30), (57, 500), (32, 32), (33, 64), (97, 31), (1000, 20)]


@dataclass(frozen=True)
class Stock:
    """The stock class, what it needs beside tokenizer and image processor, its mark of a picture, and how texts look in its prompts."""

    name: str
    mark: str
    options: dict[str, Any] = field(default_factory=dict)
    text: Callable[[str], str] = str  # a neutral prompt, marks replaced, as this class wants it


STOCK = {
    "qwen2_vl": Stock("Qwen2VLProcessor", "<|image_pad|>"),
    "qwen2_5_vl": Stock("Qwen2_5_VLProcessor", "<|image_pad|>"),
    "qwen3_vl": Stock("Qwen3VLProcessor", "<|image_pad|>"),
    "idefics3": Stock("Idefics3Processor", "<image>", {"image_seq_len": 4}),
    "smolvlm": Stock("SmolVLMProcessor", "<image>", {"image_seq_len": 4}),
    "llava": Stock(
        "LlavaProcessor", "<image>", {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    ),
    "llava_next": Stock(
        "LlavaNextProcessor", "<image>", {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    ),
    "llava_onevision": Stock(
        "LlavaOnevisionProcessor",
        "<image>",
        {"num_image_tokens": 16, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_2"},
    ),
    "internvl": Stock("InternVLProcessor", "<IMG_CONTEXT>", {"image_seq_length": 4}),
    "gemma3": Stock("Gemma3Processor", "<start_of_image>", {"image_seq_length": 4}),
    "paligemma": Stock("PaliGemmaProcessor", "<image>", text=lambda text: text.removesuffix("\n")),  # it appends that newline
    "mllama": Stock("MllamaProcessor", "<|image|>"),
}


def stock_batch(processor: Processor, model_type: str, prompt: str, images: list[Any]) -> dict[str, torch.Tensor]:
    """What transformers' class makes of one item."""
    stock = STOCK[model_type]
    made = stock_processor(stock.name, tokenizer=processor.tokenizer, image_processor=processor.image_processor, **stock.options)
    for index in range(len(images)):
        prompt = prompt.replace(f"<|image_{index + 1}|>", stock.mark)
    # the class of one family puts the beginning of text into the string itself, where the tokenizer would put a second
    once = {"add_special_tokens": False} if model_type in ("paligemma", "mllama") else {}
    batch = dict(made(text=[stock.text(prompt)], images=[images] if images else None, return_tensors="pt", **once))
    return {name: value for name, value in batch.items() if name not in ("labels", "batch_num_images", "num_crops")}


def native_states(backbone: Backbone, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return backbone.model.model(**batch, use_cache=False).last_hidden_state


@pytest.mark.parametrize("model_type", STOCK)
@pytest.mark.parametrize("size", SIZES)
def test_a_picture_with_text(tiny: Tiny, model_type: str, size: tuple[int, int]) -> None:
    backbone, prompt, image = tiny(model_type), "<|image_1|>\nWhat is this?\n", picture(*size)
    batch = stock_batch(backbone.processor, model_type, prompt, [image])
    ours = backbone.processor.features(prompt, [image])
    assert ours.input_ids.tolist() == batch["input_ids"][0].tolist()
    assert torch.equal(ours.images[0]["pixel_values"].flatten(), batch["pixel_values"].flatten())
    with torch.no_grad():
        states = backbone.hidden(backbone.processor.collate([ours]))
    assert (states - native_states(backbone, batch)).abs().max() <= 1e-5


@pytest.mark.parametrize("model_type", STOCK)
def test_a_picture_alone(tiny: Tiny, model_type: str) -> None:
    processor, image = tiny(model_type).processor, picture(90, 60)
    expected = stock_batch(processor, model_type, "<|image_1|>\n", [image])["input_ids"][0]
    assert processor.features("<|image_1|>\n", [image]).input_ids.tolist() == expected.tolist()


@pytest.mark.parametrize("model_type", sorted(STOCK.keys() - {"paligemma"}))  # that class refuses a text without a picture
def test_text_alone(tiny: Tiny, model_type: str) -> None:
    backbone, prompt = tiny(model_type), "Represent the given words: a red apple\n"
    batch = stock_batch(backbone.processor, model_type, prompt, [])
    ours = backbone.processor.features(prompt, [])
    assert ours.input_ids.tolist() == batch["input_ids"][0].tolist()
    with torch.no_grad():
        states = backbone.hidden(backbone.processor.collate([ours]))
    assert (states - native_states(backbone, batch)).abs().max() <= 1e-5


def test_text_alone_in_paligemma_begins_with_the_beginning_of_text(tiny: Tiny) -> None:
    tokenizer = tiny("paligemma").processor.tokenizer
    expected = [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(["a", "b", "Ċ"])]
    assert tiny("paligemma").processor.features("ab\n", []).input_ids.tolist() == expected


@pytest.mark.parametrize("model_type", sorted(STOCK.keys() - {"llava_onevision"}))  # that class does not tile pictures that come in twos
def test_two_pictures(tiny: Tiny, model_type: str) -> None:
    backbone, prompt = tiny(model_type), "<|image_1|><|image_2|> compare\n"
    images = [picture(60, 60, 1), picture(40, 100, 2)]
    batch = stock_batch(backbone.processor, model_type, prompt, images)
    assert backbone.processor.features(prompt, images).input_ids.tolist() == batch["input_ids"][0].tolist()


def test_mllama_sees_each_picture_until_the_next(tiny: Tiny) -> None:
    backbone, prompt = tiny("mllama"), "<|image_1|>a <|image_2|><|image_3|> b\n"
    images = [picture(64, 64, 1), picture(200, 30, 2), picture(30, 30, 3)]
    batch = stock_batch(backbone.processor, "mllama", prompt, images)
    ours = backbone.processor.features(prompt, images)
    sees = backbone.processor.collate([ours])["sees_NL"]
    assert torch.equal(sees, batch["cross_attention_mask"][0, :, :, 0].T.bool())
    with torch.no_grad():
        states = backbone.hidden(backbone.processor.collate([ours]))
    assert (states - native_states(backbone, batch)).abs().max() <= 1e-5


def test_mllama_text_before_a_picture_is_as_if_there_were_none(tiny: Tiny) -> None:
    backbone = tiny("mllama")
    words, image = "Represent the picture ", picture(64, 64)
    rows = [backbone.processor.features(prompt, images) for prompt, images in ((f"{words}<|image_1|>\n", [image]), (words, []))]
    with torch.no_grad():
        both, alone = (backbone.hidden(backbone.processor.collate([row])) for row in rows)
    assert (both[:, : len(rows[1])] - alone).abs().max() <= 1e-5
    assert (both[:, -1] - alone[:, -1]).abs().max() > 1e-2


def test_paligemma_of_the_second_generation(tiny: Tiny, tmp_path: Path) -> None:
    """Gemma 2 below, which has no sdpa kernel, with a window that is shorter than the prompt."""
    first = tiny("paligemma")
    settings = first.model.config.to_dict()
    kept = {"vocab_size": settings["text_config"]["vocab_size"], "num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8}
    settings["text_config"] = small(model_type="gemma2", sliding_window=16, **kept)
    write_checkpoint(tmp_path, AutoConfig.for_model(**settings), first.processor.tokenizer, first.processor.image_processor)
    for side in ("left", "right"):
        backbone = load_backbone(ModelConfig(path=str(tmp_path), padding_side=side, attention="eager"))
        rows = mixed_items(backbone)
        assert (embed(backbone, rows) - torch.cat([embed(backbone, [row]) for row in rows])).abs().max() <= 1e-6
