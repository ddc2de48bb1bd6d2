"""What flows from the readers to the backbones: pictures by reference, items, pairs, evaluation sets. Nothing here decodes or tokenizes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from vlm2vec.io import digest


@dataclass(frozen=True)
class ImageRef:
    """A picture not yet decoded: a file, encoded bytes or an open PIL image, with the words an error should use for it.

    `label` is for people ("OK-VQA row 1841: image 'Train/xyz.jpg'") and takes no part in identity.
    """

    source: Path | bytes | Image.Image
    label: str = field(default="image", compare=False)

    @cached_property
    def key(self) -> str:
        """Identity inside one process: the path, or a hash of the bytes or pixels. Two files with equal content differ here."""
        if isinstance(self.source, Path):
            return f"path:{self.source}"
        if isinstance(self.source, bytes):
            return "bytes:" + hashlib.sha256(self.source).hexdigest()
        return "pixels:" + digest(_looks(self.source))


def _looks(image: Image.Image) -> list[str | int | None]:
    """Everything in an open picture that decides how it decodes: pixels, and what gives them a meaning."""
    palette = image.getpalette("RGBA") if image.palette else None
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    pixels = hashlib.sha256(image.tobytes()).hexdigest()
    return [image.mode, *image.size, pixels, repr(palette), repr(image.info.get("transparency")), orientation]


@dataclass(frozen=True)
class Item:
    """One thing to embed: text with or without pictures. `text` may hold placeholders like `<|image_1|>`; `instruction` says the task."""

    text: str = ""
    images: tuple[ImageRef, ...] = ()
    instruction: str = ""

    @cached_property
    def key(self) -> str:
        """Equal keys mean equal items, so that each is encoded once."""
        return digest([self.instruction, self.text, [image.key for image in self.images]])


@dataclass(frozen=True)
class Pair:
    """One training example; `id` is "source:row" and `negatives` may be empty."""

    id: str
    source: str
    query: Item
    positive: Item
    negatives: tuple[Item, ...] = ()


@dataclass(frozen=True, eq=False)
class EvalSet:
    """Queries and their candidates; each distinct candidate is there once, in order of first appearance.

    Query q has the candidates `[candidates[index] for index in candidates_QM[q]]`, in the order of the data, or all of them where
    `candidates_QM` is None (one corpus for all). Of those, `relevant_QR[q]` are right: distinct, at least one, each of a grade above 0 in
    `grades_QR[q]`, 1 where the data know no grades. A candidate equal to a relevant one has its index, so that retrieving it is a hit.
    `duplicates` counts repeats within a query's list. Rows may differ in length.
    """

    name: str
    queries: list[Item]
    candidates: list[Item]
    candidates_QM: list[NDArray[np.int32]] | None
    relevant_QR: list[NDArray[np.int32]]
    grades_QR: list[NDArray[np.float32]]
    duplicates: int = 0
