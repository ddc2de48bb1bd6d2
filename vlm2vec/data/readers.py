"""Rows of a few columns from parquet or JSONL files, as one Arrow table: a million rows stay a few buffers, not a million objects.

A dataset is a folder with files `<split>.parquet`, `<split>-00000-of-00002.parquet`, ... or the same with `.jsonl`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlm2vec.errors import DataError

TEXT = pa.large_string()
TEXTS = pa.large_list(TEXT)
NUMBER = pa.float64()
PICTURE = pa.struct({"bytes": pa.large_binary(), "path": TEXT})

_FILE = re.compile(r"(?P<split>[^.].*?)(?:-(?P<shard>\d+)(?:-of-(?P<count>\d+))?)?\.(?P<kind>parquet|jsonl)")
_BATCH = 8192  # rows read at a time
_PICTURES = 64  # the same, of rows that hold pictures
_LARGEST = 2**53  # numbers up to it are exact in float64
_SHOWN = 30  # names listed in an error
_TEXTS = (pa.types.is_null, pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


@dataclass(frozen=True)
class Column:
    """A column to read: one text per row or a list of texts. An optional column that is absent reads as absent values.

    `kind` id: a whole number is taken for its digits. number: NaN where there is none. picture: a path, or a struct of encoded bytes and a
    path as image datasets have it. Of `aliases`, names that stand for the same, the first one that is there is read.
    """

    name: str
    many: bool = False
    required: bool = True
    kind: Literal["text", "id", "number", "picture"] = "text"
    aliases: tuple[str, ...] = ()

    def found(self, names: Container[str]) -> str | None:
        """The name under which the column is there."""
        return next((name for name in (self.name, *self.aliases) if name in names), None)

    @property
    def type(self) -> pa.DataType:
        return {"number": NUMBER, "picture": PICTURE}.get(self.kind, TEXTS if self.many else TEXT)

    @property
    def due(self) -> str:
        """What a cell must hold, for messages."""
        if self.many:
            return "a list of strings or integers" if self.kind == "id" else "a list of strings"
        return {"id": "string or integer", "number": "number", "picture": "path or bytes of a picture"}.get(self.kind, "string")

    @property
    def absent(self) -> Any:
        return {"number": float("nan"), "picture": {"bytes": None, "path": ""}}.get(self.kind, [] if self.many else "")


# -- files -------------------------------------------------------------------------------------------------------------------------------


def find_files(root: Path, path: str, split: str) -> list[Path]:
    """The files of a split of the dataset folder `root/path`, in order; `path` may also name one file, which is then the split.

    Raises DataError that lists what is there when the root, the dataset, the split or a shard is missing.
    """
    if not root.is_dir():
        raise DataError(f"data folder {root} does not exist")
    place = root / path
    if place.is_file() and _FILE.fullmatch(place.name):
        return [place]
    if not place.is_dir():
        names = [child.name for child in sorted(root.iterdir()) if child.is_dir() and splits_of(child)]
        raise DataError(f"dataset {path!r} not found in {root}; it holds {_listing(names)}{_nearest(path, names)}")
    splits = splits_of(place)
    if split not in splits:
        raise DataError(f"{place} has no split {split!r}; available: {_listing(list(splits))}{_nearest(split, list(splits))}")
    return _complete(place, split, splits[split])


def splits_of(folder: Path) -> dict[str, list[re.Match[str]]]:
    """The dataset files in a folder by split."""
    splits: dict[str, list[re.Match[str]]] = {}
    for name in sorted(child.name for child in folder.iterdir()):
        if match := _FILE.fullmatch(name):
            splits.setdefault(match["split"], []).append(match)
    return splits


def split_of(name: str) -> str:
    """The split that the name of a dataset file tells, such as train of train-00000-of-00002.parquet; the name itself if it tells none."""
    match = _FILE.fullmatch(name)
    return match["split"] if match else name


def _complete(place: Path, split: str, matches: list[re.Match[str]]) -> list[Path]:
    """Paths of all shards, in order of their number; DataError for a missing shard or for two versions of the split side by side."""
    forms = {(match["kind"], match["count"], match["shard"] is None) for match in matches}
    if len(forms) > 1:
        raise DataError(f"{place} holds split {split!r} more than once ({_listing([match[0] for match in matches])}); keep one")
    by_shard = {int(match["shard"] or 0): match for match in matches}
    count = int(matches[0]["count"] or len(by_shard))
    if missing := sorted(set(range(count)) - set(by_shard)) if matches[0]["count"] else []:
        raise DataError(f"{place}: split {split!r} should have {count} shards; missing: {_listing([str(number) for number in missing])}")
    return [place / by_shard[shard][0] for shard in sorted(by_shard)]


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "nothing") + more


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


# -- rows --------------------------------------------------------------------------------------------------------------------------------


def read_rows(files: Sequence[Path], columns: Sequence[Column]) -> pa.Table:
    """All rows of `files`, with exactly `columns`, as large strings, lists of them, float64 or pictures.

    There are no nulls but in pictures: an absent text is "", an absent list is empty. Raises DataError naming the file and the row or line
    for what is missing, truncated, of a wrong type or not UTF-8, and when there are no rows.
    """
    parts = list(read_batches(files, columns))
    if not any(map(len, parts)):
        raise DataError(f"{', '.join(map(str, files))}: no rows")
    return pa.concat_tables(parts)


def read_batches(files: Sequence[Path], columns: Sequence[Column]) -> Iterator[pa.Table]:
    """The rows of `read_rows` a few at a time; none is no error."""
    for file in files:
        yield from (_read_parquet if file.suffix == ".parquet" else _read_jsonl)(file, columns)


def _table(arrays: Sequence[pa.Array], columns: Sequence[Column]) -> pa.Table:
    return pa.Table.from_arrays(list(arrays), names=[column.name for column in columns])


# -- parquet -----------------------------------------------------------------------------------------------------------------------------


def _read_parquet(file: Path, columns: Sequence[Column]) -> Iterator[pa.Table]:
    """The rows in batches, small enough that no 32-bit offset overflows."""
    try:
        with pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            _check_names(file, columns, names)
            present = [name for column in columns if (name := column.found(names))]
            rows = _PICTURES if any(column.kind == "picture" and column.found(names) for column in columns) else _BATCH
            first = 0
            for batch in parquet.iter_batches(rows, columns=present):
                yield _table([_normal(batch, column, file, first) for column in columns], columns)
                first += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: {_why_unreadable(file, error)}") from None


def _why_unreadable(file: Path, error: Exception) -> str:
    try:
        with file.open("rb") as stream:
            head = stream.read(64)
    except OSError as reason:
        return f"cannot be read: {reason.strerror}"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git-LFS pointer, not the file itself; fetch it with `git lfs pull`"
    return f"truncated or not a parquet file ({str(error).splitlines()[0]})"


def _check_names(file: Path, columns: Sequence[Column], names: Sequence[str]) -> None:
    for column in columns:
        if column.required and column.found(names) is None:
            raise DataError(f"{file}: column {_names(column)} is missing; it has {_listing(names)}{_nearest(column.name, names)}")


def _names(column: Column) -> str:
    return " or ".join(map(repr, (column.name, *column.aliases)))


def _normal(stored: pa.RecordBatch, column: Column, file: Path, first: int) -> pa.Array:
    """The column in the one form that `read_rows` promises; a single text per row becomes a list of one where lists are due."""
    name = column.found(stored.schema.names)
    if name is None:
        return pa.array([column.absent] * len(stored), column.type)
    array = stored.column(name)
    if column.kind == "number":
        return _numbers(array, column, file)
    if column.kind == "picture":
        return _pictures(array, column, file, first)
    if not column.many or not _is_list(array.type):
        strings = _strings(array, column, file, lambda index: first + index)
        return pa.LargeListArray.from_arrays(np.arange(len(strings) + 1), strings) if column.many else strings
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    ends = np.cumsum(lengths, dtype=np.int64)
    strings = _strings(pc.list_flatten(array), column, file, lambda index: first + int(np.searchsorted(ends, index, side="right")))
    return pa.LargeListArray.from_arrays(np.concatenate([[0], ends]), strings)


def _numbers(array: pa.Array, column: Column, file: Path) -> pa.Array:
    if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
        raise _wrong_type(column, file, array.type)
    return pc.fill_null(array.cast(NUMBER, safe=False), float("nan"))


def _pictures(array: pa.Array, column: Column, file: Path, first: int) -> pa.Array:
    if not pa.types.is_struct(array.type):
        paths = _strings(array, column, file, lambda index: first + index)
        return pa.StructArray.from_arrays([pa.nulls(len(paths), pa.large_binary()), paths], fields=list(PICTURE))
    fields = {field.name: pc.struct_field(array, field.name) for field in array.type}
    if not set(fields) <= {"bytes", "path"}:
        raise _wrong_type(column, file, array.type)
    encoded = fields.get("bytes", pa.nulls(len(array), pa.large_binary())).cast(pa.large_binary())
    paths = _strings(fields.get("path", pa.nulls(len(array), TEXT)), column, file, lambda index: first + index)
    return pa.StructArray.from_arrays([encoded, paths], fields=list(PICTURE))


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _strings(array: pa.Array, column: Column, file: Path, row_of: Callable[[int], int]) -> pa.Array:
    """`array` as large strings without nulls, checked to be UTF-8: parquet readers take the bytes as they are."""
    kind = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
    accepted = (*_TEXTS, pa.types.is_integer) if column.kind == "id" else _TEXTS
    if not any(is_accepted(kind) for is_accepted in accepted):
        raise _wrong_type(column, file, kind)
    strings = array.cast(TEXT)
    try:
        strings.validate(full=True)
    except pa.ArrowInvalid:
        row = row_of(_first_undecodable(strings))
        raise DataError(f"{file}: row {row}: {column.name} is not valid UTF-8 (a lone surrogate or damaged bytes)") from None
    return pc.fill_null(strings, "")


def _wrong_type(column: Column, file: Path, kind: pa.DataType) -> DataError:
    return DataError(f"{file}: column {column.name!r} must be {column.due}, got {_type_name(kind)}")


def _type_name(kind: pa.DataType) -> str:
    return {"int64": "int", "double": "float"}.get(str(kind), str(kind))


def _first_undecodable(strings: pa.Array) -> int:
    for index, value in enumerate(strings.cast(pa.large_binary())):
        data = value.as_py() or b""
        if data.decode("utf-8", "replace").encode() != data:
            return index
    return 0


# -- JSONL -------------------------------------------------------------------------------------------------------------------------------


def _read_jsonl(file: Path, columns: Sequence[Column]) -> Iterator[pa.Table]:
    """The rows in batches; a blank line is no row, a byte order mark is accepted."""
    rows = enumerate(_json_lines(file))
    while batch := list(islice(rows, _BATCH)):
        cells = [[_cell(record, column, f"{place}: row {row}") for row, (place, record) in batch] for column in columns]
        yield _table([pa.array(values, column.type) for values, column in zip(cells, columns, strict=True)], columns)


def _json_lines(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(file:line, object) for each line that is not blank."""
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if content.strip():
                    yield f"{file}:{number}", json_object(content, f"{file}:{number}")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None


def json_object(line: bytes, place: str) -> Mapping[str, Any]:
    """The object that a line holds. Raises DataError that begins with `place`."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not valid UTF-8 (byte 0x{line[error.start]:02x} at position {error.start})") from None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "number too long or nesting too deep"
        raise DataError(f"{place}: not valid JSON ({reason}): {text.strip()[:80]!r}") from None
    if not isinstance(record, dict):
        raise DataError(f"{place}: expected an object with the columns as keys, got {type(record).__name__}: {text.strip()[:80]!r}")
    return record


def _cell(record: Mapping[str, Any], column: Column, place: str) -> Any:
    """The value of one cell in the form that `read_rows` promises."""
    name = column.found(record)
    if column.required and name is None:
        names = list(record)
        raise DataError(f"{place}: {column.name} is missing; the line has {_listing(names)}{_nearest(column.name, names)}")
    value = None if name is None else record[name]
    if value is None:
        return column.absent
    if column.kind == "number":
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > _LARGEST:
            raise _refuse(value, column, place)
        return float(value)
    if column.kind == "picture":
        path = value.get("path") if isinstance(value, dict) and not value.get("bytes") else value
        return {"bytes": None, "path": _text(path, column, place)}
    if not column.many:
        return _text(value, column, place)
    if isinstance(value, list):
        return [_text(element, column, place) for element in value]
    return [_text(value, column, place)]


def _text(value: Any, column: Column, place: str) -> str:
    if value is None:
        return ""
    if column.kind == "id" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise _refuse(value, column, place)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{place}: {column.name} is not valid UTF-8 (a lone surrogate)") from None
    return value


def _refuse(value: Any, column: Column, place: str) -> DataError:
    return DataError(f"{place}: {column.name} must be {column.due}, got {type(value).__name__}")
