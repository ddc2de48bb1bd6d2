"""The picture side of Phi-3.5-vision (arXiv 2404.14219): a picture scaled into a grid of square crops, with a global view in front.

The picture keeps its proportions: it is scaled to the largest width whose crops do not exceed `num_crops`, padded with white to whole
crops and cut row by row; the global view is the padded picture shrunk to one crop. Sizes follow the published processor to the pixel,
floats in its order of operations.

Shape letters: T crops of a picture with its global view, S side of a crop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import ImageProcessingMixin
from transformers.processing_utils import ImagesKwargs

CELL = 28  # pixels to a side of an image token: 2 x 2 patches of 14
WHITE = (255, 255, 255)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Layout:
    """Where a landscape picture goes: scaled to `width` x `height` pixels, on a canvas of `columns` x `rows` crops."""

    width: int
    height: int
    columns: int
    rows: int

    @classmethod
    def of(cls, width: int, height: int, num_crops: int, side: int) -> Layout:
        """The layout of a picture of `width` >= `height` pixels in at most `num_crops` crops."""
        ratio = width / height
        columns = 1
        while (columns + 1) * math.ceil((columns + 1) / ratio) <= num_crops:
            columns += 1
        # A strip more than columns * side times as long as wide would get no height at all; it keeps a line of one pixel.
        scaled = max(1, int(columns * side / ratio))
        return cls(columns * side, scaled, columns, math.ceil(scaled / side))


class Phi3VImageProcessor(ImageProcessingMixin):
    """Settings under the names of the published preprocessor_config.json; `num_img_tokens` is how many tokens a crop becomes."""

    valid_kwargs = ImagesKwargs

    def __init__(
        self,
        num_crops: int = 4,
        num_img_tokens: int = 144,
        image_mean: tuple[float, ...] | list[float] = CLIP_MEAN,
        image_std: tuple[float, ...] | list[float] = CLIP_STD,
        do_convert_rgb: bool = True,
        **kwargs: Any,
    ) -> None:
        self.num_crops = num_crops
        self.num_img_tokens = num_img_tokens
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.do_convert_rgb = do_convert_rgb
        super().__init__()

    @property
    def cells(self) -> int:
        """Image tokens along a side of a crop."""
        return math.isqrt(self.num_img_tokens)

    @property
    def side(self) -> int:
        """Pixels along a side of a crop, S."""
        return self.cells * CELL

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of crops of a picture of this size."""
        layout = Layout.of(max(width, height), min(width, height), self.num_crops, self.side)
        return (layout.columns, layout.rows) if width < height else (layout.rows, layout.columns)

    def count_tokens(self, rows: int, columns: int) -> int:
        """Image tokens of a grid of crops: one per cell of every crop and of the global view, one at the end of every line of cells, and
        one between the two.
        """
        return (rows * columns + 1) * self.cells**2 + (rows + 1) * self.cells + 1

    def canvas(self, image: Image.Image) -> Image.Image:
        """The RGB picture scaled and padded to whole crops. A portrait is laid out as its mirror image at the diagonal."""
        image = image if image.mode == "RGB" else image.convert("RGB")
        portrait = image.width < image.height
        if portrait:
            image = image.transpose(Image.Transpose.TRANSPOSE)
        layout = Layout.of(*image.size, self.num_crops, self.side)
        canvas = Image.new("RGB", (layout.width, layout.rows * self.side), WHITE)
        scaled = image.resize((layout.width, layout.height), Image.Resampling.BILINEAR)
        canvas.paste(scaled, (0, (canvas.height - layout.height) // 2))
        return canvas.transpose(Image.Transpose.TRANSPOSE) if portrait else canvas

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        """`pixel_values` (T, 3, S, S), the global view first, and `image_sizes` (2,): height and width of the canvas."""
        canvas = self.canvas(image)
        pixels_3HW = torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float().div(255)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        pixels_3HW = ((pixels_3HW - mean) / std).contiguous()
        overview_13SS = interpolate(pixels_3HW[None], size=(self.side, self.side), mode="bicubic")
        rows, columns = canvas.height // self.side, canvas.width // self.side
        crops = pixels_3HW.view(3, rows, self.side, columns, self.side).permute(1, 3, 0, 2, 4).flatten(0, 1)
        return {"pixel_values": torch.cat([overview_13SS, crops]), "image_sizes": torch.tensor([canvas.height, canvas.width])}
