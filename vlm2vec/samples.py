"""A fixed set of items that every tool must embed alike: texts, pictures and pairs of uneven lengths, with and without an instruction.

Pictures are arithmetic, so that the set needs no files and is the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

VERSION = 1  # of the set: raise it whenever an item changes, because stored embeddings belong to one version
INSTRUCTION = "Find what belongs to the given input:"
TEXTS = (
    "a red apple",
    "Ein Fahrrad lehnt an der Wand; daneben stehen zwei Körbe voller Äpfel.",
    "What is shown in the picture, how many of them are there, and which of them would you take?\nAnswer in one word.",
    "东京的夜景 🗼",
    "x",
)
SIZES = ((96, 64), (60, 200), (256, 256))  # width, height


@dataclass(frozen=True)
class Group:
    """Items that are embedded as one batch."""

    name: str
    items: tuple[dict[str, Any], ...]  # {"text", "image"}, or one of them
    instruction: str = ""

    @property
    def ids(self) -> list[str]:
        """A name for each item."""
        return [f"{self.name}/{number}" for number in range(len(self.items))]


def groups() -> list[Group]:
    """Each kind of item alone, the same under an instruction, and all kinds in one batch."""
    pictures = [picture(width, height) for width, height in SIZES]
    kinds: dict[str, tuple[dict[str, Any], ...]] = {
        "texts": tuple({"text": text} for text in TEXTS),
        "pictures": tuple({"image": image} for image in pictures),
        "pairs": tuple({"text": text, "image": image} for text, image in zip(TEXTS, pictures, strict=False)),
    }
    instructed = [Group(f"{kind}, instructed", items, INSTRUCTION) for kind, items in kinds.items()]
    return [*(Group(kind, items) for kind, items in kinds.items()), *instructed, Group("mixed", sum(kinds.values(), ()))]


def picture(width: int, height: int) -> Image.Image:
    """Waves of three lengths, one to a colour: no two places are alike, and any resizing shows."""
    down_H1, across_1W = np.arange(height)[:, None] / height, np.arange(width)[None, :] / width
    waves = [np.sin(2 * np.pi * (cycles * across_1W + (4 - cycles) * down_H1 + cycles * down_H1 * across_1W)) for cycles in (1, 2, 3)]
    return Image.fromarray(np.round(127.5 + 127.5 * np.stack(waves, axis=-1)).astype(np.uint8))
