"""Any other image-text-to-text model of transformers, by inference from its configuration, its module tree and one trial picture.

What can be inferred: models that turn every picture into the same number of features and take `pixel_values` alone. A picture becomes
that many bare image tokens; markers that a family's chat format puts around them are left out. What cannot be inferred is an error
that says what it was.

Shape letters: C items in a chunk, L tokens, N pictures.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, CLIPImageProcessorPil
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vlm2vec.backbones.base import Backbone, Part, Processor
from vlm2vec.backbones.loading import load_model
from vlm2vec.backbones.packed import CAUSAL
from vlm2vec.backbones.toy import byte_tokenizer, sizes, small, write_checkpoint
from vlm2vec.collate import Features
from vlm2vec.config import ModelConfig
from vlm2vec.errors import ModelError

NAMES: dict[Part, tuple[str, ...]] = {
    "vision": ("vision_tower", "vision_model", "visual", "vision_encoder"),
    "projector": ("multi_modal_projector", "mm_projector", "connector", "projector", "aligner"),
    "language": ("language_model", "text_model"),
}
HEADS: dict[str, Part] = {"lm_head": "head"}
CLIP_TOKENS = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}  # of the miniature
TRIALS = ((64, 96), (200, 100))  # sizes of two pictures that only a fixed-size family treats alike


def inferable_types() -> list[str]:
    """Model types that transformers knows as image-text-to-text."""
    return sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


class InferredProcessor(Processor):
    """Pictures of one fixed size, each as `tokens_per_image` image tokens."""

    tokens_per_image: int = 0  # set from the trial picture
    takes_token_types: bool = False
    packs = CAUSAL

    def image_inputs(self, image: Image.Image) -> dict[str, Tensor]:
        """`pixel_values` (1, ...)."""
        return {"pixel_values": self.image_processor(image, return_tensors="pt")["pixel_values"]}

    def image_token_ids(self, inputs: dict[str, Tensor]) -> list[int]:
        """`tokens_per_image` image tokens."""
        return [self.image_token_id] * self.tokens_per_image

    def count_image_tokens(self, width: int, height: int) -> int:
        """The same for every size."""
        return self.tokens_per_image

    def collate_images(self, rows: Sequence[Features], input_ids_CL: Tensor) -> dict[str, Tensor]:
        """The pictures of all rows and, for models that take them, `mm_token_type_ids` (C, L): 1 at image tokens.

        Of models that pack it is known how they count positions, and others count their own.
        """
        batch = {"mm_token_type_ids": (input_ids_CL == self.image_token_id).long()} if self.takes_token_types else {}
        if self.packed:
            batch["position_ids"] = self.positions(rows)
        return {**batch, **self.pictures(rows)}


class AutoBackbone(Backbone):
    """A model whose parts were found by their usual names."""

    model_types = ("llava",)
    processor_class = InferredProcessor

    def __init__(self, model: Any, processor: Processor, options: ModelConfig) -> None:
        super().__init__(model, processor, options)
        found = {part: _child(model, part) for part in NAMES}
        self.parts = {name: part for part, name in found.items()} | HEADS
        self.tower_names = (f"model.{found['vision']}", f"model.{found['projector']}")
        for name, _ in model.named_parameters():
            self.part_of(name)

    @classmethod
    def load(cls, path: Path, options: ModelConfig) -> Backbone:
        """Read a checkpoint folder strictly and try it on a picture. Raises ModelError naming what could not be inferred."""
        model = load_model(cls.auto_class, path, options)
        if not isinstance(getattr(model.config, "image_token_id", None), int):
            raise _cannot(model, "which token stands for a picture: its configuration has no image_token_id")
        processor = InferredProcessor.load(path, options, model.config)
        if processor.packed and model.config.model_type not in cls.model_types:
            raise _cannot(model, "whether items that share a row stay apart (model.attention: packed)")
        processor.takes_token_types = _takes_token_types(model)
        processor.tokens_per_image = _try_pictures(model, processor)
        return cls(model, processor, options)

    @classmethod
    def tiny_checkpoint(cls, to: Path, seed: int = 0, model_type: str | None = None) -> Path:
        """A LLaVA of about 60 k parameters; 16 tokens a picture."""
        named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "image_token": "<image>"}
        tokenizer = byte_tokenizer(named, frame="<s> $A")
        config = AutoConfig.for_model(
            "llava",
            text_config=small(model_type="llama", vocab_size=len(tokenizer), num_key_value_heads=2),
            vision_config={
                "model_type": "clip_vision_model",
                "image_size": 32,
                "patch_size": 8,
                "projection_dim": 32,
                **sizes(32, 64, layers=2, heads=4),
            },
            image_token_index=tokenizer.image_token_id,
            image_seq_length=16,
        )
        image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        return write_checkpoint(to, config, tokenizer, image_processor, seed, processor=CLIP_TOKENS)


def _cannot(model: Any, what: str) -> ModelError:
    return ModelError(f"model type {model.config.model_type}: cannot infer {what}. It needs a family of its own in vlm2vec/backbones")


def _child(model: Any, part: Part) -> str:
    """Name of the child of the inner model that is `part`."""
    children = [name for name, _ in model.model.named_children()] if hasattr(model, "model") else []
    found = [name for name in NAMES[part] if name in children]
    if len(found) != 1:
        raise _cannot(model, f"its {part} part: looked for {', '.join(NAMES[part])} among {', '.join(children) or 'no inner model'}")
    return found[0]


def _takes_token_types(model: Any) -> bool:
    parameters = inspect.signature(model.model.forward).parameters
    if "token_type_ids" in parameters:
        raise _cannot(model, "what its token_type_ids mean")
    return "mm_token_type_ids" in parameters


@torch.no_grad()
def _try_pictures(model: Any, processor: InferredProcessor) -> int:
    """How many features the model makes of a picture."""
    made = [processor.image_processor(Image.new("RGB", size, "white"), return_tensors="pt") for size in TRIALS]
    if set(made[0]) != {"pixel_values"}:
        raise _cannot(model, f"what its image inputs {', '.join(sorted(set(made[0]) - {'pixel_values'}))} mean")
    if made[0]["pixel_values"].shape != made[1]["pixel_values"].shape:
        raise _cannot(model, "how many tokens a picture has: its image processor gives pictures of different sizes different shapes")
    if not hasattr(model.model, "get_image_features"):
        raise _cannot(model, "how a picture becomes features: it has no get_image_features")
    output = model.model.get_image_features(pixel_values=made[0]["pixel_values"].to(model.dtype))
    features = getattr(output, "pooler_output", output)
    rows = features if isinstance(features, list | tuple) else [features]
    return sum(row.numel() // row.shape[-1] for row in rows)
