"""Idefics3 (arXiv 2408.12637) and SmolVLM (arXiv 2504.05299): square tiles, pixel shuffle, a Llama-like decoder.

A large picture is cut into rows and columns of tiles, each announced by `<row_i_col_j>`, with the whole picture after them; a
small one is the whole picture alone. The expansion is the string of the family's own processor, in the checkpoint's tokens.

Shape letters: C items in a chunk, T tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoConfig

from vlm2vec.backbones.base import Assets, Backbone, Part, Processor
from vlm2vec.backbones.packed import CAUSAL
from vlm2vec.backbones.toy import byte_tokenizer, sizes, write_checkpoint
from vlm2vec.collate import Features
from vlm2vec.config import ModelConfig
from vlm2vec.errors import RecipeError

FAKE, GLOBAL = "<fake_token_around_image>", "<global-img>"
MAX_EDGE = 4096  # the image processor never makes a picture longer than this
MARKERS = (FAKE, GLOBAL, *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)))


class Idefics3Processor(Processor):
    """Pictures as (T, 3, edge, edge) tiles, T = rows x columns + 1, or 1 for a picture that is not cut."""

    packs = CAUSAL

    def __init__(self, tokenizer: Any, image_processor: Any, options: ModelConfig, config: Any, assets: Assets = None) -> None:
        self.edge: int = image_processor.max_image_size["longest_edge"]
        self.tokens_per_tile = (self.edge // config.vision_config.patch_size) ** 2 // config.scale_factor**2
        self._expansions: dict[tuple[int, int], list[int]] = {}
        super().__init__(tokenizer, image_processor, options, config, assets)

    def control_tokens(self) -> list[str]:
        """The image token and the markers around tiles, as far as the tokenizer has them as single tokens."""
        known = self.tokenizer.get_added_vocab()
        return [*super().control_tokens(), *(marker for marker in MARKERS if marker in known)]

    def limit_pixels(self, smallest: int | None, largest: int | None) -> None:
        """Set the longest edge to the root of `max_pixels`, in whole tiles. Every picture is scaled to that edge, so no minimum exists."""
        if smallest:
            raise RecipeError("model.min_pixels: this family scales every picture to one longest edge; leave it null and use max_pixels")
        if largest:
            edge = max(1, math.isqrt(largest) // self.edge) * self.edge
            size = self.image_processor.size
            self.image_processor.size = type(size)(longest_edge=min(edge, size["longest_edge"]))

    def image_inputs(self, image: Image.Image) -> dict[str, Tensor]:
        """`pixel_values` (T, 3, edge, edge) and `grid` (2,): rows and columns of tiles, 0 and 0 for a picture that is not cut."""
        made = self.image_processor(image, return_row_col_info=True, return_tensors="pt")
        return {"pixel_values": made["pixel_values"][0], "grid": torch.tensor([made["rows"][0][0], made["cols"][0][0]])}

    def image_token_ids(self, inputs: dict[str, Tensor]) -> list[int]:
        """Ids of the expansion string."""
        rows, columns = inputs["grid"].tolist()
        return self._expansion(rows, columns)

    def count_image_tokens(self, width: int, height: int) -> int:
        """Length of the expansion for a picture of this size."""
        return len(self._expansion(*self._grid(width, height)))

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """The picture at its longest edge, or its tiles where they are larger."""
        rows, columns = self._grid(width, height)
        wide, high = _scaled(width, height, self.image_processor.size["longest_edge"])
        return max(wide, columns * self.edge), max(high, rows * self.edge)

    def collate_images(self, rows: Sequence[Features], input_ids_CL: Tensor) -> dict[str, Tensor]:
        """`position_ids` (C, L) and the pictures of all rows."""
        return {"position_ids": self.positions(rows), **self.pictures(rows)}

    def joined(self, images: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """`pixel_values` (1, all tiles, 3, edge, edge): the model needs only their order, so none is padded."""
        return {name: tiles[None] for name, tiles in super().joined(images).items()}

    def _expansion(self, rows: int, columns: int) -> list[int]:
        if (rows, columns) not in self._expansions:
            text = self._expansion_text(rows, columns)
            self._expansions[rows, columns] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        return self._expansions[rows, columns]

    def _expansion_text(self, rows: int, columns: int) -> str:
        tile = self.image_token * self.tokens_per_tile
        lines = ["".join(f"{FAKE}<row_{row}_col_{column}>{tile}" for column in range(1, columns + 1)) + "\n" for row in range(1, rows + 1)]
        return "".join([*lines, "\n" if lines else "", FAKE, GLOBAL, tile, FAKE])

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of tiles, with the image processor's own rounding."""
        if not self.image_processor.do_image_splitting:
            return 0, 0
        width, height = _scaled(width, height, self.image_processor.size["longest_edge"])
        longer = math.ceil(max(width, height) / self.edge)
        shorter = math.ceil(_short_side(longer * self.edge, width, height) / self.edge)
        if longer <= 1:
            return 0, 0
        return (shorter, longer) if width >= height else (longer, shorter)


def _scaled(width: int, height: int, longest: int) -> tuple[int, int]:
    """The size after scaling the longer side to `longest`, the shorter floored and made even, within the family's upper bound."""
    short = _short_side(longest, width, height)
    short = max(1, short + short % 2)
    width, height = (longest, short) if width >= height else (short, longest)
    if longest <= MAX_EDGE:
        return width, height
    short = max(1, _short_side(MAX_EDGE, width, height))
    return (MAX_EDGE, short) if width >= height else (short, MAX_EDGE)


def _short_side(longer: int, width: int, height: int) -> int:
    """The shorter side when the longer becomes `longer`; floats are divided and multiplied in the image processor's order."""
    return int(longer / (width / height)) if width >= height else int(longer * (width / height))


class Idefics3(Backbone):
    """Idefics3 and SmolVLM."""

    model_types = ("idefics3", "smolvlm")
    processor_class = Idefics3Processor
    guarded_elsewhere = False
    parts: dict[str, Part] = {"vision_model": "vision", "connector": "projector", "text_model": "language", "lm_head": "head"}
    tower_names = ("model.vision_model", "model.connector")

    @classmethod
    def tiny_checkpoint(cls, to: Path, seed: int = 0, model_type: str | None = None) -> Path:
        """About 60 k parameters; tiles of 32 pixels and 4 tokens, at most 2 x 2 of them beside the whole picture."""
        model_type = model_type or cls.model_types[0]
        tokenizer = family_tokenizer()
        text = sizes(32, 64, layers=2, heads=4) | {"num_key_value_heads": 2, "initializer_range": 0.2}
        vision = sizes(32, 64, layers=2, heads=2) | {"image_size": 32, "patch_size": 8, "initializer_range": 0.2}
        config = family_config(model_type, tokenizer, text, vision, scale_factor=2)
        image_processor = family_image_processor(model_type, tile=32, longest=64)
        return write_checkpoint(to, config, tokenizer, image_processor, seed, processor={"image_seq_len": 4})


def family_tokenizer(words: Iterable[str] = (), size: int = 256) -> Any:
    """A byte-level tokenizer with the family's special tokens; `words` teach it merges up to `size` ids."""
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "image_token": "<image>"}
    named |= {"fake_image_token": FAKE, "global_image_token": GLOBAL, "end_of_utterance_token": "<end_of_utterance>"}
    return byte_tokenizer(named, MARKERS[2:], words, size)


def family_config(model_type: str, tokenizer: Any, text: dict[str, Any], vision: dict[str, Any], scale_factor: int) -> Any:
    """Configuration of a new model around a Llama of the sizes in `text` and a vision transformer of those in `vision`."""
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    return AutoConfig.for_model(
        model_type,
        text_config={"model_type": "llama", **ids, **text, "vocab_size": len(tokenizer)},
        vision_config=vision,
        scale_factor=scale_factor,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=bool(text.get("tie_word_embeddings")),
    )


def family_image_processor(model_type: str, tile: int, longest: int = 0) -> Any:
    """The family's image processor; without `longest` it never cuts a picture and makes each one tile."""
    made = transformers.Idefics3ImageProcessorPil if model_type == "idefics3" else transformers.SmolVLMImageProcessorPil
    return made(size={"longest_edge": longest or tile}, max_image_size={"longest_edge": tile}, do_image_splitting=bool(longest))
