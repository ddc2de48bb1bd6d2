"""Phi-3-vision and Phi-3.5-vision (arXiv 2404.14219), natively: no shipped code, no torchvision, no flash-attention.

Token ids follow the published processor: pictures are negative ids, and every piece of text between pictures, be it empty, starts with a
beginning-of-sequence token. There is no chat template and no end token, as in VLM2Vec's prompts.

Shape letters: C items in a chunk, L tokens, N pictures, T crops with the global views, S side of a crop.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast

from vlm2vec.backbones.base import Assets, Backbone, Part, Processor
from vlm2vec.backbones.phi3_v_image import Phi3VImageProcessor
from vlm2vec.backbones.phi3_v_model import Phi3VConfig
from vlm2vec.backbones.toy import small, write_checkpoint
from vlm2vec.collate import Features
from vlm2vec.config import ModelConfig
from vlm2vec.errors import ModelError


class Phi3VProcessor(Processor):
    """Pictures as (T, 3, S, S) crops, and their tokens: negative ids, then the beginning of the text that follows."""

    # The published tokenizer_config.json names a Llama class, which builds another tokenizer than tokenizer.json describes.
    tokenizer_class: ClassVar[Any] = PreTrainedTokenizerFast
    image_processor_class: ClassVar[Any] = Phi3VImageProcessor
    packs = (Phi3VConfig.model_type,)

    def __init__(self, tokenizer: Any, image_processor: Any, options: ModelConfig, config: Any, assets: Assets = None) -> None:
        if image_processor.side != config.vision_config.image_size:
            raise ModelError(
                f"image processor makes crops of {image_processor.side} pixels, the model reads {config.vision_config.image_size}; "
                "num_img_tokens in preprocessor_config.json does not belong to this model"
            )
        super().__init__(tokenizer, image_processor, options, config, assets)

    def control_tokens(self) -> list[str]:
        """All added tokens, `</s>` among them, which the tokenizer does not call special."""
        return list(self.tokenizer.get_added_vocab())

    def limit_crops(self, crops: int | None) -> None:
        """Set the largest number of crops beside the global view."""
        self.image_processor.num_crops = crops or self.image_processor.num_crops

    def image_inputs(self, image: Image.Image) -> dict[str, Tensor]:
        """`pixel_values` (T, 3, S, S) and `image_sizes` (2,): height and width after scaling and padding."""
        return self.image_processor(image)

    def image_token_ids(self, inputs: dict[str, Tensor]) -> list[int]:
        """Negative ids, and the beginning of the next piece of text."""
        height, width = (inputs["image_sizes"] // self.image_processor.side).tolist()
        return [self.image_token_id] * self.image_processor.count_tokens(height, width) + self.prefix

    def count_image_tokens(self, width: int, height: int) -> int:
        """Tokens of the grid that this size falls into."""
        return self.image_processor.count_tokens(*self.image_processor.grid(width, height)) + len(self.prefix)

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """The canvas of all crops."""
        rows, columns = self.image_processor.grid(width, height)
        return columns * self.image_processor.side, rows * self.image_processor.side

    def collate_images(self, rows: Sequence[Features], input_ids_CL: Tensor) -> dict[str, Tensor]:
        """`position_ids` (C, L) and the pictures of all rows."""
        return {"position_ids": self.positions(rows), **self.pictures(rows)}

    def joined(self, images: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The crops of all pictures (T, 3, S, S) and `image_sizes` (N, 2)."""
        return {**super().joined(images), "image_sizes": torch.stack([image["image_sizes"] for image in images])}


class Phi3V(Backbone):
    """Phi-3-vision and Phi-3.5-vision. The separators between lines of image tokens belong to the projector."""

    model_types = (Phi3VConfig.model_type,)
    processor_class = Phi3VProcessor
    differs_elsewhere = "transformers has no model of this type, and the published one ships code for older versions of it"
    auto_class = "AutoModelForCausalLM"
    ignores_shipped_code = True
    parts: dict[str, Part] = {
        "post_layernorm": "head",
        "img_processor": "vision",
        "vision_embed_tokens": "projector",
        "lm_head": "head",
        "model": "language",
    }
    tower_names = ("model.vision_embed_tokens.img_processor", "model.vision_embed_tokens.img_projection")
    aliases: ClassVar[dict[str, str]] = {"model.vision_embed_tokens.wte.weight": "model.embed_tokens.weight"}

    def picture_features(self, inputs: dict[str, Tensor]) -> Tensor:
        """Feature vectors (V, D) of one picture."""
        return self.inner.vision_embed_tokens(**inputs)

    def part_of(self, name: str) -> Part:
        """As for every family; CLIP layers behind the one that is read belong to the head, which nothing reads."""
        part = super().part_of(name)
        layer = re.search(r"\.layers\.(\d+)\.", f"{name}.")
        unread = part == "vision" and layer is not None and int(layer[1]) >= self.model.config.vision_depth
        return "head" if unread else part

    @classmethod
    def tiny_checkpoint(cls, to: Path, seed: int = 0, model_type: str | None = None) -> Path:
        """About 60 k parameters; crops of 56 pixels and 4 tokens, at most 4 of them."""
        tokenizer = tiny_tokenizer()
        # like the published one, the vocabulary has more places than the tokenizer
        ids = {"vocab_size": len(tokenizer) + 4, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": 2}
        config = AutoConfig.for_model(Phi3VConfig.model_type, **ids, **TINY_TEXT, rope_scaling=TINY_ROPE, vision_config=TINY_VISION)
        return write_checkpoint(to, config, tokenizer, Phi3VImageProcessor(num_img_tokens=4), seed, cls.auto_class)


TINY_TEXT: dict[str, Any] = {
    **small(),
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "original_max_position_embeddings": 128,
    "sliding_window": 4096,
}
TINY_ROPE: dict[str, Any] = {"type": "su", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
TINY_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "projection_dim": 32,
    "initializer_range": 0.2,
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The rules of the published tokenizer, with bytes and letters as its vocabulary: a space in front of every text, spaces as `▁`, bytes
    for what is no letter, one beginning-of-sequence token.
    """
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, *(f"▁{letter}" for letter in letters)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", letter) for letter in letters]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = ["<unk>", "<s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<|image|>"]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken("</s>", normalized=False, rstrip=True)])
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
