"""Gemma 3 (arXiv 2503.19786): pictures of one size between blank lines, most layers seeing only a window of the text.

The tokens of a picture see each other whole, text is causal. The optional pan-and-scan crops, off in the published checkpoints, are
not made.

Shape letters: C items in a chunk, L tokens, E edge of a picture in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, Gemma3ImageProcessorPil

from vlm2vec.backbones.base import Assets
from vlm2vec.backbones.tiles import TileBackbone, TileProcessor
from vlm2vec.backbones.toy import byte_tokenizer, small, special_ids, write_checkpoint
from vlm2vec.collate import Features
from vlm2vec.config import ModelConfig

START, END = "<start_of_image>", "<end_of_image>"


class Gemma3Processor(TileProcessor):
    """Pictures as (1, 3, E, E) and a fixed number of image tokens between two markers."""

    margin = ("\n\n", "\n\n")
    chat_mark = START

    def __init__(self, tokenizer: Any, image_processor: Any, options: ModelConfig, config: Any, assets: Assets = None) -> None:
        self.tokens_per_image = config.mm_tokens_per_image
        image_processor.do_pan_and_scan = False
        super().__init__(tokenizer, image_processor, options, config, assets)
        self.start, self.end = self.id_of(START), self.id_of(END)

    def control_tokens(self) -> list[str]:
        """The image token and the two around a picture."""
        return [*super().control_tokens(), START, END]

    def image_token_ids(self, inputs: dict[str, Tensor]) -> list[int]:
        """Start, image tokens, end."""
        return [self.start, *[self.image_token_id] * self.tokens_per_image, self.end]

    def count_image_tokens(self, width: int, height: int) -> int:
        """The same for every size."""
        return self.tokens_per_image + 2

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """The one size of all pictures."""
        return self.image_processor.size["width"], self.image_processor.size["height"]

    def collate_images(self, rows: Sequence[Features], input_ids_CL: Tensor) -> dict[str, Tensor]:
        """As for every family, and `token_type_ids` (C, L): 1 on image tokens, which see the rest of their picture."""
        return {**super().collate_images(rows, input_ids_CL), "token_type_ids": (input_ids_CL == self.image_token_id).long()}


class Gemma3(TileBackbone):
    """Gemma 3 with pictures."""

    model_types = ("gemma3",)
    processor_class = Gemma3Processor

    @classmethod
    def tiny_checkpoint(cls, to: Path, seed: int = 0, model_type: str | None = None) -> Path:
        """About 60 k parameters; 4 tokens a picture, a window of 16 tokens in the first layer."""
        text: dict[str, Any] = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
        text["layer_types"] = ["sliding_attention", "full_attention"]
        named = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
        named |= {"boi_token": START, "eoi_token": END, "image_token": "<image_soft_token>"}
        tokenizer = byte_tokenizer(named, ["<start_of_turn>", "<end_of_turn>"], frame="<bos> $A")
        config = AutoConfig.for_model(
            "gemma3",
            text_config=small(num_key_value_heads=2, vocab_size=len(tokenizer), **special_ids(tokenizer), **text),
            vision_config=small(model_type="siglip_vision_model", image_size=32, patch_size=8, vision_use_head=False),
            mm_tokens_per_image=4,
            **{f"{role}_token_index": getattr(tokenizer, f"{role}_token_id") for role in ("boi", "eoi", "image")},
        )
        image_processor = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
        return write_checkpoint(to, config, tokenizer, image_processor, seed, wake=0.2, processor={"image_seq_length": 4})
