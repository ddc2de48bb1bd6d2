"""The rows of a corpus of items, however many: a JSONL or parquet file, a folder of such files, or a folder of pictures.

Keys of a line, or columns: `text`, `image`, `instruction`, `id`; others are not read. An image is a path below the folder of pictures, the
struct of bytes and path that image datasets have, or a list of either. A line that is a JSON string is an item of that text. An absent id
is the number of the row, counted over all files. A blank line is no row.

Tables about the pictures of a folder (ABOUT: their captions, the pairs made of them) do not make it a folder of rows; any other file of
rows beside pictures is an error, since either could be meant. A file that is named is read whatever its name.

A scan goes over the files once and keeps where to start reading: a mark every MARK lines, the row groups of a parquet file. After that any
range of rows is read without what lies before it, and never more than a few rows at a time are held.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vlm2vec.data.images import FORMATS
from vlm2vec.data.types import ImageRef, Item
from vlm2vec.errors import DataError, PathError
from vlm2vec.io import digest, safe_join
from vlm2vec.io.disk import DiskErrors

KEYS = ("id", "text", "image", "instruction")
MARK = 4096  # lines of a JSONL file between two places where reading can start
LISTING_KEYS = {"id": "path", "image": "path"}  # of a folder's listing
ABOUT = ("captions", "metadata", "pairs")  # names of tables about the pictures beside them, which hold no items of their own
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".jpe", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"))
_ROWS = 1024  # rows of a parquet file decoded at once
_PICTURES = 32  # the same, where they hold pictures
_BUFFER = 1 << 20  # bytes of a column read at once
_RENAME = "columns (--columns text=NAME) gives the names in the files"
_SHOWN = 30  # names listed in an error


class Piece(NamedTuple):
    """Rows [first, first + rows) of the corpus: the row group `start` of a file, or the lines from byte `start`, which is on `line`."""

    file: int
    first: int
    rows: int
    start: int
    line: int = 0


@dataclass(frozen=True)
class Row:
    """What one row holds, by key, not yet checked, or as text why it cannot be read; `place` names file and row for messages."""

    number: int
    place: str
    values: dict[str, Any] | str

    @property
    def id(self) -> str | int:
        """Its id, or its number."""
        found = self.values.get("id") if isinstance(self.values, dict) else None
        return found if is_id(found) else self.number


def is_id(value: Any) -> TypeGuard[str | int]:
    """Whether a value may be an id: a string or a whole number."""
    return isinstance(value, str | int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Corpus:
    """A scanned input. `digest` identifies it: JSONL files by their content, others by name, size and time of change."""

    kind: str  # "pictures", "jsonl" or "parquet"
    images: str  # folder below which pictures lie
    files: list[str]
    pieces: list[Piece]
    digest: str
    columns: dict[str, str] = field(default_factory=dict)  # name in the files by key, where it is another
    ignored: int = 0  # files of a folder that are no pictures

    def __len__(self) -> int:
        return self.pieces[-1].first + self.pieces[-1].rows if self.pieces else 0

    def to_json(self) -> dict[str, Any]:
        """For another process to `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Corpus:
        """What `to_json` gave."""
        return cls(**{**stored, "pieces": [Piece(*piece) for piece in stored["pieces"]]})

    def read(self, wanted: Sequence[range]) -> Iterator[Row]:
        """The rows of ascending ranges that do not overlap, in order. Raises DataError for a file that cannot be read any more."""
        read = _parquet_rows if self.kind == "parquet" else _jsonl_rows
        called = self.images if self.kind == "pictures" else ""
        names = {key: self.columns.get(key, key) for key in KEYS}
        for piece in self.pieces:
            parts = _within(wanted, piece.first, piece.first + piece.rows)
            if parts:
                yield from read(Path(self.files[piece.file]), piece, parts, names, called or self.files[piece.file])


def _within(wanted: Sequence[range], first: int, stop: int) -> list[range]:
    """The parts of ascending ranges that lie in [first, stop)."""
    index = max(bisect_right(wanted, first, key=lambda part: part.start) - 1, 0)
    parts = []
    while index < len(wanted) and wanted[index].start < stop:
        parts.append(range(max(wanted[index].start, first), min(wanted[index].stop, stop)))
        index += 1
    return [part for part in parts if part]


# -- scanning ----------------------------------------------------------------------------------------------------------------------------


def scan(source: Path, listing: Path, columns: Mapping[str, str] | None = None, images: Path | None = None) -> Corpus:
    """Find and count the rows of `source`. `listing` is a file to write the pictures of a folder to, which is then what is read.

    `columns` gives the name in the files of a key that has another one there; `images` is where the paths of pictures start, by default the
    folder of the files. Raises DataError if there is nothing to read, EnvError if the listing cannot be written.
    """
    files = _files(source)
    if not files:
        ignored = list_pictures(source, listing)
        pieces, content = _marks(listing, 0, 0)
        others = f"{ignored} files of other kinds; {', '.join(ABOUT)} are read when they are named"
        _require(pieces, f"{source} holds no pictures and no .jsonl or .parquet file ({others})")
        return Corpus("pictures", str(source), [str(listing)], pieces, content, dict(LISTING_KEYS), ignored)
    columns = dict(columns or {})
    all_pieces: list[Piece] = []
    identity = []
    for index, file in enumerate(files):
        first = all_pieces[-1].first + all_pieces[-1].rows if all_pieces else 0
        pieces, content = (_row_groups if file.suffix == ".parquet" else _marks)(file, index, first, columns)
        all_pieces += pieces
        identity.append([file.name, content])
    _require(all_pieces, f"{source}: no rows")
    kind = files[0].suffix[1:]
    return Corpus(kind, str(images or files[0].parent), [str(file) for file in files], all_pieces, digest(identity), columns)


def _require(pieces: Sequence[Piece], otherwise: str) -> None:
    if not pieces:
        raise DataError(otherwise)


def _files(source: Path) -> list[Path]:
    """The file, or the files of a folder in order of their names; none for a folder of pictures."""
    if source.is_file():
        if source.suffix not in (".jsonl", ".parquet"):
            raise DataError(f"{source}: expected a .jsonl or .parquet file, or a folder")
        return [source]
    if not source.is_dir():
        raise DataError(f"{source} not found")
    children = sorted(child for child in source.iterdir() if not child.name.startswith("."))
    files = [child for child in children if child.suffix in (".jsonl", ".parquet") and child.stem not in ABOUT and child.is_file()]
    if len({file.suffix for file in files}) > 1:
        raise DataError(f"{source} holds .jsonl and .parquet files; name the ones to read by a folder that holds nothing else")
    picture = next((child.name for child in children if child.suffix.lower() in SUFFIXES), None)
    if files and picture:
        raise DataError(
            f"{source} holds pictures ({picture}) and rows ({files[0].name}), and either could be meant; name the file of rows, "
            "or a folder that holds the pictures alone"
        )
    return files


def _marks(file: Path, index: int, first: int, columns: Mapping[str, str] | None = None) -> tuple[list[Piece], str]:
    """The lines of a JSONL file in pieces, and the sha256 of the file."""
    pieces: list[Piece] = []
    sha, offset, rows = hashlib.sha256(), 0, 0
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                mark = len(codecs.BOM_UTF8) if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
                if line[mark:].strip():
                    if rows % MARK == 0:
                        pieces.append(Piece(index, first + rows, MARK, offset + mark, number))
                    rows += 1
                sha.update(line)
                offset += len(line)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    if pieces:
        pieces[-1] = pieces[-1]._replace(rows=first + rows - pieces[-1].first)
    return pieces, sha.hexdigest()


def _row_groups(file: Path, index: int, first: int, columns: Mapping[str, str]) -> tuple[list[Piece], str]:
    """The row groups of a parquet file, and what identifies the file."""
    with reading_parquet(file), pq.ParquetFile(file) as parquet:
        names = parquet.schema_arrow.names
        counts = [parquet.metadata.row_group(group).num_rows for group in range(parquet.metadata.num_row_groups)]
    wanted = [columns.get(key, key) for key in ("text", "image")]
    missing = [name for key, name in columns.items() if name not in names]
    if missing or not set(wanted) & set(names):
        what = f"no column {missing[0]!r}" if missing else f"neither a column {wanted[0]!r} nor {wanted[1]!r}"
        raise DataError(f"{file} has {what}, but {_listing(names)}; {_RENAME}")
    state = file.stat()
    pieces = []
    for group, count in enumerate(counts):
        if count:
            pieces.append(Piece(index, first, count, group, first - sum(counts[:group])))
        first += count
    return pieces, f"{state.st_size} bytes, changed {state.st_mtime_ns}"


class reading_parquet:
    """Context that names the parquet file that cannot be read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, pa.ArrowException | OSError):
            raise DataError(f"{self.file}: truncated or not a parquet file ({str(error).splitlines()[0]})") from None


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(map(str, names[:_SHOWN])) or "nothing") + more


# -- folders of pictures -----------------------------------------------------------------------------------------------------------------


def list_pictures(folder: Path, listing: Path) -> int:
    """Write a line for each picture below `folder`, in order of the names; returns how many files are none.

    A file with a picture's suffix is one, and what is wrong with it is said when it is decoded; any other file is one if its header is.
    Hidden files and folders are left out, links to folders not followed. At most the names of one folder are held. Raises EnvError.
    """
    ignored = 0
    with DiskErrors(listing, listing.parent, lambda: 0), listing.open("w", encoding="ascii") as stream:
        for path, entry in _walk(folder, ""):
            if os.path.splitext(entry.name)[1].lower() in SUFFIXES or _is_picture(entry.path):
                state = entry.stat()
                line = json.dumps({"path": path, "bytes": state.st_size, "changed": state.st_mtime_ns})
                stream.write(line + "\n")
            else:
                ignored += 1
    return ignored


def _walk(folder: Path, above: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """The files below a folder with their paths from it, with forward slashes."""
    with os.scandir(folder / above) as found:
        entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(folder, f"{above}{entry.name}/")
        elif entry.is_file():
            yield above + entry.name, entry


def _is_picture(path: str) -> bool:
    """Whether the header is one of a picture; no pixels are read."""
    try:
        with Image.open(path, formats=FORMATS):
            return True
    except OSError:
        return False
    except (ValueError, ArithmeticError, LookupError, RuntimeError, Image.DecompressionBombError):
        return True  # a picture's signature with damage behind it: decoding says what it is


# -- reading -----------------------------------------------------------------------------------------------------------------------------


def _jsonl_rows(file: Path, piece: Piece, parts: Sequence[range], names: Mapping[str, str], called: str) -> Iterator[Row]:
    try:
        with file.open("rb") as stream:
            stream.seek(piece.start)
            lines = ((number, line) for number, line in enumerate(stream, start=piece.line) if line.strip())
            rows = enumerate(lines, start=piece.first)
            at = piece.first
            for part in parts:
                for row, (number, line) in islice(rows, part.start - at, part.stop - at):
                    yield Row(row, f"{called} row {row} (line {number})", _values(line, names))
                at = part.stop
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None


def _values(line: bytes, names: Mapping[str, str]) -> dict[str, Any] | str:
    """The values of a line by key, or why it has none."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not valid UTF-8 (byte 0x{error.object[error.start]:02x} at position {error.start})"
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "number too long or nesting too deep"
        return f"not valid JSON ({reason}): {line[:80].decode('utf-8', 'replace').strip()!r}"
    if isinstance(record, str):
        return {"text": record}
    if not isinstance(record, dict):
        return f"expected an object or a string, got {type(record).__name__}"
    found = {key: record[name] for key, name in names.items() if record.get(name) is not None}
    if not found.keys() & {"text", "image"}:
        return f"neither {names['text']} nor {names['image']}, but {_listing(list(record))}; {_RENAME}"
    return found


def _parquet_rows(file: Path, piece: Piece, parts: Sequence[range], names: Mapping[str, str], called: str) -> Iterator[Row]:
    with reading_parquet(file), pq.ParquetFile(file, buffer_size=_BUFFER) as parquet:
        schema = parquet.schema_arrow
        present = {key: name for key, name in names.items() if name in schema.names}
        holds_pictures = "image" in present and not pa.types.is_string(schema.field(present["image"]).type)
        first = piece.first
        columns = list(dict.fromkeys(present.values()))
        for batch in parquet.iter_batches(_PICTURES if holds_pictures else _ROWS, row_groups=[piece.start], columns=columns):
            for part in _within(parts, first, first + len(batch)):
                rows = batch.slice(part.start - first, len(part))
                cells = {key: _cells(rows.column(name)) for key, name in present.items()}
                for index, number in enumerate(part):
                    values = {key: column[index] for key, column in cells.items() if column[index] is not None}
                    yield Row(number, f"{called} row {number - piece.line}", values)
            first += len(batch)
            if first >= parts[-1].stop:
                return


def _cells(array: pa.Array) -> list[Any]:
    """The values of a column; a cell that is not UTF-8 is the error that says so."""
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        return [_cell(value) for value in array]


def _cell(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return error


# -- items -------------------------------------------------------------------------------------------------------------------------------


def item_of(row: Row, images: Path, instruction: str = "") -> Item:
    """The item of a row; `instruction` is for one that brings none. Pictures lie below `images` and are not opened.

    Raises DataError naming file and row for what is of a wrong type or empty, PathError for a picture elsewhere.
    """
    if isinstance(row.values, str):
        raise DataError(f"{row.place}: {row.values}")
    if row.values.get("id") is not None and not is_id(row.values["id"]):
        raise DataError(f"{row.place}: id must be a string or a whole number, got {_called(row.values['id'])}")
    text, own = (_text(row, key) for key in ("text", "instruction"))
    found = row.values.get("image")
    entries = found if isinstance(found, list) else [found]
    pictures = tuple(ref for entry in entries if (ref := _picture(entry, row.place, images)))
    if not text.strip() and not pictures:
        raise DataError(f"{row.place}: neither text nor image (both are empty)")
    return Item(text, pictures, own or instruction)


def _called(value: Any) -> str:
    return "damaged UTF-8" if isinstance(value, UnicodeError) else type(value).__name__


def _text(row: Row, key: str) -> str:
    value = row.values.get(key) if isinstance(row.values, dict) else None
    if not isinstance(value, str | None):
        raise DataError(f"{row.place}: {key} must be a string, got {_called(value)}")
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise DataError(f"{row.place}: {key} is not valid UTF-8 (a lone surrogate)") from None
    return value or ""


def _picture(entry: Any, place: str, images: Path) -> ImageRef | None:
    if isinstance(entry, dict):
        if isinstance(entry.get("bytes"), bytes) and entry["bytes"]:
            return ImageRef(entry["bytes"], f"{place}: image {entry.get('path') or 'bytes'!r}")
        entry = entry.get("path")
    if entry is None or entry == "":
        return None
    if isinstance(entry, bytes):
        return ImageRef(entry, f"{place}: image")
    if not isinstance(entry, str):
        raise DataError(f"{place}: image must be a path, a struct of bytes and path, or a list of them, got {_called(entry)}")
    label = f"{place}: image {entry!r}"
    try:
        return ImageRef(safe_join(images, entry), label)
    except PathError as error:
        raise PathError(f"{label}: {error}") from None
