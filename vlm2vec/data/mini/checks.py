"""What a built folder holds, as sha256 over rows and decoded pixels: how files are compressed makes no difference."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from vlm2vec.data.mini.packages import INSTALL, differences
from vlm2vec.data.mini.pool import Mapper
from vlm2vec.data.mini.spec import SetSpec
from vlm2vec.data.mini.write import EVAL_FILE, EVAL_IMAGES, TRAIN_FILE, TRAIN_IMAGES
from vlm2vec.errors import DataError
from vlm2vec.io import digest

PATH_COLUMNS = ("qry_image_path", "pos_image_path", "neg_image_path", "qry_img_path", "tgt_img_path")


@dataclass(frozen=True)
class Part:
    """The training rows or the questions of one set, as they were read back."""

    name: str  # "train/Digits"
    rows: list[dict[str, Any]]
    pictures: dict[str, Path]  # as the rows name them -> file


def contents(root: Path, specs: Sequence[SetSpec], mapped: Mapper) -> dict[str, str]:
    """sha256 of every part, by its name.

    Raises DataError for a file that is missing or cannot be read, and for a picture that both training and evaluation show.
    """
    parts = [part for spec in specs for part in _parts(root, spec)]
    files = sorted({file for part in parts for file in part.pictures.values()})
    looks = dict(zip(files, mapped(_look, files), strict=True))
    _check_disjoint(parts, looks)
    return {part.name: digest([part.rows, {path: looks[file] for path, file in part.pictures.items()}]) for part in parts}


def compare(found: dict[str, str], expected: dict[str, str]) -> None:
    """Raise DataError naming the parts that differ and the packages that are not the pinned ones."""
    different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if different:
        raise DataError(
            f"{len(different)} of {len(expected)} parts of the embedded benchmark differ from the recorded checksums: "
            f"{', '.join(different)}. "
            f"Packages that are not the pinned ones: {differences()}; {INSTALL} installs those that are"
        )


def _parts(root: Path, spec: SetSpec) -> Iterable[Part]:
    if spec.train:
        yield _read(root, f"train/{spec.name}", TRAIN_FILE, TRAIN_IMAGES)
    yield _read(root, f"eval/{spec.name}", EVAL_FILE, EVAL_IMAGES)


def _read(root: Path, name: str, file: str, images: str) -> Part:
    try:
        rows = pq.read_table(root / name / file).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{root / name / file}: {error}") from None
    paths = sorted({path for row in rows for column in PATH_COLUMNS for path in _listed(row.get(column)) if path})
    return Part(name, rows, {path: root / images / path for path in paths})


def _listed(cell: Any) -> list[str]:
    return cell if isinstance(cell, list) else [cell or ""]


def _look(file: Path) -> str:
    """sha256 of a picture's size and RGB pixels."""
    try:
        with Image.open(file) as picture:
            return hashlib.sha256(repr(picture.size).encode() + picture.convert("RGB").tobytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{file}: {error}") from None


def _check_disjoint(parts: Sequence[Part], looks: dict[Path, str]) -> None:
    sides: dict[str, dict[str, Path]] = {"train": {}, "eval": {}}
    for part in parts:
        sides[part.name.partition("/")[0]].update({looks[file]: file for file in part.pictures.values()})
    for look in sorted(sides["train"].keys() & sides["eval"].keys()):
        raise DataError(f"evaluation shows a picture that training shows: {sides['eval'][look]} is {sides['train'][look]}")
