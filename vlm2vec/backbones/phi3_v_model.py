"""Phi-3.5-vision (arXiv 2404.14219) put together from transformers' Phi-3 and CLIP, under the tensor names of the published checkpoint.

Negative token ids stand for picture features, as in the published processor. Only what an embedding reads is computed: the crops that
exist, and CLIP up to the layer whose output is used. The layers after it are kept, because checkpoints hold them.

Shape letters: C items in a chunk, L tokens, D hidden width, N pictures, T crops of all pictures, global views included, P patches of a
crop, F CLIP width, V feature vectors of all pictures.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel, Phi3Config, Phi3ForCausalLM, Phi3Model
from transformers import initialization as init
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import BaseModelOutputWithPast

# The tower that the published configuration only names: CLIP ViT-L/14 at 336 pixels.
CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
# What the published code can be told but nobody trained: the only known value of each key.
EMBEDDING = {"hd_transform_order": "sub_glb", "projection_cls": "mlp", "use_hd_transform": True, "with_learnable_separator": True}
FEATURES = {"type_feature": "patch"}
MERGE = 2  # patches along a side of an image token
RUNTIME_KEYS = ("_attn_implementation", "auto_map")  # in the published config.json, but no property of the model


@strict
class Phi3VConfig(Phi3Config):
    """Phi-3's configuration with the picture keys of the published one; `vision_config` absent means CLIP ViT-L/14 at 336 pixels."""

    model_type = "phi3_v"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {"vision_config": SubConfigSpec(CLIPVisionConfig, init_kwargs=CLIP_L_336)}
    image_token_id: ClassVar[int] = -1

    embd_layer: dict | None = None
    img_processor: dict | None = None
    vision_config: Any = None  # dict or CLIPVisionConfig; the latter once built

    def __post_init__(self, **kwargs: Any) -> None:
        for given, known in ((self.embd_layer or {}, EMBEDDING), (self.img_processor or {}, FEATURES)):
            for key, value in known.items():
                if given.get(key, value) != value:
                    raise ValueError(f"{key} is {given[key]!r}; only {value!r} is known")
        scaling = kwargs.get("rope_scaling") or {}
        if scaling.get("type") in ("su", "longrope"):  # `su` is LongRoPE's first name, which transformers finds too late to complete it
            rest = {key: value for key, value in scaling.items() if key != "type"}
            stretch = self.max_position_embeddings / self.original_max_position_embeddings
            kwargs["rope_scaling"] = {**rest, "rope_type": "longrope", "factor": stretch}
        super().__post_init__(**{key: value for key, value in kwargs.items() if key not in RUNTIME_KEYS})

    @property
    def vision_depth(self) -> int:
        """How many CLIP layers are read: up to the one whose output is entry `layer_idx` of all hidden states, the input included."""
        index = (self.img_processor or {}).get("layer_idx", -2)
        return index if index >= 0 else self.vision_config.num_hidden_layers + 1 + index


class LongRope(nn.Module):
    """LongRoPE (arXiv 2402.13753): rotations slowed by one list of factors for short items and by another for long ones.

    Each item chooses by its own length. The choice by the longest row of a batch, which transformers makes, would let an embedding depend
    on its neighbours.
    """

    def __init__(self, config: Phi3Config) -> None:
        super().__init__()
        rope: Any = config.rope_parameters
        width = config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, width, 2, dtype=torch.int64, device="cpu").float() / width
        factors = torch.tensor([rope["short_factor"], rope["long_factor"]], dtype=torch.float32, device="cpu")
        # A plain tensor: a buffer would follow the weights into bfloat16, and get lost where a model is made without memory.
        self.frequencies = 1.0 / (factors * rope["rope_theta"] ** exponents)
        self.longest_short = config.original_max_position_embeddings
        stretch = max(1.0, config.max_position_embeddings / self.longest_short)
        self.magnitude = math.sqrt(1 + math.log(stretch) / math.log(self.longest_short))

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (C, L, head width) of positions (C, L), in the number format of `x`. An item starts at every position 0."""
        item_CL = (position_ids == 0).cumsum(dim=-1)
        longest_CL = item_CL.new_zeros((len(item_CL), item_CL.shape[1] + 1)).scatter_reduce(1, item_CL, position_ids, "amax")
        is_long_CL = longest_CL.gather(1, item_CL) >= self.longest_short
        frequencies = self.frequencies.to(x.device)[is_long_CL.long()]
        angles = position_ids[..., None].float() * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * self.magnitude).to(x.dtype), (angles.sin() * self.magnitude).to(x.dtype)


class ClipTower(nn.Module):
    """CLIP as far as it is read."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        self.vision_model = CLIPVisionModel(config.vision_config)
        self.depth = config.vision_depth

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Patch features (T, P, F) of crops (T, 3, side, side)."""
        states = self.vision_model.pre_layrnorm(self.vision_model.embeddings(pixel_values))
        for layer in self.vision_model.encoder.layers[: self.depth]:
            states = layer(states, attention_mask=None)
        return states[:, 1:]


class PictureEmbedding(nn.Module):
    """Crops -> feature vectors in the order of image tokens: the tiled crops line by line, a separator, the global view line by line."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        width = config.vision_config.hidden_size * MERGE**2
        self.side: int = config.vision_config.image_size
        self.glb_GN = nn.Parameter(torch.empty(1, 1, width))
        self.sub_GN = nn.Parameter(torch.empty(1, 1, 1, width))
        layers = [nn.Linear(width, config.hidden_size), nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
        self.img_projection = nn.Sequential(*layers)
        self.img_processor = ClipTower(config)

    def forward(self, pixel_values: Tensor, image_sizes: Tensor) -> Tensor:
        """(V, D) of crops (T, 3, side, side), each picture's global view before its crops; `image_sizes` (N, 2) in pixels, height first."""
        grids = (image_sizes // self.side).tolist()
        cells = _merge(self.img_processor(pixel_values))
        pictures = cells.split([1 + rows * columns for rows, columns in grids])
        lines = [self._in_order(picture, rows, columns) for picture, (rows, columns) in zip(pictures, grids, strict=True)]
        return self.img_projection(torch.cat(lines))

    def _in_order(self, cells: Tensor, rows: int, columns: int) -> Tensor:
        """One picture's merged crops (1 + rows * columns, S, S, 4 F), S cells to a side -> its vectors (tokens, 4 F)."""
        side = cells.shape[1]
        tiled = cells[1:].unflatten(0, (rows, columns)).transpose(1, 2).reshape(rows * side, columns * side, -1)
        return torch.cat([self._with_line_ends(tiled), self.glb_GN[0].to(cells.dtype), self._with_line_ends(cells[0])])

    def _with_line_ends(self, cells: Tensor) -> Tensor:
        """Cells (H, W, 4 F), a separator after each line -> (H * (W + 1), 4 F)."""
        return torch.cat([cells, self.sub_GN[0].to(cells.dtype).expand(len(cells), 1, -1)], dim=1).flatten(0, 1)


def _merge(features_TPF: Tensor) -> Tensor:
    """Patches (T, P, F), row by row -> neighbouring 2 x 2 side by side, row by row: (T, S, S, 4 F)."""
    cells = math.isqrt(features_TPF.shape[1]) // MERGE
    return features_TPF.unflatten(1, (cells, MERGE, cells, MERGE)).transpose(2, 3).flatten(3)


class Phi3VModel(Phi3Model):
    """Token ids and pictures -> hidden states."""

    config_class = Phi3VConfig

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__(config)
        self.vision_embed_tokens = PictureEmbedding(config)
        self.rotary_emb = LongRope(config)  # type: ignore[assignment]  # called the same way
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PictureEmbedding):
            for separator in (module.glb_GN, module.sub_GN):
                init.normal_(separator, std=self.config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """States (C, L, D). Crops (T, 3, side, side) and sizes (N, 2) of all pictures come in the order of their tokens, or as
        features: a list of (V, D) under `pooler_output` of `mm_encoder_outputs["image"]`.

        Raises ValueError unless there are as many picture tokens as picture features.
        """
        is_picture_CL = input_ids < 0
        words_CLD = self.embed_tokens(input_ids.clamp(min=0))
        features_VD: Tensor | None = torch.cat(mm_encoder_outputs["image"].pooler_output) if mm_encoder_outputs else None
        if pixel_values is not None:
            features_VD = self.vision_embed_tokens(pixel_values, image_sizes)
        found, made = int(is_picture_CL.sum()), 0 if features_VD is None else len(features_VD)
        if found != made:  # scattering would take too many features in silence
            raise ValueError(f"{found} picture tokens, but {made} picture features")
        if features_VD is not None:
            words_CLD = words_CLD.masked_scatter(is_picture_CL[..., None], features_VD.to(words_CLD.dtype))
        return super().forward(inputs_embeds=words_CLD, attention_mask=attention_mask, position_ids=position_ids, **kwargs)


class Phi3VForCausalLM(Phi3ForCausalLM):
    """The published class: the model with a language head, which no embedding reads."""

    config_class = Phi3VConfig
    # Another name of the word embeddings, which a checkpoint may hold besides them, and buffers that older versions stored.
    _keys_to_ignore_on_load_unexpected = [r"vision_embed_tokens\.wte\.weight", r"rotary_emb\.inv_freq", r"embeddings\.position_ids"]

    def __init__(self, config: Phi3VConfig) -> None:
        super(Phi3ForCausalLM, self).__init__(config)
        self.model = Phi3VModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register(Phi3VConfig.model_type, Phi3VConfig, exist_ok=True)
AutoModelForCausalLM.register(Phi3VConfig, Phi3VForCausalLM, exist_ok=True)
