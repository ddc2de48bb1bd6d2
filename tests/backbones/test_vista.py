"""The small VISTA: what its visual tokens are, how it trains, and where its positions end."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import gelu, linear
from transformers import AutoConfig, AutoModel

from tests.backbones.common import embed, mixed_items, picture
from vlm2vec.backbones.base import Backbone
from vlm2vec.backbones.vista import VistaConfig, VistaModel, image_processor
from vlm2vec.errors import DataError, RecipeError

Tiny = Callable[..., Backbone]
TYPE = VistaConfig.model_type


def test_visual_tokens_are_projected_means_of_the_cells(tiny: Tiny) -> None:
    model = tiny(TYPE).model
    pixels = torch.randn(2, 3, 128, 128)
    first, second = model.projector.linear_1, model.projector.linear_2
    with torch.no_grad():
        features = model.vision_model(pixels).last_hidden_state  # 4 x 4 cells, averaged to 2 x 2
        means = [features[:, :, y : y + 2, x : x + 2].mean((2, 3)) for y in (0, 2) for x in (0, 2)]
        expected = linear(gelu(linear(torch.stack(means, 1), first.weight, first.bias)), second.weight, second.bias)
        assert torch.allclose(model.get_image_features(pixels), expected, atol=1e-5)


def test_visual_tokens_take_the_places_of_image_tokens_in_order(tiny: Tiny) -> None:
    backbone = tiny(TYPE)
    batch = backbone.processor.collate(mixed_items(backbone))
    seen: list[torch.Tensor] = []
    backbone.model.text_model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True)
    with torch.no_grad():
        backbone.hidden(batch)
        visual = backbone.model.get_image_features(batch["pixel_values"])
        words = backbone.model.get_input_embeddings()(batch["input_ids"])
    is_image = batch["input_ids"] == backbone.model.config.image_token_id
    assert torch.equal(seen[0][is_image], visual.flatten(0, 1))
    assert torch.equal(seen[0][~is_image], words[~is_image])


def test_text_is_framed_and_attention_goes_both_ways(tiny: Tiny) -> None:
    backbone = tiny(TYPE)
    tokenizer = backbone.processor.tokenizer
    one, other = (backbone.processor.features(text, []) for text in ("abc", "abd"))
    assert one.input_ids[0] == tokenizer.cls_token_id and one.input_ids[-1] == tokenizer.sep_token_id
    with torch.no_grad():
        first = [backbone.hidden(backbone.processor.collate([row]))[0, 0] for row in (one, other)]
    assert not torch.equal(*first)


def test_batch_norm_never_trains(tiny: Tiny) -> None:
    backbone = tiny(TYPE)
    backbone.model.train()
    backbone.model.vision_model.train()
    norms = [module for module in backbone.model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    backbone.hidden(backbone.processor.collate(mixed_items(backbone)))
    assert norms and not any(norm.training for norm in norms)
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
    assert backbone.model.text_model.training and backbone.model.vision_model.training


def test_a_frozen_tower_gets_no_gradient_and_words_alone_none_for_the_projector(tiny: Tiny) -> None:
    backbone = tiny(TYPE)
    backbone.model.vision_model.requires_grad_(False)
    backbone.hidden(backbone.processor.collate([backbone.processor.features("words\n", [])])).sum().backward()
    assert all(parameter.grad is None for parameter in backbone.model.projector.parameters())
    backbone.hidden(backbone.processor.collate(mixed_items(backbone))).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in backbone.model.projector.parameters())
    assert all(parameter.grad is None for parameter in backbone.model.vision_model.parameters())


def test_text_ends_where_positions_end(tiny: Tiny) -> None:
    backbone = tiny(TYPE, max_tokens=5000)
    row = backbone.processor.features("<|image_1|>" + "x" * 3000 + "\n", [picture(64, 64)])
    assert len(row) == 1024 and row.truncated == 3001 - (1024 - 2 - 4)
    assert embed(backbone, [row]).isfinite().all()
    prompt = "".join(f"<|image_{index}|>" for index in range(1, 258))
    with pytest.raises(DataError, match="1028 image tokens do not fit the 1024 positions"):
        backbone.processor.features(prompt, [picture(8, 8)] * 257)


def test_pictures_are_squashed_to_a_square_and_normalized() -> None:
    pixels = image_processor(32)(Image.new("RGB", (100, 20), (255, 0, 128)), return_tensors="pt")["pixel_values"]
    expected = (np.array([255, 0, 128]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert pixels.shape == (1, 3, 32, 32)
    assert np.allclose(pixels[0].permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_a_fixed_size_takes_no_pixel_limits(tiny: Tiny) -> None:
    with pytest.raises(RecipeError, match="model.max_pixels: this model has one fixed picture size, or tiles"):
        tiny(TYPE, max_pixels=100)


def test_the_configuration_survives_a_round_trip(tiny_folder: Callable[[str], object]) -> None:
    folder = str(tiny_folder(TYPE))
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, VistaConfig)
    assert (config.visual_grid, config.image_size, config.vision_config.tf_padding) == (2, 64, False)
    model = AutoModel.from_pretrained(folder)
    assert isinstance(model, VistaModel)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"text_model", "vision_model", "projector"}
