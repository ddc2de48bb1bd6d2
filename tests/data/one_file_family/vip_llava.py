"""ViP-LLaVA (arXiv 2312.00784), as somebody would add it: this file and no other. Pictures of one size, features of several layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, CLIPImageProcessorPil

from vlm2vec.backbones.base import Assets
from vlm2vec.backbones.tiles import TileBackbone, TileProcessor
from vlm2vec.backbones.toy import byte_tokenizer, small, write_checkpoint
from vlm2vec.config import ModelConfig


class VipLlavaProcessor(TileProcessor):
    """Pictures as (1, 3, E, E) and one token per patch."""

    def __init__(self, tokenizer: Any, image_processor: Any, options: ModelConfig, config: Any, assets: Assets = None) -> None:
        self.tokens_per_image = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        super().__init__(tokenizer, image_processor, options, config, assets)

    def image_token_ids(self, inputs: dict[str, Tensor]) -> list[int]:
        return [self.image_token_id] * self.tokens_per_image

    def count_image_tokens(self, width: int, height: int) -> int:
        return self.tokens_per_image


class VipLlava(TileBackbone):
    model_types = ("vipllava",)
    processor_class = VipLlavaProcessor

    @classmethod
    def tiny_checkpoint(cls, to: Path, seed: int = 0, model_type: str | None = None) -> Path:
        named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "image_token": "<image>"}
        tokenizer = byte_tokenizer(named, frame="<s> $A")
        config = AutoConfig.for_model(
            "vipllava",
            text_config=small(model_type="llama", vocab_size=len(tokenizer)),
            vision_config=small(model_type="clip_vision_model", image_size=32, patch_size=8),
            image_token_index=tokenizer.image_token_id,
            vision_feature_layers=[-1, -2],
        )
        image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        return write_checkpoint(to, config, tokenizer, image_processor, seed)
