"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL (arXiv 2409.12191, 2502.13923, 2511.21631): pictures at their own resolution, 3-D positions.

In a raw prompt a picture becomes bare `<|image_pad|>` tokens, one per merged patch, as in VLM2Vec's prompts; the chat template of these
models puts vision_start and vision_end around them. The published VLM2Vec code finds pictures by their vision_start, hence found none and
gave every token the next position: `positions: flat` repeats that for the models trained with it.

Shape letters: C items in a chunk, L tokens, P patches, V features of a picture, S levels of them, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from vlm2vec.backbones.base import Backbone, Part, Processor
from vlm2vec.backbones.toy import CHAT, byte_tokenizer, small, write_checkpoint
from vlm2vec.collate import Features
from vlm2vec.errors import ImageError

MAX_ASPECT = 200  # longer over shorter side that the family's resizing accepts


class QwenVLProcessor(Processor):
    """Pictures of any size as rows of patches and a grid (1, height, width) counted in patches."""

    flat_positions = True
    picture_inputs = ("pixel_values", "image_grid_thw")
    packs = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")

    def limit_pixels(self, smallest: int | None, largest: int | None) -> None:
        """Bound the area to which pictures are resized."""
        size = self.image_processor.size
        limits = {"shortest_edge": smallest or size["shortest_edge"], "longest_edge": largest or size["longest_edge"]}
        self.image_processor.size = type(size)(**limits)

    def image_inputs(self, image: Image.Image) -> dict[str, Tensor]:
        """`pixel_values` (P, patch) and `image_grid_thw` (1, 3)."""
        _check_aspect(*image.size)
        return dict(self.image_processor(image, return_tensors="pt"))

    def image_token_ids(self, inputs: dict[str, Tensor]) -> list[int]:
        """One token per merge x merge patches."""
        return [self.image_token_id] * (int(inputs["image_grid_thw"].prod()) // self.image_processor.merge_size**2)

    def count_image_tokens(self, width: int, height: int) -> int:
        """Tokens of a picture after the family's resizing."""
        _check_aspect(width, height)
        return self.image_processor.get_number_of_image_patches(height, width) // self.image_processor.merge_size**2

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """The size of the grid of patches."""
        size, edge = self.image_processor.size, self.image_processor.patch_size * self.image_processor.merge_size
        high, wide = smart_resize(height, width, edge, size["shortest_edge"], size["longest_edge"])
        return wide, high

    def collate_images(self, rows: Sequence[Features], input_ids_CL: Tensor) -> dict[str, Tensor]:
        """Patches and grids of all pictures, row after row, and `position_ids` (3, C, L) or (3, 1, T): time, height, width."""
        axes = zip(*[self._positions(row) for row in rows], strict=True)
        return {"position_ids": torch.stack([self.lay_out(axis)[0] for axis in axes]), **self.pictures(rows)}

    def _positions(self, row: Features) -> Tensor:
        """Positions (3, L): M-RoPE, arXiv 2409.12191 section 2.1, where text counts on all axes alike and a picture by its row and column,
        or flat ones that count pictures as text.

        Computed here because the model's own code takes pictures that touch for one, and would compute on the device.
        """
        if self.options.positions == "flat":
            return _text_positions(len(row), 0)
        marks = (row.input_ids == self.image_token_id).nonzero().flatten().tolist()
        parts: list[Tensor] = []
        token = position = seen = 0
        for image in row.images:
            height, width = (image["image_grid_thw"][0, 1:] // self.image_processor.merge_size).tolist()
            text = marks[seen] - token
            parts += [_text_positions(text, position), _grid_positions(height, width, position + text)]
            position += text + max(height, width)
            token += text + height * width
            seen += height * width
        return torch.cat([*parts, _text_positions(len(row) - token, position)], dim=1)


def _text_positions(count: int, start: int) -> Tensor:
    return torch.arange(start, start + count).expand(3, -1)


def _grid_positions(height: int, width: int, start: int) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return start + torch.stack([torch.zeros_like(rows), rows, columns]).reshape(3, -1)


def _check_aspect(width: int, height: int) -> None:
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"image of {width} x {height} pixels is longer than {MAX_ASPECT}:1; crop it")


class QwenVL(Backbone):
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL. The mergers inside the vision tower are the projector."""

    model_types = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    processor_class = QwenVLProcessor
    ignores_shipped_code = True  # some embedding models, GME among them, come with a class of their own around these weights
    parts: dict[str, Part] = {
        "merger": "projector",
        "deepstack_merger_list": "projector",
        "visual": "vision",
        "language_model": "language",
        "lm_head": "head",
    }
    tower_names = ("model.visual",)

    def picture_features(self, inputs: dict[str, Tensor]) -> Tensor:
        """(V, S, D) of one picture: what takes the places of its tokens, and what further layers add there in Qwen3-VL (section 2)."""
        made = self.inner.get_image_features(**inputs, return_dict=True)
        levels = [made.pooler_output, *(getattr(made, "deepstack_features", None) or ())]
        return torch.stack([torch.cat(list(level)) for level in levels], dim=1)

    def as_output(self, vectors: list[Tensor]) -> Any:
        """The levels of all pictures, each a list of (V, D)."""
        first, *further = ([picture_VSD[:, level] for picture_VSD in vectors] for level in range(vectors[0].shape[1]))
        return SimpleNamespace(pooler_output=first, deepstack_features=further)

    @classmethod
    def tiny_checkpoint(cls, to: Path, seed: int = 0, model_type: str | None = None) -> Path:
        """About 110 k parameters; pictures of 4 to 16 tokens."""
        model_type = model_type or cls.model_types[0]
        named = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
        tokenizer = byte_tokenizer(named, ["<|im_start|>", "<|vision_start|>", "<|vision_end|>"])
        tokenizer.chat_template = CHAT.replace("PICTURE", "<|vision_start|><|image_pad|><|vision_end|>")
        roles = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
        config = AutoConfig.for_model(
            model_type,
            text_config={"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, **TINY_TEXT},
            vision_config={**TINY_VISION, **TINY_VISION_OF[model_type]},
            **{f"{role}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for role, token in roles.items()},
        )
        return write_checkpoint(to, config, tokenizer, Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112), seed)


TINY_TEXT: dict[str, Any] = {
    **small(),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
}
TINY_VISION: dict[str, Any] = {"depth": 2, "num_heads": 2, "hidden_size": 32, "patch_size": 14, "initializer_range": 0.1}
TINY_VISION_OF: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"embed_dim": 32, "mlp_ratio": 2},
    "qwen2_5_vl": {"intermediate_size": 64, "out_hidden_size": 32, "window_size": 56, "fullatt_block_indexes": [1]},
    "qwen3_vl": {"intermediate_size": 64, "out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
}
