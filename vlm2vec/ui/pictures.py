"""The pictures of an item for a browser: small copies that are made when they are asked for, and the files themselves.

What is sent is a picture whatever the file is called: its first bytes say its type, and a type that browsers do not show is sent as WebP.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from vlm2vec.data.images import load_image
from vlm2vec.data.types import ImageRef
from vlm2vec.index import Hit
from vlm2vec.io.paths import not_a_file
from vlm2vec.report.thumbnails import shrunk, webp, within
from vlm2vec.ui.search import GoneError

SIDES = (160, 320, 640)  # pixels of the longer side of a small copy
QUALITY = 82
KEPT = 2048  # small copies in memory, of some 10 kB each
WEBP = "image/webp"
_TYPES = (
    (0, b"\x89PNG\r\n\x1a\n", "image/png"),
    (0, b"\xff\xd8\xff", "image/jpeg"),
    (0, b"GIF8", "image/gif"),
    (8, b"WEBP", WEBP),
)


@dataclass(frozen=True)
class Picture:
    """Encoded bytes or a file of them, with their media type."""

    source: bytes | Path
    type: str


def picture(hit: Hit, number: int = 0, side: int | None = None) -> Picture:
    """The picture `number` of an item, as it is or with no side longer than `side`.

    Raises GoneError where the item or the disk has none, ImageError where it cannot be read.
    """
    if hit.thumbnail is not None and number == 0:
        return Picture(hit.thumbnail, WEBP)
    if not 0 <= number < len(hit.images):
        raise GoneError(f"item {hit.id} has no picture {number}")
    return _file(hit.images[number]) if side is None else Picture(_small(hit.images[number], side), WEBP)


def _small(file: Path, side: int) -> bytes:
    return _made(file, side, _modified(file))


def _modified(file: Path) -> int:
    try:
        return os.stat(file).st_mtime_ns
    except OSError:
        raise GoneError(f"{file.name} is not there any more") from None


@lru_cache(KEPT)
def _made(file: Path, side: int, modified: int) -> bytes:
    """The small copy of a file as it was at a time."""
    small = load_image(ImageRef(file, file.name), needed=lambda width, height: within(width, height, side))
    return webp(shrunk(small, side), QUALITY)


def _file(file: Path) -> Picture:
    """The file itself, where browsers show what is in it."""
    _modified(file)
    if problem := not_a_file(file):
        raise GoneError(f"{file.name} is {problem}")
    with file.open("rb") as stream:
        head = stream.read(16)
    for offset, signature, kind in _TYPES:
        if head.startswith(signature, offset):
            return Picture(file, kind)
    return Picture(webp(load_image(ImageRef(file, file.name)), QUALITY), WEBP)
