"""Names of old checkpoints against those of the models, and an old adapter on two towers against the published code's output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import LlavaNextImageProcessorPil

from vlm2vec.backbones import registry
from vlm2vec.backbones.base import Backbone
from vlm2vec.backbones.layouts import renaming
from vlm2vec.backbones.loading import load_model
from vlm2vec.config import ModelConfig
from vlm2vec.lora import load_adapter
from vlm2vec.pooling import normalize, pool

LLAVA = Path(__file__).parents[1] / "data" / "llava_next"


@pytest.mark.parametrize(
    ("model_type", "old", "new"),
    [
        ("qwen2_vl", "model.layers.0.mlp.up_proj.lora_magnitude_vector", "model.language_model.layers.0.mlp.up_proj.lora_magnitude_vector"),
        ("qwen2_vl", "visual.blocks.0.attn.qkv.lora_B.weight", "model.visual.blocks.0.attn.qkv.lora_B.weight"),
        ("qwen2_vl", "lm_head.weight", "lm_head.weight"),
        ("qwen2_5_vl", "model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
        ("llava", "language_model.model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
        ("llava", "language_model.lm_head.weight", "lm_head.weight"),
        ("llava", "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias", "model.vision_tower.encoder.layers.0.mlp.fc1.bias"),
        ("smolvlm", "model.text_model.layers.0.mlp.up_proj.weight", "model.text_model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_an_old_name_becomes_the_name_in_the_model(tiny: Callable[..., Backbone], model_type: str, old: str, new: str) -> None:
    assert renaming(tiny(model_type).model)(old) == new


@pytest.mark.parametrize("model_type", sorted(registry()))
def test_saved_names_become_those_in_the_model_which_stay_as_they_are(
    tiny: Callable[..., Backbone], tiny_folder: Callable[[str], Path], model_type: str
) -> None:
    model = tiny(model_type).model
    rename, current = renaming(model), set(model.state_dict())
    assert {rename(name) for name in load_file(tiny_folder(model_type) / "model.safetensors")} <= current
    assert {rename(name) for name in current} == current


def test_an_old_adapter_on_two_towers_gives_the_states_of_the_published_code() -> None:
    options = ModelConfig(path=str(LLAVA))
    bare: Any = SimpleNamespace(
        model=load_model("AutoModelForImageTextToText", LLAVA, options), options=options
    )  # all that an adapter needs
    expected = load_file(LLAVA / "adapter_dora" / "expected.safetensors")
    image_processor = LlavaNextImageProcessorPil.from_pretrained(LLAVA)
    pixels = image_processor(Image.open(LLAVA / "low_128.png").convert("RGB"), return_tensors="pt")
    assert torch.equal(pixels["pixel_values"][:, :, :, ::21, ::21], expected["pixel_values_stride21"])
    batch = {name: expected[name] for name in ("input_ids", "attention_mask")} | dict(pixels)
    with torch.no_grad():
        plain = bare.model.model(**batch).last_hidden_state
        load_adapter(bare, LLAVA / "adapter_dora").eval()
        adapted = bare.model.model(**batch).last_hidden_state
    kept = expected["kept"]
    assert (plain[:, kept] - expected["base_hidden_state"]).abs().max() <= 2e-5
    assert (adapted[:, kept] - expected["last_hidden_state"]).abs().max() <= 2e-5
    assert (expected["last_hidden_state"] - expected["base_hidden_state"]).abs().max() > 1
    assert (normalize(pool(plain, batch["attention_mask"], "last")) - expected["pooled_last_l2"]).abs().max() <= 1e-6
