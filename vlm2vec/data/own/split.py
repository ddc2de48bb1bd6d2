"""A part of one's own pairs held out for evaluation, chosen by a hash of what must stay together.

Whether a row is held out depends on its own key, the seed and the share alone: rows that are added move none that were there, and a larger
share holds out what a smaller one does, and more.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm2vec import io
from vlm2vec.data.own.read import read_rows
from vlm2vec.data.own.records import Chunk, chunks, count_rows, place
from vlm2vec.data.own.schema import Row, fingerprint, picture_key, side_key
from vlm2vec.data.own.sightings import Seen
from vlm2vec.errors import DataError
from vlm2vec.log import progress

By = Literal["group", "query", "positive", "picture"]
TRAIN, EVAL, LEFT_OUT = 0, 1, 2  # where a row goes
PARTS = "train", "eval"
_GROUP_BYTES = 64_000_000  # of a row group that is written
_GROUP_ROWS = 8192


@dataclass(frozen=True)
class Split:
    """The files, their rows, and how many rows of the training part show a picture that the held-out part shows too, left out or not."""

    train: Path
    eval: Path
    rows: tuple[int, int]
    leaks: int
    dropped: bool


def key_of(row: Row, by: By | None) -> str:
    """What rows that stay together share. None: the group where a row has one, else the picture, else the query.

    The picture is the first of the query, or of the first positive where the query has none; by its path or its bytes.
    """
    if by == "group" or (by is None and row.group):
        return fingerprint(["group", row.group])
    pictures = [*row.query["image"], *row.positives[0]["image"]]
    if by in ("picture", None) and pictures:
        return fingerprint(["picture", picture_key(pictures[0])])
    return side_key(row.positives[0] if by == "positive" else row.query)


def is_held_out(key: str, share: float, seed: int) -> bool:
    """Whether the rows of a key are for evaluation: true for `share` of all keys."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest(), "big") < share * 2.0**64


def split(
    file: Path, to: Path, share: float, root: Path | None = None, by: By | None = None, seed: int = 17, drop_leaks: bool = False
) -> Split:
    """Write the rows of `file` as they are to `to/train` and `to/eval`, of the same kind, with a manifest, published as a whole.

    `to` lies below `root` (None: the folder of the file), at which the paths of pictures start, so that they hold for both parts.
    `drop_leaks` leaves out of training the rows that show a picture, in query or positive, which the held-out part shows. Raises DataError
    for a wrong row, a row without group where `by` says group, a part without rows, a `to` elsewhere.
    """
    root = root or file.parent
    if not to.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{to} must lie below {root}, where the paths of pictures start; choose another folder, or give that one as root")
    if not 0 < share < 1:
        raise DataError(f"the share held out must lie between 0 and 1, got {share}")
    total = count_rows(file)
    with progress(total, "deciding", "row") as bar, Seen() as seen:
        goes = bytearray()
        for number, row in read_rows(file):
            goes.append(_part_of(row, by, share, seed, place(str(file), number)))
            pictures = {picture_key(picture) for key, side in row.sides() if not key.startswith("negatives") for picture in side["image"]}
            seen.add("picture", [(fingerprint([key]), 2 * len(goes) - 2 + goes[-1]) for key in pictures])
            bar.update()
        leaks = _leaking(seen)
    for index in leaks if drop_leaks else ():
        goes[index] = LEFT_OUT
    rows = (goes.count(TRAIN), goes.count(EVAL))
    for part, count in zip(PARTS, rows, strict=True):
        if not count:
            raise DataError(f"{file}: no row of {len(goes)} is left for {part}; choose another share, another --by or another seed")
    with io.publishing(to) as staging:
        _write(file, goes, staging)
    return Split(to / f"{PARTS[TRAIN]}{file.suffix}", to / f"{PARTS[EVAL]}{file.suffix}", rows, len(leaks), drop_leaks)


def _part_of(row: Row, by: By | None, share: float, seed: int, where: str) -> int:
    if by == "group" and not row.group:
        raise DataError(f"{where}: group is missing, and the rows are to be split by it; give every row one, or split by something else")
    return EVAL if is_held_out(key_of(row, by), share, seed) else TRAIN


def _leaking(seen: Seen) -> set[int]:
    """The numbers of training rows with a picture that a held-out row shows; a place is twice the row's number, and 1 more if held out."""
    found: set[int] = set()
    for place_S, starts in seen.grouped("picture"):
        part_S = place_S % np.uint64(2)
        sizes = np.diff(starts, append=len(place_S))
        shown_S = np.repeat(np.maximum.reduceat(part_S, starts) == EVAL, sizes)
        found.update((place_S[shown_S & (part_S == TRAIN)] // np.uint64(2)).tolist())
    return found


# -- writing -----------------------------------------------------------------------------------------------------------------------------


class _Writer(Protocol):
    """The file of one part; `write` appends the rows of a chunk that are kept."""

    def write(self, chunk: Chunk, keep: list[bool]) -> None: ...
    def close(self) -> None: ...


def _write(file: Path, goes: bytearray, to: Path) -> None:
    """Every row of `file` into the part of `to` that it goes to."""
    made: type[_Parquet] | type[_Jsonl] = _Parquet if file.suffix == ".parquet" else _Jsonl
    with ExitStack() as stack, progress(len(goes), "writing", "row") as bar:
        writers: list[_Writer] = [made(to / f"{part}{file.suffix}") for part in PARTS]
        for writer in writers:
            stack.callback(writer.close)
        first = 0
        for chunk in chunks(file):
            wanted = goes[first : first + len(chunk)]
            for part, writer in enumerate(writers):
                writer.write(chunk, [here == part for here in wanted])
            first += len(chunk)
            bar.update(len(chunk))


class _Jsonl:
    """Lines as they were."""

    def __init__(self, file: Path) -> None:
        self._stream = file.open("wb")

    def write(self, chunk: Chunk, keep: list[bool]) -> None:
        for kept, (_, line) in zip(keep, chunk.lines(), strict=True):
            if kept:
                self._stream.write(line.rstrip(b"\r\n") + b"\n")

    def close(self) -> None:
        self._stream.close()


class _Parquet:
    """Rows of the same columns, in row groups of some size."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._writer: pq.ParquetWriter | None = None
        self._held: list[pa.RecordBatch] = []

    def close(self) -> None:
        self._flush()
        if self._writer:
            self._writer.close()

    def write(self, chunk: Chunk, keep: list[bool]) -> None:
        self._held.append(chunk.batch().filter(pa.array(keep)))
        large = sum(batch.nbytes for batch in self._held) >= _GROUP_BYTES
        if large or sum(map(len, self._held)) >= _GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            table = pa.Table.from_batches(self._held)
            self._writer = self._writer or pq.ParquetWriter(self._file, table.schema)
            self._writer.write_table(table)
            self._held = []
