"""LLaVA-1.6 (LLaVA-NeXT; arXiv 2310.03744 and its successor) and LLaVA-OneVision (arXiv 2408.03326): any-resolution tiles.

A picture becomes the features of the whole, then those of a grid of tiles with the padding cut off and a learnt newline after each row.
Every picture of an item is tiled, whether it stands alone or beside others, so its tokens depend on its size only.

Shape letters: T tiles of a picture with the whole as the first, E edge of a tile in pixels.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import AutoConfig, LlavaNextImageProcessorPil, LlavaOnevisionImageProcessorPil
from transformers.image_processing_utils import select_best_resolution

from vlm2vec.backbones.base import Assets
from vlm2vec.backbones.packed import CAUSAL
from vlm2vec.backbones.tiles import TileBackbone, TileProcessor
from vlm2vec.backbones.toy import byte_tokenizer, small, write_checkpoint
from vlm2vec.config import ModelConfig

MUCH_LARGER = 1.1  # LLaVA-OneVision shrinks a grid whose edges exceed its bound by more than this factor


class AnyResProcessor(TileProcessor):
    """Pictures as (T, 3, E, E) tiles and their size before tiling (1, 2): height, width."""

    packs = CAUSAL
    picture_inputs = ("pixel_values", "image_sizes")

    def __init__(self, tokenizer: Any, image_processor: Any, options: ModelConfig, config: Any, assets: Assets = None) -> None:
        self.edge: int = config.vision_config.image_size
        self.side: int = self.edge // config.vision_config.patch_size  # features along one edge of a tile
        bound = getattr(config, "vision_aspect_ratio", "")  # "anyres_max_9": a grid has the features of at most 9 tiles
        self.most_tiles = int(bound.rpartition("_")[2]) if bound.startswith("anyres_max_") else 0
        super().__init__(tokenizer, image_processor, options, config, assets)

    def image_inputs(self, image: Image.Image) -> dict[str, Tensor]:
        """`pixel_values` (T, 3, E, E) and `image_sizes` (1, 2)."""
        made = super().image_inputs(image)
        return {**made, "pixel_values": made["pixel_values"][0]}

    def image_token_ids(self, inputs: dict[str, Tensor]) -> list[int]:
        """Image tokens for the whole, the grid and its newlines."""
        height, width = inputs["image_sizes"][0].tolist()
        return [self.image_token_id] * self.count_image_tokens(width, height)

    def count_image_tokens(self, width: int, height: int) -> int:
        """Features of the whole, plus rows x (columns + newline) of the grid."""
        rows, columns = self._grid(width, height)
        return self.side**2 + rows * (columns + 1)

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """The canvas of all tiles."""
        high, wide = select_best_resolution((height, width), self.image_processor.image_grid_pinpoints)
        return wide, high

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of features that are left of the grid of tiles, with the model's own rounding."""
        high, wide = select_best_resolution((height, width), self.image_processor.image_grid_pinpoints)
        rows, columns = high // self.edge * self.side, wide // self.edge * self.side
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        excess = math.sqrt(rows * columns / (self.most_tiles * self.side**2)) if self.most_tiles else 0.0
        return (int(rows // excess), int(columns // excess)) if excess > MUCH_LARGER else (rows, columns)


class LlavaNext(TileBackbone):
    """LLaVA-1.6 and LLaVA-OneVision."""

    model_types = ("llava_next", "llava_onevision")
    processor_class = AnyResProcessor

    @classmethod
    def tiny_checkpoint(cls, to: Path, seed: int = 0, model_type: str | None = None) -> Path:
        """About 60 k parameters; tiles of 32 pixels and 16 features, 3 to 5 of them."""
        model_type = model_type or cls.model_types[0]
        named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "image_token": "<image>", "video_token": "<video>"}
        tokenizer = byte_tokenizer(named, frame="<s> $A" if model_type == "llava_next" else "")
        text, vision, image_processor, others, processor = TINY[model_type]
        grid = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
        config = AutoConfig.for_model(
            model_type,
            text_config={**text, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id},
            vision_config={**vision, "image_size": 32, "patch_size": 8},
            image_token_index=tokenizer.image_token_id,
            image_grid_pinpoints=grid,
            **others,
        )
        return write_checkpoint(to, config, tokenizer, image_processor(image_grid_pinpoints=grid), seed, processor=processor)


def _clip_tiles(**options: Any) -> Any:
    return LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, **options)


def _siglip_tiles(**options: Any) -> Any:
    return LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, **options)


TINY: dict[str, Any] = {
    "llava_next": (
        small(model_type="mistral", num_key_value_heads=2, head_dim=8),
        small(model_type="clip_vision_model", projection_dim=32),
        _clip_tiles,
        {},
        {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "llava_onevision": (
        small(model_type="qwen2", num_key_value_heads=2),
        small(model_type="siglip_vision_model", vision_use_head=False),
        _siglip_tiles,
        {"vision_aspect_ratio": "anyres_max_2"},
        {"num_image_tokens": 16, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_2"},
    ),
}
