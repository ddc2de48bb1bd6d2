"""Small copies of pictures as data URIs, all of them together within a budget of bytes."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vlm2vec.data.images import load_image
from vlm2vec.data.types import ImageRef
from vlm2vec.errors import ImageError
from vlm2vec.io import safe_join

BUDGET = 2_400_000
# (longest side in pixels, WebP quality), tried in order until everything fits; the last is used even if it does not.
LEVELS = ((160, 82), (128, 76), (96, 70), (72, 60), (48, 50), (32, 40))


@dataclass(frozen=True)
class Thumbnail:
    """A picture small enough to stand inside the page; width and height are pixels."""

    uri: str
    width: int
    height: int


def thumbnails(paths: Iterable[str], root: Path | None, budget: int = BUDGET) -> dict[str, Thumbnail]:
    """Thumbnails of the pictures that can be read, by path below `root`; one that is missing, broken or outside is left out.

    `paths` names a picture as often as the page shows it, because each showing costs its bytes again.
    """
    shown = Counter(paths)
    pictures = {path: picture for path in shown if (picture := _picture(path, root)) is not None}
    encoded: dict[str, Thumbnail] = {}
    for side, quality in LEVELS:
        encoded = {path: _encode(picture, side, quality) for path, picture in pictures.items()}
        if sum(len(encoded[path].uri) * shown[path] for path in encoded) <= budget:
            break
    return encoded


def _picture(path: str, root: Path | None) -> Image.Image | None:
    """The picture, already as small as the largest level, so that many can be held at once."""
    if root is None:
        return None
    try:
        picture = load_image(ImageRef(safe_join(root, path), label=path))
    except ImageError:
        return None
    return shrunk(picture, LEVELS[0][0])


def shrunk(picture: Image.Image, side: int) -> Image.Image:
    """The picture with no side longer than `side` pixels."""
    size = within(*picture.size, side)
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)


def within(width: int, height: int, side: int) -> tuple[int, int]:
    """The size of a picture of that width and height that has no side longer than `side`; none grows, none gets lost."""
    scale = min(1.0, side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def webp(picture: Image.Image, quality: int) -> bytes:
    """The picture as WebP; one of few colours, an icon, without loss, since lossy coding would smear it."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=quality, method=4, lossless=picture.getcolors(256) is not None)
    return buffer.getvalue()


def inline(data: bytes, width: int, height: int) -> Thumbnail:
    """Encoded WebP as it stands in a page."""
    return Thumbnail("data:image/webp;base64," + base64.b64encode(data).decode("ascii"), width, height)


def _encode(picture: Image.Image, side: int, quality: int) -> Thumbnail:
    small = shrunk(picture, side)
    return inline(webp(small, quality), *small.size)
