"""InternVL in its transformers form (InternVL 2.5 and 3; arXiv 2412.05271, 2504.10479): a grid of square tiles and a thumbnail.

A picture becomes `<img>`, the image tokens of all its tiles without anything between them, and `</img>`.

Shape letters: T tiles of a picture with the thumbnail as the last, E edge of a tile in pixels.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, GotOcr2ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from vlm2vec.backbones.base import Assets
from vlm2vec.backbones.packed import CAUSAL
from vlm2vec.backbones.tiles import TileBackbone, TileProcessor
from vlm2vec.backbones.toy import byte_tokenizer, small, write_checkpoint
from vlm2vec.config import ModelConfig

START, END = "<img>", "</img>"


class InternVLProcessor(TileProcessor):
    """Pictures as (T, 3, E, E) tiles; T is 1 for a picture that is not cut."""

    packs = CAUSAL

    def __init__(self, tokenizer: Any, image_processor: Any, options: ModelConfig, config: Any, assets: Assets = None) -> None:
        side = config.vision_config.image_size[0] // config.vision_config.patch_size[0]
        self.tokens_per_tile = int(side**2 * config.downsample_ratio**2)
        image_processor.crop_to_patches = True  # as the family's own processor asks of it, whatever its file says
        super().__init__(tokenizer, image_processor, options, config, assets)
        self.start, self.end = self.id_of(START), self.id_of(END)

    def control_tokens(self) -> list[str]:
        """The image token and the two around a picture."""
        return [*super().control_tokens(), START, END]

    def limit_pixels(self, smallest: int | None, largest: int | None) -> None:
        """Bound the number of tiles of the grid, each `size` x `size` pixels; the thumbnail comes on top."""
        area = self.image_processor.size["height"] * self.image_processor.size["width"]
        if largest:
            self.image_processor.max_patches = max(1, min(self.image_processor.max_patches, largest // area))
        if smallest:
            self.image_processor.min_patches = min(self.image_processor.max_patches, math.ceil(smallest / area))

    def image_inputs(self, image: Image.Image) -> dict[str, Tensor]:
        """`pixel_values` (T, 3, E, E) and `tiles`, a scalar: T."""
        made = super().image_inputs(image)
        return {**made, "tiles": torch.tensor(len(made["pixel_values"]))}

    def image_token_ids(self, inputs: dict[str, Tensor]) -> list[int]:
        """`<img>`, the tokens of all tiles, `</img>`."""
        return [self.start, *[self.image_token_id] * (self.tokens_per_tile * int(inputs["tiles"])), self.end]

    def count_image_tokens(self, width: int, height: int) -> int:
        """Tokens of the tiles that a picture of this size is cut into, and two markers."""
        return self.tokens_per_tile * self.image_processor.get_number_of_image_patches(height, width) + 2

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """The canvas of all tiles."""
        made = self.image_processor
        edges = (made.size["height"], made.size["width"])
        columns, rows = get_optimal_tiled_canvas((height, width), edges, made.min_patches, made.max_patches)
        return columns * edges[1], rows * edges[0]


class InternVL(TileBackbone):
    """InternVL 2.5 and 3 as converted for transformers."""

    model_types = ("internvl",)
    processor_class = InternVLProcessor

    @classmethod
    def tiny_checkpoint(cls, to: Path, seed: int = 0, model_type: str | None = None) -> Path:
        """About 60 k parameters; at most 4 tiles of 32 pixels and 4 tokens beside the thumbnail."""
        named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
        named |= {"start_image_token": START, "end_image_token": END, "context_image_token": "<IMG_CONTEXT>"}
        tokenizer = byte_tokenizer(named, ["<|im_start|>"])
        config = AutoConfig.for_model(
            "internvl",
            text_config=small(model_type="qwen2", num_key_value_heads=2, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id),
            vision_config=small(image_size=[32, 32], patch_size=[8, 8]),
            image_token_id=tokenizer.image_token_id,
            image_seq_length=4,
        )
        image_processor = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, max_patches=4)
        return write_checkpoint(to, config, tokenizer, image_processor, seed, processor={"image_seq_length": 4})
