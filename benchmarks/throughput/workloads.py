"""The pairs that are trained on and encoded: texts and picture files that a seed decides.

The tokenizer of a random checkpoint has one token per byte, so lengths in characters below are lengths in tokens; they are chosen as those
of the real tokenizer on the real data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from vlm2vec.data.types import ImageRef, Item, Pair

# Common sizes of the training sets' pictures: of COCO, ImageNet, VOC and scene collections, portraits, and thumbnails.
SIZES = ((640, 480), (480, 640), (500, 375), (640, 427), (375, 500), (336, 336), (1024, 768), (224, 224), (300, 200), (256, 256))
LABELS = ("goldfish", "school bus", "acoustic guitar", "lakeside", "mountain bike", "espresso maker")
CONSONANTS, VOWELS = "bcdfglmnprst", "aeiou"


@dataclass(frozen=True)
class Workload:
    """Pairs of one step; all queries share the instruction, which a chat has a turn for."""

    name: str
    meaning: str
    instruction: str
    pairs: list[Pair]

    @property
    def items(self) -> list[Item]:
        """Queries, then targets, as they occur."""
        return [*(pair.query for pair in self.pairs), *(pair.positive for pair in self.pairs)]

    @property
    def distinct(self) -> list[Item]:
        """Each item once, in the order in which a batch numbers them."""
        return list({item.key: item for item in self.items}.values())

    def without_repeats(self) -> Workload:
        """The pairs whose query and target have not occurred before: there, both sides define the same loss."""
        seen: set[str] = set()
        kept = []
        for pair in self.pairs:
            if not {pair.query.key, pair.positive.key} & seen:
                kept.append(pair)
            seen |= {pair.query.key, pair.positive.key}
        return replace(self, pairs=kept)


class Maker:
    """Texts and pictures from one random stream; picture edges are multiplied by `scale`."""

    def __init__(self, folder: Path, scale: float, seed: int) -> None:
        self.folder, self.scale, self.stream = folder, scale, np.random.default_rng(seed)
        self.pictures = 0
        folder.mkdir(parents=True, exist_ok=True)

    def text(self, low: int, high: int) -> str:
        """Words that nobody has heard, `low` to `high` characters in all."""
        letters = int(self.stream.integers(low, high + 1))
        words = ""
        while len(words) < letters:
            words += "".join(self._syllable() for _ in range(self.stream.integers(1, 5))) + " "
        return words[:letters].strip()

    def _syllable(self) -> str:
        return str(self.stream.choice(list(CONSONANTS)) + self.stream.choice(list(VOWELS)))

    def picture(self) -> ImageRef:
        """A new file: shapes on a gradient under noise, every fourth a PNG, the others JPEG."""
        width, height = (max(28, round(edge * self.scale)) for edge in SIZES[self.stream.integers(len(SIZES))])
        self.pictures += 1
        file = self.folder / f"{self.pictures:05d}.{'png' if self.pictures % 4 == 0 else 'jpg'}"
        slope = np.linspace(0, 255, width)[None, :, None] * self.stream.random(3)
        noisy = slope + self.stream.normal(0, 12, (height, width, 3)) + 40
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        brush = ImageDraw.Draw(image)
        for _ in range(6):
            corners = self.stream.random((2, 2)) * (width, height)
            brush.ellipse([*corners.min(0), *corners.max(0)], fill=tuple(int(value) for value in self.stream.integers(0, 256, 3)))
        image.save(file, quality=90)
        return ImageRef(file)


def _mixed(make: Maker, pairs: int) -> Iterator[tuple[Item, Item]]:
    """Half classification with few labels, a quarter questions with short answers, a quarter that looks for pictures."""
    for index in range(pairs):
        kind = index % 4
        if kind < 2:
            yield Item("What is it?", (make.picture(),)), Item(LABELS[make.stream.integers(len(LABELS))])
        elif kind == 2:
            yield Item(make.text(10, 24), (make.picture(),)), Item(make.text(2, 8))
        else:
            yield Item(make.text(10, 40), (make.picture(),) * (index % 8 == 7)), Item("", (make.picture(),))


def _text_to_picture(make: Maker, pairs: int) -> Iterator[tuple[Item, Item]]:
    for _ in range(pairs):
        yield Item(make.text(8, 40)), Item("", (make.picture(),))


def _text(make: Maker, pairs: int) -> Iterator[tuple[Item, Item]]:
    for _ in range(pairs):
        yield Item(make.text(8, 40)), Item(make.text(40, 200))


def _long(make: Maker, pairs: int) -> Iterator[tuple[Item, Item]]:
    """Half as many pairs as asked for: each has the tokens of several."""
    for _ in range(max(2, pairs // 2)):
        yield Item(make.text(8, 40)), Item(make.text(200, 800))


MIXED = "pictures of mixed sizes to short texts, half of them labels that repeat, and some picture targets"
KINDS: dict[str, tuple[str, str, Callable[[Maker, int], Iterator[tuple[Item, Item]]]]] = {  # meaning, instruction, pairs
    "mixed": (MIXED, "Name the object:", _mixed),
    "text-picture": ("texts to pictures of mixed sizes", "Find the picture:", _text_to_picture),
    "text": ("short texts to passages", "Find the passage:", _text),
    "long": ("short texts to documents of 200 to 800 tokens, half as many pairs", "Find the document:", _long),
}


def make_workload(name: str, pairs: int, scale: float, folder: Path, seed: int = 0) -> Workload:
    """The same pairs and files each time; files are written into `folder`/`name`."""
    meaning, instruction, kind = KINDS[name]
    made = kind(Maker(folder / name, scale, seed), pairs)
    rows = [
        Pair(f"{name}:{index}", name, replace(query, instruction=instruction), target) for index, (query, target) in enumerate(made)
    ]
    return Workload(name, meaning, instruction, rows)
