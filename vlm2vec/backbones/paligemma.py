"""PaliGemma (arXiv 2407.07726) and PaliGemma 2 (arXiv 2412.03555): pictures of one size, and a prompt that sees itself whole.

The beginning of text comes after the last picture. Neutral prompts end with the newline that the family's own processor would add.

Shape letters: C items in a chunk, L tokens, E edge of a picture in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, SiglipImageProcessorPil

from vlm2vec.backbones.base import Assets
from vlm2vec.backbones.tiles import TileBackbone, TileProcessor
from vlm2vec.backbones.toy import byte_tokenizer, small, special_ids, write_checkpoint
from vlm2vec.collate import Features
from vlm2vec.config import ModelConfig


class PaliGemmaProcessor(TileProcessor):
    """Pictures as (1, 3, E, E) and a fixed number of bare image tokens."""

    def __init__(self, tokenizer: Any, image_processor: Any, options: ModelConfig, config: Any, assets: Assets = None) -> None:
        self.tokens_per_image = config.text_config.num_image_tokens
        super().__init__(tokenizer, image_processor, options, config, assets)

    def wrap(self, ids: list[int]) -> list[int]:
        """`ids` with the beginning of text after the last picture."""
        last = max((place for place, token in enumerate(ids) if token == self.image_token_id), default=-1)
        return [*ids[: last + 1], *self.prefix, *ids[last + 1 :], *self.suffix]

    def image_token_ids(self, inputs: dict[str, Tensor]) -> list[int]:
        """Image tokens alone."""
        return [self.image_token_id] * self.tokens_per_image

    def count_image_tokens(self, width: int, height: int) -> int:
        """The same for every size."""
        return self.tokens_per_image

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """The one size of all pictures."""
        return self.image_processor.size["width"], self.image_processor.size["height"]

    def collate_images(self, rows: Sequence[Features], input_ids_CL: Tensor) -> dict[str, Tensor]:
        """As for every family, but positions start at 1, and `token_type_ids` (C, L) are 0 throughout: a prompt that sees itself whole."""
        made = super().collate_images(rows, input_ids_CL)
        return {**made, "position_ids": made["position_ids"] + 1, "token_type_ids": input_ids_CL.new_zeros(input_ids_CL.shape)}


class PaliGemma(TileBackbone):
    """PaliGemma; its second version differs in the language model, which its configuration names."""

    model_types = ("paligemma",)
    processor_class = PaliGemmaProcessor
    differs_elsewhere = "transformers' processor of this family takes no text without a picture, and padding changes a text in its model"

    @classmethod
    def tiny_checkpoint(cls, to: Path, seed: int = 0, model_type: str | None = None) -> Path:
        """About 60 k parameters; 16 tokens a picture."""
        named = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "image_token": "<image>"}
        tokenizer = byte_tokenizer(named, frame="<bos> $A")
        text = small(model_type="gemma", num_key_value_heads=1, head_dim=8, vocab_size=len(tokenizer), **special_ids(tokenizer))
        config = AutoConfig.for_model(
            "paligemma",
            text_config=text,
            vision_config=small(model_type="siglip_vision_model", image_size=32, patch_size=8, vision_use_head=False),
            image_token_index=tokenizer.image_token_id,
            projection_dim=32,
            hidden_size=32,
        )
        image_processor = SiglipImageProcessorPil(size={"height": 32, "width": 32}, image_seq_length=16)
        return write_checkpoint(to, config, tokenizer, image_processor, seed)
