"""The pairs of a folder of pictures with captions.

Captions stand in a table inside the folder, `metadata.csv` or `metadata.jsonl` as image datasets have it, or `captions.csv` or
`captions.jsonl`, with the picture's path and its caption in each row, or beside every picture in a `.txt` file of its name.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from vlm2vec import io
from vlm2vec.data.items import SUFFIXES
from vlm2vec.errors import DataError

TABLES = ("metadata.jsonl", "metadata.csv", "captions.jsonl", "captions.csv")
PICTURE = ("file_name", "file", "image", "path")  # names of the column, the first that is there
CAPTION = ("text", "caption")
Query = Literal["text", "image"]


def write_pairs(folder: Path, query: Query = "text", instruction: str = "") -> tuple[Path, int]:
    """Write `folder/pairs.jsonl`, a row for each caption, and return it with the number of rows.

    The query is the caption (text) or the picture (image), with `instruction`; the other one is its positive. A column `group` is carried
    over. Raises DataError where there are no captions, for a picture without one, and for a `pairs.jsonl` that differs.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder")
    tables = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(tables) > 1:
        raise DataError(f"{folder} holds {' and '.join(table.name for table in tables)}; keep one of them")
    captions = _of_table(tables[0]) if tables else _beside(folder)
    rows = [_row(path, caption, group, query, instruction) for path, caption, group in captions]
    if not rows:
        raise DataError(f"{folder}: no captions; expected one of {', '.join(TABLES)}, or a .txt file beside every picture")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file = folder / "pairs.jsonl"
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise DataError(f"{file} is there and holds something else; remove it to have it made anew")
    io.write_atomic(file, text)
    return file, len(rows)


def _row(path: str, caption: str, group: str, query: Query, instruction: str) -> dict[str, Any]:
    sides: list[dict[str, Any]] = [{"text": caption}, {"image": path}]
    asked, answer = sides if query == "text" else sides[::-1]
    row = {"query": asked | ({"instruction": instruction} if instruction else {}), "positive": answer}
    return {"group": group, **row} if group else row


def _of_table(table: Path) -> Iterator[tuple[str, str, str]]:
    """(path, caption, group) of each row."""
    for where, cells in _cells(table):
        path, caption = (_cell(cells, names, where) for names in (PICTURE, CAPTION))
        yield path, caption, str(cells.get("group") or "")


def _cells(table: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if table.suffix == ".jsonl":
        yield from ((f"{table} row {number}", cells) for number, cells in enumerate(io.read_jsonl(table)))
        return
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            for cells in reader:
                yield f"{table}:{reader.line_num}", cells
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: not a CSV file in UTF-8 ({error})") from None


def _cell(cells: Mapping[str, Any], names: tuple[str, ...], where: str) -> str:
    """The text under the first of `names` that is there."""
    name = next((name for name in names if name in cells), None)
    if name is None:
        raise DataError(f"{where}: none of the columns {', '.join(names)}, but {', '.join(map(str, cells))}")
    if not isinstance(cells[name], str) or not cells[name].strip():
        raise DataError(f"{where}: {name} is {'empty' if cells[name] in ('', None) else 'no text'}")
    return cells[name].strip()


def _beside(folder: Path) -> Iterator[tuple[str, str, str]]:
    """The pictures below the folder, each with the text beside it."""
    for picture in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
        beside = picture.with_suffix(".txt")
        try:
            caption = beside.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError):
            caption = ""
        if not caption:
            raise DataError(f"{picture}: no caption; {beside.name} is {'empty or not UTF-8' if beside.exists() else 'not there'}")
        yield picture.relative_to(folder).as_posix(), caption, ""
