"""Evaluation suites of a few rows, and an encoder whose arithmetic can be done with a pencil."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from vlm2vec.data.types import Item
from vlm2vec.io import digest
from vlm2vec.suite import Suite, load_suite

Side = tuple[str, str]  # text, path of a picture below eval_images ("" for none)
Row = tuple[Side, Sequence[Side]]  # query, candidates with the gold first

YAML = """  - name: {name}
    meta_task: {meta_task}
    split: {split}
    path: eval/{name}
    query_modality: I
    target_modality: T
    queries: {queries}
    candidates: {candidates}
    source: made up
    licence: CC0-1.0
"""


def word(dice: random.Random) -> str:
    """A letter and four digits, of which there are few, so that words repeat and tie."""
    return f"{dice.choice('abc')} " + "".join(dice.choice("012") for _ in range(4))


def lists_with_copies() -> list[Row]:
    """200 queries, each with up to 15 words, some of them copies, also of the gold."""
    dice = random.Random(5)
    rows: list[Row] = []
    for number in range(200):
        candidates = [word(dice) for _ in range(dice.randint(1, 12))]
        candidates += dice.choices(candidates, k=dice.randint(0, 3))
        rows.append(((f"{number} {word(dice)}", ""), [(candidate, "") for candidate in candidates]))
    return rows


class Compass:
    """Embeds an item as a direction in the plane: the sum of the degrees its text names ("@30") and those its pictures are painted with."""

    model = "compass"

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.options = SimpleNamespace(pooling="last")
        self.source = "compass"
        self.encoded: list[Item] = []

    def fingerprint(self) -> str:
        return digest([self.model, self.settings])

    def stream(self, items: Sequence[Item], sizes: Sequence[int], **options: Any) -> Iterator[torch.Tensor]:
        assert sum(sizes) == len(items)
        rest = iter(items)
        for size in sizes:
            yield self.window([next(rest) for _ in range(size)])

    def window(self, items: Sequence[Item]) -> torch.Tensor:
        self.encoded += items
        return torch.tensor(np.array([self.row(item) for item in items]), dtype=torch.float32)

    def row(self, item: Item) -> np.ndarray:
        angle = np.deg2rad(degrees(item))
        return np.array([np.cos(angle), np.sin(angle)])


class Constant(Compass):
    """A model that collapsed: everything is one point, but for `noise` in the last digits."""

    model = "constant"

    def row(self, item: Item) -> np.ndarray:
        return np.array([0.6 + self.settings.get("noise", 0.0) * (degrees(item) / 180), 0.8])


class Broken(Compass):
    """A compass that gives NaN for one item of the suite."""

    def row(self, item: Item) -> np.ndarray:
        return np.array([np.nan, 1.0]) if "@100" in item.text else super().row(item)


def degrees(item: Item) -> float:
    said = [float(found) for found in re.findall(r"@(\d+)", item.text)]
    painted = [Image.open(image.source).getpixel((0, 0))[0] for image in item.images]
    return sum(said) + sum(painted)


def paint(root: Path, angle: int, name: str | None = None) -> str:
    """Write a picture that shows `angle` (0 to 255 degrees); returns its path below eval_images."""
    path = name or f"angles/{angle}.png"
    file = root / "eval_images" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (angle, 0, 0)).save(file)
    return path


def write_set(root: Path, name: str, rows: Sequence[Row]) -> None:
    texts, images = zip(*(query for query, _ in rows), strict=True)
    table = {
        "qry_text": texts,
        "qry_img_path": images,
        "tgt_text": [[text for text, _ in candidates] for _, candidates in rows],
        "tgt_img_path": [[path for _, path in candidates] for _, candidates in rows],
    }
    folder = root / "eval" / name
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), folder / "test-00000-of-00001.parquet")


def write_suite(root: Path, sets: Mapping[str, tuple[str, str, Sequence[Row]]]) -> Suite:
    """Write sets given as (meta-task, split, rows) with their `datasets.yaml` into `root`."""
    text = "suite: compass\ndescription: directions\nroot: .\nsets:\n"
    for name, (meta_task, split, rows) in sets.items():
        write_set(root, name, rows)
        candidates = int(np.median([len(candidates) for _, candidates in rows]))
        text += YAML.format(name=name, meta_task=meta_task, split=split, queries=len(rows), candidates=candidates)
    (root / "datasets.yaml").write_text(text)
    return load_suite(root)


def pencil_suite(root: Path) -> dict[str, tuple[str, str, list[Row]]]:
    """A set of 12 queries per meta-task; what they score is worked out in `PENCIL`."""
    labels = {"plane": 10, "tree": 40, "boat": 70, "cat": 100}

    def classified(angle: int, gold: str) -> Row:
        others = [name for name in labels if name != gold]
        return ("<|image_1|>\nName it\n", paint(root, angle)), [(f"{name} @{labels[name]}", "") for name in (gold, *others)]

    def asked(seen: int, asked_for: int, *answers: str) -> Row:
        return (f"<|image_1|>\nWhich way is @{asked_for}?\n", paint(root, seen)), [(answer, "") for answer in answers]

    def searched(angle: int, *found: int) -> Row:
        return (f"Find a picture of @{angle}\n", ""), [("<|image_1|>\nRepresent the picture\n", paint(root, each)) for each in found]

    def pointed(angle: int, *crops: str) -> Row:
        return (f"<|image_1|>\nSelect @{angle}\n", paint(root, 1)), [("<|image_1|>\nRepresent the crop", crop) for crop in crops]

    crop = {angle: paint(root, angle) for angle in (20, 50, 80, 110)}
    copy = paint(root, 50, "copies/fifty.png")  # the bytes of crop[50] under another name
    return {
        "labels": ("classification", "IND", [
            classified(5, "plane"), classified(12, "plane"), classified(24, "tree"), classified(26, "tree"),
            classified(39, "tree"), classified(54, "tree"), classified(56, "cat"), classified(70, "boat"),
            classified(84, "boat"), classified(86, "cat"), classified(100, "plane"), classified(130, "boat"),
        ]),
        "answers": ("vqa", "IND", [
            asked(10, 20, "yes @30", "no @60"), asked(10, 20, "no @60", "yes @30"), asked(40, 20, "no @61", "yes @30", "never @90"),
            asked(5, 5, "yes @30", "aye @30"), asked(50, 20, "yes @30", "never @90", "aye @30"), asked(0, 1, "a @2", "b @90"),
            asked(100, 0, "never @90", "no @60"), asked(100, 20, "never @90", "no @60", "up @121"),
            asked(33, 33, "c @66", "d @67", "e @65"), asked(20, 40, "no @60", "no @60", "yes @30"),
            asked(7, 7, "f @15", "g @14"), asked(90, 2, "never @90"),
        ]),
        "pictures": ("retrieval", "OOD", [
            searched(0, 3, 40), searched(10, 40, 3), searched(20, 3, 40, 80), searched(30, 40, 3, 80),
            searched(50, 40, 80), searched(70, 40, 80), searched(79, 80, 40, 3), searched(85, 80, 120),
            searched(110, 120, 80), searched(110, 80, 120), searched(3, 3, 120), searched(120, 3, 40),
        ]),
        "crops": ("grounding", "OOD", [
            pointed(19, crop[20], crop[50]), pointed(49, crop[50], copy, crop[20]), pointed(49, copy, crop[50], crop[80]),
            pointed(49, crop[20], crop[50], copy), pointed(79, crop[80], crop[110]), pointed(99, crop[80], crop[110]),
            pointed(99, crop[110], crop[80]), pointed(33, crop[50], crop[20]), pointed(32, crop[20], crop[50]),
            pointed(36, crop[50], crop[20]),
            pointed(65, crop[80], crop[50], crop[20]), pointed(60, crop[80], crop[50], crop[20]),
        ]),
    }  # fmt: skip


# Hits by hand, query after query: a query at 10 degrees is 7 away from 3 and 30 away from 40, and so on; "crops" adds the 1 degree of its
# picture. "answers" 4 and 5 are ties between two texts of one direction: 4 is decided by the rule for ties, 5 is won by a third.
PENCIL = {
    "labels": [1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0],
    "answers": [1, 0, 1, 0, 0, 1, 1, 0, 1, 1, 0, 1],
    "pictures": [1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 0],
    "crops": [1, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 0],
}
TIED = {"labels": 0, "answers": 2, "pictures": 0, "crops": 0}
