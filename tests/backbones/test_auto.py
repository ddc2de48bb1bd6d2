"""Inference of families we have no file for: what works, and what is said of what does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, CLIPImageProcessorPil, LlavaNextImageProcessorPil

from tests.backbones.common import embed, mixed_items, picture, stock_processor
from vlm2vec.backbones import auto, load_backbone
from vlm2vec.backbones.auto import AutoBackbone
from vlm2vec.backbones.base import Backbone
from vlm2vec.backbones.toy import byte_tokenizer, write_checkpoint
from vlm2vec.config import ModelConfig
from vlm2vec.errors import ModelError

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def _checkpoint(to: Path, model_type: str, image_processor: object = None, **config: object) -> Path:
    """A random miniature of a LLaVA-like type."""
    tokenizer = byte_tokenizer({"eos_token": "</s>", "pad_token": "<pad>", "image_token": "<image>"})
    settings = {
        "text_config": {"model_type": "llama", "vocab_size": len(tokenizer), **SIZES},
        "vision_config": {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, **SIZES},
        "image_token_index": tokenizer.image_token_id,
        **config,
    }
    made = image_processor or CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return write_checkpoint(to, AutoConfig.for_model(model_type, **settings), tokenizer, made)


def _refused(folder: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        load_backbone(ModelConfig(path=str(folder)))


def test_llava_equals_the_stock_processor(tiny: Callable[..., Backbone]) -> None:
    backbone = tiny("llava")
    processor = backbone.processor
    parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
    stock = stock_processor(
        "LlavaProcessor", patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1, **parts
    )
    ours = processor.features("<|image_1|>\nhi\n", [picture(50, 40)])
    theirs = stock(text=["<image>\nhi\n"], images=[[picture(50, 40)]], return_tensors="pt")
    assert torch.equal(ours.input_ids, theirs["input_ids"][0])
    assert torch.equal(ours.images[0]["pixel_values"], theirs["pixel_values"])


def test_a_type_that_no_file_here_names(tmp_path: Path) -> None:
    vision = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, **SIZES}
    folder = _checkpoint(tmp_path, "vipllava", vision_config=vision, vision_feature_layers=[-1, -2])
    backbone = load_backbone(ModelConfig(path=str(folder)))
    assert isinstance(backbone, AutoBackbone)
    rows = mixed_items(backbone)
    assert (embed(backbone, rows) - torch.cat([embed(backbone, [row]) for row in rows])).abs().max() <= 1e-6
    assert {backbone.part_of(name) for name, _ in backbone.model.named_parameters()} == {"vision", "projector", "language", "head"}


def test_pictures_of_varying_token_counts_are_refused(tmp_path: Path) -> None:
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "image_grid_pinpoints": [[32, 64], [64, 32]]}
    folder = _checkpoint(tmp_path, "vipllava", LlavaNextImageProcessorPil(**sizes), vision_feature_layers=[-1, -2])
    _refused(folder, "model type vipllava: cannot infer .*image_sizes.* It needs a family of its own in vlm2vec/backbones")


def test_pictures_of_their_own_shape_are_refused(tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path, "llava", CLIPImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False))
    _refused(folder, "model type llava: cannot infer how many tokens a picture has")


def test_a_model_without_an_image_token_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _checkpoint(tmp_path, "llava")
    monkeypatch.setattr("transformers.LlavaConfig.attribute_map", {})
    _refused(folder, "cannot infer which token stands for a picture: its configuration has no image_token_id")


def test_parts_under_unusual_names_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _checkpoint(tmp_path, "llava")
    monkeypatch.setitem(auto.NAMES, "projector", ("connector",))
    _refused(folder, "cannot infer its projector part: looked for connector among vision_tower, multi_modal_projector, language_model")
