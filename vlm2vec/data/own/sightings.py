"""Which keys were seen where, for more of them than memory holds: on disk, in buckets by key, each sorted by itself.

A sighting is a key of 64 bits, a hash, and a place of 64 bits. Of ten million different keys two are taken for one with a probability of
3 in a million.

Shape letters: S sightings of a bucket.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from vlm2vec.io.disk import DiskErrors

BUCKETS = 16
SIGHTING = np.dtype([("key", "<u8"), ("place", "<u8")])
_HELD = 8192  # sightings of a kind in memory before they are written


class Seen:
    """A temporary folder of sightings by kind ("id", "picture", ...). A context: it is gone at the end.

    16 bytes a sighting on disk, a sixteenth of one kind's in memory at a time. Raises EnvError when the disk is full.
    """

    def __enter__(self) -> Seen:
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="vlm2vec-")))
        self._files: dict[tuple[str, int], BinaryIO] = {}
        self._held: dict[str, list[tuple[int, int]]] = defaultdict(list)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, kind: str, sightings: Iterable[tuple[str, int]]) -> None:
        """Note keys (16 hexadecimal digits each) with their places."""
        self._held[kind] += [(int(key, 16), place) for key, place in sightings]
        if len(self._held[kind]) >= _HELD:
            self._flush(kind)

    def _flush(self, kind: str) -> None:
        rows = np.array(self._held.pop(kind, []), SIGHTING)
        bucket = rows["key"] % BUCKETS
        with DiskErrors(self._folder, self._folder, lambda: rows.nbytes):
            for number in np.unique(bucket).tolist():
                self._file(kind, number).write(rows[bucket == number].tobytes())

    def _file(self, kind: str, bucket: int) -> BinaryIO:
        if (kind, bucket) not in self._files:
            self._files[kind, bucket] = self._stack.enter_context((self._folder / f"{kind}-{bucket}").open("w+b"))
        return self._files[kind, bucket]

    def grouped(self, kind: str) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
        """A bucket at a time: the places of its sightings (S,), those of one key together and ascending, and where each key starts."""
        self._flush(kind)
        for (found, _), file in sorted(self._files.items()):
            if found == kind:
                with DiskErrors(self._folder, self._folder, lambda: 0):
                    file.flush()
                    file.seek(0)
                    rows = np.frombuffer(file.read(), SIGHTING).copy()
                    file.seek(0, 2)
                rows.sort(order=("key", "place"))
                yield rows["place"], np.flatnonzero(np.diff(rows["key"], prepend=rows["key"][:1] - np.uint64(1)) != 0)
