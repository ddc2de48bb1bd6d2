"""Things that can be told apart, and pictures of them: some copies of one shape in one colour on a light ground.

Pixels are drawn with integers in numpy, so that they are the same on every machine; the bytes of an encoded file also depend on the
version of Pillow.

Shape letters: H, W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from vlm2vec.data.sampler import permutation, random_words

Pixels = NDArray[np.uint8]  # (H, W, 3)
Look = tuple[object, ...]  # key of the random numbers that make one picture of a thing differ from another

COLOURS = {
    "red": (206, 32, 41),
    "green": (34, 139, 60),
    "blue": (30, 70, 190),
    "yellow": (230, 190, 0),
    "purple": (122, 40, 160),
    "black": (16, 16, 16),
    "orange": (240, 120, 10),
    "brown": (110, 66, 30),
    "pink": (240, 90, 160),
    "grey": (120, 120, 120),
    "cyan": (0, 170, 190),
    "olive": (118, 122, 20),
}
GROUNDS = {
    "snow": (240, 240, 240),
    "sand": (240, 226, 188),
    "sky": (196, 226, 242),
    "mint": (200, 240, 210),
    "rose": (242, 206, 210),
    "lilac": (222, 206, 242),
    "lime": (226, 242, 170),
    "mist": (204, 210, 214),
}
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven")
# name, plural, and whether a point of the square -100..100 both ways belongs to the shape (rows grow downwards)
SHAPES: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "circle": ("circles", lambda x, y: x * x + y * y <= 9500),
    "square": ("squares", lambda x, y: np.maximum(abs(x), abs(y)) <= 84),
    "diamond": ("diamonds", lambda x, y: abs(x) + abs(y) <= 100),
    "ring": ("rings", lambda x, y: (x * x + y * y <= 9500) & (x * x + y * y >= 3600)),
    "cross": ("crosses", lambda x, y: np.minimum(abs(x), abs(y)) <= 28),
    "saltire": ("saltires", lambda x, y: abs(abs(x) - abs(y)) <= 36),
    "triangle": ("triangles", lambda x, y: 2 * abs(x) <= y + 100),
    "dome": ("domes", lambda x, y: (x * x + (y - 60) * (y - 60) <= 22000) & (y <= 60)),
    "frame": ("frames", lambda x, y: (np.maximum(abs(x), abs(y)) <= 92) & (np.maximum(abs(x), abs(y)) >= 56)),
    "bar": ("bars", lambda x, y: abs(y) <= 36),
    "pillar": ("pillars", lambda x, y: abs(x) <= 36),
    "hourglass": ("hourglasses", lambda x, y: abs(x) <= abs(y)),
}
PLAIN = len(COLOURS) * len(SHAPES) * len(NUMBERS)  # things that differ in more than their ground: 1,008
ALL = PLAIN * len(GROUNDS)


@dataclass(frozen=True)
class Thing:
    """What a picture shows. `ground` is None where it says nothing: then every picture has another one."""

    colour: str
    shape: str
    count: int
    ground: str | None = None

    @property
    def kind(self) -> str:
        """The shape, in the plural if there are more."""
        return self.shape if self.count == 1 else SHAPES[self.shape][0]

    @property
    def words(self) -> str:
        place = f" on {self.ground}" if self.ground else ""
        return f"{NUMBERS[self.count - 1]} {self.colour} {self.kind}{place}"


def things(count: int, *key: object) -> list[Thing]:
    """`count` different things in an order that depends on `key`; their ground counts only where there are too few without."""
    size = PLAIN if count <= PLAIN else ALL
    return [_thing(number, size == ALL) for number in permutation(size, *key)[:count].tolist()]


def _thing(number: int, grounded: bool) -> Thing:
    number, colour = divmod(number, len(COLOURS))
    number, shape = divmod(number, len(SHAPES))
    number, count = divmod(number, len(NUMBERS))
    return Thing(list(COLOURS)[colour], list(SHAPES)[shape], count + 1, list(GROUNDS)[number] if grounded else None)


# -- drawing -----------------------------------------------------------------------------------------------------------------------------


def draw(thing: Thing, look: Look) -> Pixels:
    """24 to 70 pixels each way; sizes, margins and shades depend on the look."""
    words = [int(word % 2**20) for word in random_words(9, "look", *look)]
    columns = {1: 1, 2: 2, 3: 2, 4: 2}.get(thing.count, 3)
    rows = -(-thing.count // columns)
    cell = 40 // columns + words[0] % 6
    width, height = (count * cell + 5 + word % 14 for count, word in ((columns, words[1]), (rows, words[2])))
    ground = GROUNDS[thing.ground or list(GROUNDS)[words[3] % len(GROUNDS)]]
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    pixels[:] = [level + word % 13 for level, word in zip(ground, words[4:7], strict=True)]
    left, top = words[7] % (width - columns * cell), words[8] % (height - rows * cell)
    for index in range(thing.count):
        row, column = divmod(index, columns)
        place = pixels[top + row * cell :, left + column * cell :][:cell, :cell]
        place[_mask(thing.shape, cell)] = COLOURS[thing.colour]
    return pixels


@lru_cache(maxsize=1024)
def _mask(shape: str, cell: int) -> NDArray[np.bool_]:
    """(cell, cell) with an empty edge on two sides, so that neighbours do not touch."""
    size = cell - 3
    levels = (2 * np.arange(size) - (size - 1)) * 100 // (size - 1)
    mask = np.zeros((cell, cell), dtype=bool)
    mask[:size, :size] = SHAPES[shape][1](levels[None, :], levels[:, None])
    return mask


def side_by_side(panels: Sequence[Pixels]) -> Pixels:
    """Panels in one row; a lower one goes on at the bottom with its own ground."""
    height = max(len(panel) for panel in panels)
    return np.concatenate([_heighten(panel, height) for panel in panels], axis=1)


def _heighten(panel: Pixels, height: int) -> Pixels:
    return np.concatenate([panel, np.tile(panel[-1:, -1:], (height - len(panel), panel.shape[1], 1))])


# -- files -------------------------------------------------------------------------------------------------------------------------------


def _file(image: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def _jpeg(pixels: Pixels) -> bytes:
    return _file(Image.fromarray(pixels), "JPEG", quality=90)


def _grey(pixels: Pixels) -> bytes:
    return _file(Image.fromarray(pixels).convert("L"), "JPEG", quality=90)


def _cmyk(pixels: Pixels) -> bytes:
    return _file(Image.fromarray(pixels).convert("CMYK"), "JPEG", quality=90)


def _png(pixels: Pixels) -> bytes:
    return _file(Image.fromarray(pixels), "PNG")


def _palette(pixels: Pixels) -> bytes:
    """256 colours, of which that of the upper left corner is transparent."""
    image = Image.fromarray(pixels).quantize(dither=Image.Dither.NONE)
    return _file(image, "PNG", transparency=int(np.asarray(image)[0, 0]))


def _sixteen_bit(pixels: Pixels) -> bytes:
    levels = np.asarray(Image.fromarray(pixels).convert("L")).astype(np.uint16) * 257
    return _file(Image.fromarray(levels), "PNG")


def _turned(pixels: Pixels) -> bytes:
    """Stored lying, with the EXIF orientation that puts it upright."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise by a quarter
    return _file(Image.fromarray(np.ascontiguousarray(np.rot90(pixels))), "JPEG", quality=90, exif=exif)


# by name: the suffix of the file and what encodes it
ENCODERS: dict[str, tuple[str, Callable[[Pixels], bytes]]] = {
    "jpeg": (".jpg", _jpeg),
    "grey": (".jpg", _grey),
    "cmyk": (".jpg", _cmyk),
    "palette": (".png", _palette),
    "sixteen-bit": (".png", _sixteen_bit),
    "turned": (".jpg", _turned),
    "misnamed": (".jpg", _png),
    "upper-case": (".JPG", _jpeg),
}


@dataclass(frozen=True)
class Picture:
    """A file yet to be drawn. `panels` are things with their looks, from left to right; `crop` is the panel that is cut out, if any."""

    path: str
    panels: tuple[tuple[Thing, Look], ...]
    crop: int | None = None
    encoder: str = "jpeg"

    @property
    def pixels(self) -> Pixels:
        panels = [draw(thing, look) for thing, look in self.panels]
        if self.crop is None:
            return side_by_side(panels)
        return _heighten(panels[self.crop], max(len(panel) for panel in panels))

    @property
    def data(self) -> bytes:
        """The encoded file."""
        return ENCODERS[self.encoder][1](self.pixels)
