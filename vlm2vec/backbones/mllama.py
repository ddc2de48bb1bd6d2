"""Llama 3.2 Vision (mllama; arXiv 2407.21783 section 7): a picture is one token, and some layers of the text attend to its tiles.

A token attends to the pictures of its item that stand before it, up to the next picture; pictures that touch are seen together.
`MllamaModel.forward` computes blank pictures for rows without one and lets tokens that see no picture attend to every tile alike, so that
an embedding would depend on its neighbours in the chunk. Here the vision model runs on real pictures only, their real tiles alone are
attended to, and a token that sees none attends to a key of zeros whose value is zero, which is its share in the published model.

Shape letters: C items in a chunk, L tokens, N pictures of the chunk, T tiles that a picture may have, E edge of a tile in pixels, P vision
states of a tile, V those of a picture, K those of an item after the key of zeros, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, MllamaImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import get_optimal_tiled_canvas

from vlm2vec.backbones.pictures import apart
from vlm2vec.backbones.tiles import TileBackbone, TileProcessor
from vlm2vec.backbones.toy import byte_tokenizer, small, special_ids, write_checkpoint
from vlm2vec.collate import Features


class MllamaProcessor(TileProcessor):
    """Pictures as (1, T, 3, E, E), blank where a picture has fewer tiles, with the id of their aspect ratio and a mask of real tiles."""

    picture_inputs = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")

    def image_inputs(self, image: Image.Image) -> dict[str, Tensor]:
        """`pixel_values` (1, T, 3, E, E), `aspect_ratio_ids` (1, 1) and `aspect_ratio_mask` (1, T)."""
        made = super().image_inputs(image)
        return {**made, **{name: made[name][0] for name in ("pixel_values", "aspect_ratio_mask")}}

    def wrap(self, ids: list[int]) -> list[int]:
        """`ids` with the beginning of text after the pictures that lead."""
        leading = next((place for place, token in enumerate(ids) if token != self.image_token_id), len(ids))
        return [*ids[:leading], *self.prefix, *ids[leading:], *self.suffix]

    def image_token_ids(self, inputs: dict[str, Tensor]) -> list[int]:
        """One image token, however large the picture."""
        return [self.image_token_id]

    def count_image_tokens(self, width: int, height: int) -> int:
        """One."""
        return 1

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """The canvas of all tiles."""
        high, wide = get_optimal_tiled_canvas(height, width, self.image_processor.max_image_tiles, self.image_processor.size["height"])
        return int(wide), int(high)

    def collate_images(self, rows: Sequence[Features], input_ids_CL: Tensor) -> dict[str, Tensor]:
        """As for every family, and where there are pictures `sees_NL`: which tokens of its own row attend to a picture."""
        batch = super().collate_images(rows, input_ids_CL)
        if not any(row.images for row in rows):
            return batch
        starts = [0 if self.options.padding_side == "right" else input_ids_CL.shape[1] - len(row) for row in rows]
        batch["picture_row_N"] = torch.tensor([index for index, row in enumerate(rows) for _ in row.images])
        batch["sees_NL"] = torch.zeros((len(batch["picture_row_N"]), input_ids_CL.shape[1]), dtype=torch.bool)
        spans = [(start + first, start + end) for start, row in zip(starts, rows, strict=True) for first, end in self._spans(row)]
        for sees_L, (first, end) in zip(batch["sees_NL"], spans, strict=True):
            sees_L[first:end] = True
        return batch

    def _spans(self, row: Features) -> list[tuple[int, int]]:
        """First and one past the last token that attend to each picture."""
        firsts = (row.input_ids == self.image_token_id).nonzero().flatten().tolist()
        spans: list[tuple[int, int]] = []
        following = len(row)
        for first in reversed(firsts):
            spans.append((first, spans[-1][1] if spans and following == first + 1 else following))
            following = first
        return spans[::-1]


class Mllama(TileBackbone):
    """Llama 3.2 Vision. The gates of the attending layers start at zero in a new model: it does not see until it is trained."""

    model_types = ("mllama",)
    processor_class = MllamaProcessor
    differs_elsewhere = (
        "transformers' processor begins a templated prompt with a picture in front twice, "
        "and its model lets a text attend to pictures beside it"
    )
    tower_names = ("model.vision_model", "model.multi_modal_projector")

    def hidden(self, batch: dict[str, Tensor]) -> Tensor:
        """Last hidden states (C, L, D) of a collated chunk."""
        text = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        seen = self._attended(batch) if "sees_NL" in batch else {}
        return self.model.model.language_model(**text, **seen, use_cache=False).last_hidden_state

    @property
    def takes_features(self) -> bool:
        """Its own `hidden` is."""
        return True

    def picture_features(self, inputs: dict[str, Tensor]) -> Tensor:
        """The vision states (V, D) of the real tiles of one picture."""
        return self._states(inputs)[0]

    def _states(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """The vision states (V, D) of the real tiles of each picture."""
        pictures = {name: inputs[name][None] for name in self.processor_class.picture_inputs}
        states_NTPD = self.inner.multi_modal_projector(self.inner.vision_model(**pictures).last_hidden_state)[0]
        tiles_NT = inputs["aspect_ratio_mask"].bool()
        return [states_TPD[tiles_T].flatten(0, 1) for states_TPD, tiles_T in zip(states_NTPD, tiles_NT, strict=True)]

    def _attended(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The vision states of each item (C, K, D), who attends to them (C, 1, L, K), and which tokens see a picture (C, 1, L, 1)."""
        rest, pictures = apart(batch)
        states_N = self.vectors(pictures) if pictures else self._states(rest)
        zero_1D = states_N[0].new_zeros((1, states_N[0].shape[-1]))
        states, sees = [], []
        for row in range(len(batch["input_ids"])):
            mine = (batch["picture_row_N"] == row).nonzero().flatten().tolist()
            sees_NL = batch["sees_NL"][mine]
            states.append(torch.cat([zero_1D, *(states_N[number] for number in mine)]))
            by_state = [sees_L.expand(len(states_N[number]), -1) for number, sees_L in zip(mine, sees_NL, strict=True)]
            sees.append(torch.cat([~sees_NL.any(0, keepdim=True), *by_state]))
        sees_CLK = pad_sequence(sees, batch_first=True).transpose(1, 2)
        hide_CLK = (~sees_CLK).to(zero_1D.dtype) * torch.finfo(zero_1D.dtype).min
        return {
            "cross_attention_states": pad_sequence(states, batch_first=True),
            "cross_attention_mask": hide_CLK[:, None],
            "full_text_row_masked_out_mask": (~sees_CLK[:, None, :, :1]).to(hide_CLK.dtype),
        }

    @classmethod
    def tiny_checkpoint(cls, to: Path, seed: int = 0, model_type: str | None = None) -> Path:
        """About 110 k parameters; tiles of 32 pixels and 17 states, at most 4; the second of three layers attends."""
        named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}
        tokenizer = byte_tokenizer({**named, "image_token": "<|image|>"}, ["<|python_tag|>"], frame="<|begin_of_text|> $A")
        vision = {"num_global_layers": 1, "vision_output_dim": 64, "intermediate_layers_indices": [0], "image_size": 32, "patch_size": 8}
        text: dict[str, Any] = {
            "num_key_value_heads": 2,
            "cross_attention_layers": [1],
            "vocab_size": len(tokenizer),
            **special_ids(tokenizer),
        }
        config = AutoConfig.for_model(
            "mllama",
            text_config=small(layers=3, **text),
            vision_config={**small(layers=1), "attention_heads": 2, "max_num_tiles": 4, **vision},
            image_token_index=tokenizer.image_token_id,
        )
        image_processor = MllamaImageProcessorPil(size={"height": 32, "width": 32}, max_image_tiles=4)
        return write_checkpoint(to, config, tokenizer, image_processor, seed, wake=0.5)
