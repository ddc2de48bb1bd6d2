"""Raw rows of a JSONL or parquet file, some at a time, each with its place and with whatever is wrong in reading it. Not yet checked.

A file is read once, front to back, in one process; what is read can be parsed in another.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from vlm2vec.data.items import reading_parquet
from vlm2vec.data.readers import json_object
from vlm2vec.errors import DataError

SUFFIXES = (".jsonl", ".parquet")
CHUNK = 256  # rows of a chunk
_PICTURES = 16  # the same, where a parquet file holds the bytes of pictures
_BLOCK = 1 << 22  # bytes read at a time to count lines


class Record(NamedTuple):
    """A row: `number` is its line in a JSONL file, counted from 1, or its row in a parquet file, counted from 0.

    `values` holds its keys, or is the reason why it has none.
    """

    number: int
    values: Mapping[str, Any] | str


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a file as they were stored."""

    file: str
    stored: list[tuple[int, bytes]] | pa.RecordBatch  # (line, its bytes)
    first: int = 0  # row of the file that a record batch begins with

    def __len__(self) -> int:
        return len(self.stored)

    def records(self) -> Iterator[Record]:
        """The rows, parsed."""
        return self._parsed() if isinstance(self.stored, list) else self._taken()

    def lines(self) -> list[tuple[int, bytes]]:
        """(number, line) of the rows of a JSONL file."""
        assert isinstance(self.stored, list)
        return self.stored

    def batch(self) -> pa.RecordBatch:
        """The rows of a parquet file."""
        assert isinstance(self.stored, pa.RecordBatch)
        return self.stored

    def _parsed(self) -> Iterator[Record]:
        for number, line in self.lines():
            place = f"{self.file}:{number}"
            try:
                yield Record(number, json_object(line, place))
            except DataError as error:
                yield Record(number, str(error).removeprefix(f"{place}: "))

    def _taken(self) -> Iterator[Record]:
        for index in range(len(self)):
            try:
                yield Record(self.first + index, self.batch().slice(index, 1).to_pylist()[0])
            except UnicodeDecodeError as error:
                yield Record(self.first + index, f"not valid UTF-8 (byte 0x{error.object[error.start]:02x} at position {error.start})")


def place(file: str, number: int) -> str:
    """What a row is called in messages."""
    return f"{file} row {number}" if file.endswith(".parquet") else f"{file}:{number}"


def chunks(file: Path) -> Iterator[Chunk]:
    """All rows of a file in order; blank lines are none. Raises DataError for a file that cannot be read."""
    if file.suffix not in SUFFIXES:
        raise DataError(f"{file}: expected a .jsonl or .parquet file")
    yield from (_batches if file.suffix == ".parquet" else _lines)(file)


def _lines(file: Path) -> Iterator[Chunk]:
    held: list[tuple[int, bytes]] = []
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if content.strip():
                    held.append((number, content))
                if len(held) == CHUNK:
                    yield Chunk(str(file), held)
                    held = []
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    if held:
        yield Chunk(str(file), held)


def _batches(file: Path) -> Iterator[Chunk]:
    first = 0
    with reading_parquet(file), pq.ParquetFile(file, buffer_size=1 << 20) as parquet:
        rows = _PICTURES if holds_bytes(parquet.schema_arrow) else CHUNK
        for batch in parquet.iter_batches(rows):
            yield Chunk(str(file), batch, first)
            first += len(batch)


def holds_bytes(kind: pa.Schema | pa.DataType) -> bool:
    """Whether pictures may lie in the file itself."""
    if isinstance(kind, pa.Schema) or pa.types.is_struct(kind):
        return any(holds_bytes(field.type) for field in kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return holds_bytes(kind.value_type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def key_names(file: Path) -> list[str]:
    """The columns of a parquet file, or the keys of the first row of a JSONL file; none for a file that cannot be read."""
    try:
        if file.suffix == ".parquet":
            return list(pq.read_schema(file).names)
        first = next(next(chunks(file)).records(), None)
    except (DataError, OSError, pa.ArrowException, StopIteration):
        return []
    return list(first.values) if first and not isinstance(first.values, str) else []


def count_rows(file: Path) -> int:
    """How many rows a file has, blank lines included: for a progress bar. Raises DataError for a file that cannot be read."""
    if file.suffix == ".parquet":
        with reading_parquet(file), pq.ParquetFile(file) as parquet:
            return int(parquet.metadata.num_rows)
    try:
        with file.open("rb") as stream:
            return sum(block.count(b"\n") for block in iter(lambda: stream.read(_BLOCK), b""))
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
