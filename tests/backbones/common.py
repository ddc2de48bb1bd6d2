"""What the tests of the families share: pictures from a seed, and items as unit embeddings."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from PIL import Image

from vlm2vec.backbones.base import Backbone
from vlm2vec.collate import Features
from vlm2vec.pooling import normalize, pool

PROMPT = "<|image_1|>\nWhat is this?\n"


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth random colours, so that resizing does not average everything away."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def mixed_items(backbone: Backbone) -> list[Features]:
    """Five items of different lengths: with a picture, without, with two, without words."""
    prepare = backbone.processor.features
    return [
        prepare(PROMPT, [picture(90, 60)]),
        prepare("only a few words\n", []),
        prepare("compare <|image_1|> with <|image_2|> now\n", [picture(60, 60, 1), picture(40, 100, 2)]),
        prepare("<|image_1|>", [picture(70, 50, 3)]),
        prepare("a much longer text without any picture, to make the others padded " * 2, []),
    ]


@torch.no_grad()
def embed(backbone: Backbone, rows: list[Features], how: str = "last") -> torch.Tensor:
    """Unit embeddings (C, D) of one chunk."""
    batch = backbone.processor.collate(rows)
    return normalize(pool(backbone.hidden(batch), batch["attention_mask"], how))


def stock_processor(name: str, **parts: object) -> transformers.ProcessorMixin:
    """A processor class of transformers without its video half, which needs torchvision."""
    stock = getattr(transformers, name)
    attributes = [attribute for attribute in stock.get_attributes() if attribute != "video_processor"]
    image_only = type(name, (stock,), {"__module__": stock.__module__, "get_attributes": classmethod(lambda cls: attributes)})
    return image_only(video_processor=None, **parts) if "video_processor" in stock.get_attributes() else image_only(**parts)
