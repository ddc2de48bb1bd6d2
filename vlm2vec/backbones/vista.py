"""VISTA in small (arXiv 2406.04292): a BERT text encoder that reads features of a vision tower among its word embeddings.

A MobileNetV2 (arXiv 1801.04381) turns a picture into a feature map, averaged to `visual_grid` x `visual_grid` tokens, which a
two-layer MLP maps to the width of the text encoder. They take the places of `[unused1]` tokens. Attention is bidirectional.

Every picture is squashed to `image_size` x `image_size`: the grid has few cells, and borders would take them from the picture.

Shape letters: C items in a chunk, L tokens, D hidden width, N pictures, G visual tokens of a picture, F channels, H x W cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, gelu
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, MobileNetV2Config, MobileNetV2Model, ViTImageProcessorPil
from transformers.configuration_utils import PreTrainedConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel

from vlm2vec.backbones.base import Assets, Backbone, Part, Processor
from vlm2vec.backbones.toy import byte_tokenizer, small, write_checkpoint
from vlm2vec.collate import Features
from vlm2vec.config import ModelConfig
from vlm2vec.errors import DataError

IMAGE_TOKEN = "[unused1]"


class VistaConfig(PreTrainedConfig):
    """A BERT and a MobileNetV2 configuration, and how the one reads the other."""

    model_type = "vlm2vec_vista"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {"text_config": BertConfig, "vision_config": MobileNetV2Config}

    def __init__(
        self,
        text_config: BertConfig | dict[str, Any] | None = None,
        vision_config: MobileNetV2Config | dict[str, Any] | None = None,
        image_token_id: int = 2,
        image_size: int = 96,
        visual_grid: int = 3,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.text_config = text_config if isinstance(text_config, BertConfig) else BertConfig(**(text_config or {}))
        self.vision_config = vision_config if isinstance(vision_config, MobileNetV2Config) else MobileNetV2Config(**(vision_config or {}))
        self.image_token_id = image_token_id
        self.image_size = image_size
        self.visual_grid = visual_grid
        self.initializer_range = initializer_range
        super().__init__(**kwargs)


class VisionTower(MobileNetV2Model):
    """MobileNetV2 whose BatchNorm layers always use their stored statistics.

    Statistics of a chunk would make an embedding depend on its neighbours in the chunk, and a frozen tower drift.
    """

    _supports_sdpa = _supports_flash_attn = True  # it has no attention, so any kernel suits it

    def train(self, mode: bool = True) -> VisionTower:
        """Set training mode everywhere but in BatchNorm layers."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


class Projector(nn.Module):
    """Two linear layers with a GELU between them, from the channels of the feature map to the width of the text encoder."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, cells_NGF: Tensor) -> Tensor:
        """(N, G, F) -> (N, G, D)."""
        return self.linear_2(gelu(self.linear_1(cells_NGF)))


class VistaModel(PreTrainedModel):
    """Token ids and pictures -> hidden states of the text encoder."""

    config_class = VistaConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = True
    _no_split_modules = ["BertLayer"]

    def __init__(self, config: VistaConfig) -> None:
        super().__init__(config)
        self.vision_model = VisionTower(config.vision_config, add_pooling_layer=False)
        self.projector = Projector(self.vision_model.conv_1x1.convolution.out_channels, config.text_config.hidden_size)
        self.text_model = BertModel(config.text_config, add_pooling_layer=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Word embeddings of the text encoder."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings of the text encoder."""
        self.text_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Visual tokens (N, G, D) of pictures (N, 3, size, size)."""
        # channels last: depthwise convolutions run 1.5 times as fast that way on a CPU
        pixels_N3HW = pixel_values.to(self.dtype, memory_format=torch.channels_last)
        map_NFHW = self.vision_model(pixels_N3HW).last_hidden_state
        cells_NGF = adaptive_avg_pool2d(map_NFHW, self.config.visual_grid).flatten(2).transpose(1, 2)
        return self.projector(cells_NGF)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Hidden states (C, L, D); `pixel_values` holds the pictures of all rows in the order of their tokens, or they come as
        visual tokens: `pooler_output` (N, G, D) of `mm_encoder_outputs["image"]`.
        """
        words_CLD = self.get_input_embeddings()(input_ids)
        tokens_NGD: Tensor | None = mm_encoder_outputs["image"].pooler_output if mm_encoder_outputs else None
        if pixel_values is not None:
            tokens_NGD = self.get_image_features(pixel_values)
        if tokens_NGD is not None:
            is_image_CL1 = (input_ids == self.config.image_token_id)[..., None]
            words_CLD = words_CLD.masked_scatter(is_image_CL1, tokens_NGD.to(words_CLD.dtype))
        return self.text_model(inputs_embeds=words_CLD, attention_mask=attention_mask, position_ids=position_ids, **kwargs)


AutoConfig.register(VistaConfig.model_type, VistaConfig, exist_ok=True)
AutoModel.register(VistaConfig, VistaModel, exist_ok=True)


class VistaProcessor(Processor):
    """Pictures as (1, 3, size, size) and G image tokens each."""

    packs = ("bert",)

    def __init__(self, tokenizer: Any, image_processor: Any, options: ModelConfig, config: Any, assets: Assets = None) -> None:
        self.tokens_per_image = config.visual_grid**2
        self.longest = config.text_config.max_position_embeddings
        super().__init__(tokenizer, image_processor, options, config, assets)

    def image_inputs(self, image: Image.Image) -> dict[str, Tensor]:
        """`pixel_values` (1, 3, size, size)."""
        return {"pixel_values": self.image_processor(image, return_tensors="pt")["pixel_values"]}

    def image_token_ids(self, inputs: dict[str, Tensor]) -> list[int]:
        """G image tokens."""
        return [self.image_token_id] * self.tokens_per_image

    def count_image_tokens(self, width: int, height: int) -> int:
        """G, whatever the size."""
        return self.tokens_per_image

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """The one size of all pictures."""
        return self.image_processor.size["width"], self.image_processor.size["height"]

    def text_budget(self, image_tokens: int) -> int:
        """`max_tokens`, or less where the encoder's learned positions end."""
        room = self.longest - image_tokens - len(self.prefix) - len(self.suffix)
        if room < 0:
            raise DataError(f"{image_tokens} image tokens do not fit the {self.longest} positions of this model; give fewer pictures")
        return min(self.options.max_tokens, room)

    def collate_images(self, rows: Sequence[Features], input_ids_CL: Tensor) -> dict[str, Tensor]:
        """`position_ids` (C, L) and the pictures of all rows."""
        return {"position_ids": self.positions(rows), **self.pictures(rows)}


class Vista(Backbone):
    """BERT reading MobileNetV2."""

    model_types = (VistaConfig.model_type,)
    processor_class = VistaProcessor
    differs_elsewhere = "transformers has no model of this type: its modules are put together here"
    auto_class = "AutoModel"
    parts: dict[str, Part] = {"vision_model": "vision", "projector": "projector", "text_model": "language"}
    tower_names = ("vision_model", "projector")

    def picture_features(self, inputs: dict[str, Tensor]) -> Tensor:
        """Visual tokens (1, G, D) of one picture."""
        return self.model.get_image_features(**inputs)

    @property
    def inner(self) -> Any:
        """The whole model: it has no head."""
        return self.model

    def hidden(self, batch: dict[str, Tensor]) -> Tensor:
        """Last hidden states of a collated chunk."""
        return self.model(**self.inputs(batch)).last_hidden_state

    @classmethod
    def tiny_checkpoint(cls, to: Path, seed: int = 0, model_type: str | None = None) -> Path:
        """About 60 k parameters; 4 tokens a picture."""
        tokenizer = byte_tokenizer(
            {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "image_token": IMAGE_TOKEN}, frame="[CLS] $A [SEP]"
        )
        tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 1024}
        config = VistaConfig(
            text_config=small(**tokens),
            vision_config={**TOWER, "depth_multiplier": 0.15, "finegrained_output": False, "initializer_range": 0.3},
            image_token_id=tokenizer.image_token_id,
            image_size=64,
            visual_grid=2,
            initializer_range=0.05,
        )
        return write_checkpoint(to, config, tokenizer, image_processor(config.image_size), seed, cls.auto_class)


TOWER: dict[str, Any] = {"tf_padding": False, "layer_norm_eps": 1e-5, "first_layer_is_expansion": True}  # as torchvision's MobileNetV2


def image_processor(size: int) -> ViTImageProcessorPil:
    """Squash to a square and normalize as ImageNet classifiers expect."""
    return ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD)
