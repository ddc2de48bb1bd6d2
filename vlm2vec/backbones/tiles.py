"""What the families share that write a picture into the token sequence as the features of its tiles.

A tile is a square that the vision tower sees at once; a projector turns it into features, and each takes the place of one image token.

Shape letters: C items in a chunk, L tokens, T tiles of a picture, E edge of a tile in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from vlm2vec.backbones.base import Backbone, Part, Processor
from vlm2vec.collate import Features
from vlm2vec.errors import ModelError


class TileProcessor(Processor):
    """Pictures as (T, 3, E, E) tiles. The tiles of a chunk follow each other row after row, so none is computed in vain."""

    def image_inputs(self, image: Image.Image) -> dict[str, Tensor]:
        """`pixel_values` (T, 3, E, E) and what else `picture_inputs` names."""
        made = self.image_processor(image, return_tensors="pt")
        return {name: made[name] for name in self.picture_inputs}

    def collate_images(self, rows: Sequence[Features], input_ids_CL: Tensor) -> dict[str, Tensor]:
        """`position_ids` (C, L) and the pictures of all rows."""
        return {"position_ids": self.positions(rows), **self.pictures(rows)}

    def id_of(self, token: str) -> int:
        """The id of a marker that the family's prompts need. Raises ModelError if the tokenizer lacks it."""
        if token not in self.tokenizer.get_vocab():
            raise ModelError(f"tokenizer has no token {token}, which this family puts around a picture; it does not belong to this model")
        return int(self.tokenizer.convert_tokens_to_ids(token))


class TileBackbone(Backbone):
    """A vision tower, a projector and a language model under the names that most families use."""

    parts: dict[str, Part] = {
        "vision_tower": "vision",
        "vision_model": "vision",
        "multi_modal_projector": "projector",
        "image_newline": "projector",
        "language_model": "language",
        "lm_head": "head",
    }
    tower_names = ("model.vision_tower", "model.multi_modal_projector")
