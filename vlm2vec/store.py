"""A folder of items and their rows that grows and shrinks with its input: SQLite for the items, one matrix on disk for the rows. No torch.

    index.sqlite        the settings, which item has which content, which content has which row, sha256 of every stretch of rows
    vectors-0.f32       the rows, (N, D) float32, little endian, nothing else: it is mapped into memory and read as it is

A row belongs to a content (`key`), not to a name: a renamed picture and a repeated text are found again. Rows are only ever appended,
flushed, and then named in one transaction, so that a kill leaves whole rows and a tail that the next writer cuts off. A run collects its
items in the table `next`, which takes the place of `items` in its last transaction: readers see what the run before made until then. Rows
of contents that no item has any more stay until they are more than half; then the matrix is written anew under the next name.

Shape letters: N rows, D numbers of a row.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm2vec import io
from vlm2vec.errors import EnvError, InputError, ManifestError
from vlm2vec.io.disk import DiskErrors, fsync_path
from vlm2vec.log import get_logger

FORMAT = 1
DATABASE = "index.sqlite"
STRETCH = 1024  # rows of a stretch of a matrix that is written anew
PATIENCE = 60  # seconds to wait for another process that reads or writes
ITEM = "id text primary key, number integer, key blob, stamp text, text text, instruction text, images text"
SCHEMA = f"""
create table meta (key text primary key, value text);
create table vectors (row integer primary key, key blob unique);
create table stretches (first integer primary key, rows integer, sha256 text);
create table pictures (key blob primary key, webp blob);
create table items ({ITEM});
create index items_key on items (key);
create table next ({ITEM}, run integer);
"""
BEGUN = {"file", "numbering", "version", "run", "dims", "fingerprint", "root"}  # settings of every index
FINISHED = {"rows", "dead", "items", "instruction", "loading", "approximate"}  # and of one that can be searched
NAMES = re.compile(r"vectors-[0-9]{1,9}\.f32|lists-[0-9]{1,9}\.faiss")  # of files that are read, cut and removed: none elsewhere
COLUMNS = "id, number, key, stamp, text, instruction, images"
logger = get_logger(__name__)


@dataclass(frozen=True)
class Entry:
    """An item as it is kept. `key` is the digest of its content, `stamp` one of its words and of name, size and times of its pictures."""

    id: str | int
    number: int  # row of the input
    key: bytes
    stamp: str
    text: str
    instruction: str
    images: tuple[str, ...]  # below the folder of pictures


# -- the database ------------------------------------------------------------------------------------------------------------------------


@contextmanager
def connected(folder: Path) -> Iterator[sqlite3.Connection]:
    """The database of a folder. What it refuses becomes EnvError where the disk did, ManifestError where the file is damaged."""
    file = folder / DATABASE
    try:
        connection = sqlite3.connect(file.absolute().as_uri() + "?mode=rw", uri=True, timeout=PATIENCE, isolation_level=None)
        try:
            yield connection
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        raise _explained(file, error) from error


def _explained(file: Path, error: sqlite3.DatabaseError) -> Exception:
    said = str(error)
    if any(word in said for word in ("full", "readonly", "I/O", "unable to open", "locked")):
        return EnvError(f"{file}: {said}: is there space, and may this process write there?")
    return damaged(file.parent, said)


@contextmanager
def transaction(connection: sqlite3.Connection, kind: str = "immediate") -> Iterator[None]:
    """All statements inside or none; "deferred" is one view of the database for reading."""
    connection.execute(f"begin {kind}")
    try:
        yield
        io.fault("before-commit", DATABASE)
        connection.execute("commit")
    except BaseException:
        if connection.in_transaction:
            connection.execute("rollback")
        raise


def read_meta(connection: sqlite3.Connection, folder: Path) -> dict[str, Any]:
    """The settings. Raises InputError for those of another version, ManifestError where they are damaged or not of an index."""
    try:
        found = {key: json.loads(value) for key, value in connection.execute("select key, value from meta")}
    except (sqlite3.OperationalError, ValueError) as error:
        raise ManifestError(f"{folder / DATABASE} is not the database of an index ({error})") from None
    if found.get("format") != FORMAT:
        raise InputError(f"{folder}: written in format {found.get('format')}; this version reads format {FORMAT}, upgrade vlm2vec")
    if missing := (BEGUN | FINISHED if found.get("version") else BEGUN) - found.keys():
        raise damaged(folder, f"no setting {min(missing)}")
    for name in (found["file"], (found.get("approximate") or {}).get("file", "lists-0.faiss")):
        if not NAMES.fullmatch(str(name)):
            raise damaged(folder, f"{str(name)[:80]!r} is no name of a file that belongs to it")
    return found


def damaged(folder: Path, what: str) -> ManifestError:
    """The error for a database that cannot be used."""
    return ManifestError(f"{folder / DATABASE} is damaged ({what}); remove the folder and make the index again")


def write_meta(connection: sqlite3.Connection, **values: Any) -> None:
    """Set some of the settings."""
    connection.executemany("insert or replace into meta values (?, ?)", [(key, json.dumps(value)) for key, value in values.items()])


def matrix(folder: Path, meta: dict[str, Any], rows: int) -> NDArray[np.float32]:
    """The first `rows` rows of the matrix, mapped into memory. Raises ManifestError where the file is missing or shorter."""
    file = folder / meta["file"]
    if not rows:
        return np.empty((0, meta["dims"]), np.float32)
    try:
        return np.memmap(file, "<f4", "r", shape=(rows, meta["dims"]))
    except (OSError, ValueError) as error:
        raise ManifestError(f"{file} is missing or shorter than its {rows:,} rows ({error}); run vlm2vec index again") from None


# -- writing -----------------------------------------------------------------------------------------------------------------------------


def create(folder: Path, settings: dict[str, Any]) -> None:
    """Begin an index, or go on with the one that is there. InputError where the folder holds something else or other settings."""
    file = folder / DATABASE
    if not file.exists():
        others = [path.name for path in folder.glob("*") if not path.name.startswith(".")]
        if others:
            raise InputError(f"{folder} holds {min(others)} but no {DATABASE}, so it is not ours to fill: choose another folder")
        _begin(folder, settings)
    with connected(folder) as connection:
        there = read_meta(connection, folder)
    changed = [f"{key}: {there.get(key)!r} there, {value!r} here" for key, value in settings.items() if there.get(key) != value]
    if changed:
        raise InputError(f"{folder} was made with another {'; '.join(changed)}; give the same again, or choose another folder")


def _begin(folder: Path, settings: dict[str, Any]) -> None:
    """The empty database under its name at once, so that a kill leaves all of it or none."""
    aside = folder / f".{DATABASE}.tmp"
    aside.unlink(missing_ok=True)
    try:
        connection = sqlite3.connect(aside, isolation_level=None)
        connection.executescript(SCHEMA)
        write_meta(connection, format=FORMAT, file="vectors-0.f32", numbering=_numbering(), version=0, run=0, **settings)
        connection.close()
    except sqlite3.DatabaseError as error:
        raise _explained(aside, error) from error
    with DiskErrors(folder / DATABASE, folder, lambda: 1 << 16):
        io.fault("before-rename", DATABASE)
        fsync_path(aside)
        os.replace(aside, folder / DATABASE)
        fsync_path(folder)


def _numbering() -> str:
    """A name for what the numbers of rows mean: another one where rows are numbered anew, or the folder was removed and made again."""
    return secrets.token_hex(4)


class Writer:
    """One run over the input: `known` and `has` say what need not be made, `put` keeps items, `finish` makes them the index."""

    def __init__(self, folder: Path, connection: sqlite3.Connection) -> None:
        self.folder, self.connection = folder, connection
        self.meta = read_meta(connection, folder)
        self.run = self.meta["run"] + 1
        with transaction(connection):
            self._drop_damaged()
            write_meta(connection, run=self.run)
        self.tidy()

    @property
    def row_bytes(self) -> int:
        return 4 * int(self.meta["dims"])

    def _one(self, query: str, *values: Any) -> Any:
        found = self.connection.execute(query, values).fetchone()
        return None if found is None else found[0]

    def count(self) -> int:
        """Rows of the matrix, those that are no longer used among them."""
        return int(self._one("select coalesce(max(first + rows), 0) from stretches"))

    def known(self, id: str | int, stamp: str) -> bytes | None:
        """The key of the item as it was when it was last seen, if its stamp is still the same."""
        where = "where id = ? and stamp = ?"
        found = self._one(f"select key from next {where} union select key from items {where}", *(json.dumps(id), stamp) * 2)
        return found if found is not None and self.has(found) else None

    def has(self, key: bytes) -> bool:
        """Whether there is a row for this content."""
        return self._one("select row from vectors where key = ?", key) is not None

    def put(
        self, entries: Sequence[Entry], keys: Sequence[bytes], rows_ND: NDArray[np.float32], pictures: Iterable[tuple[bytes, bytes]] = ()
    ) -> list[Entry]:
        """Keep a window of items, and the rows of the contents that are new; returns the items whose id an earlier one has already."""
        first = self.count()
        digest = self._append(first, np.ascontiguousarray(rows_ND, "<f4").tobytes()) if len(keys) else ""
        with transaction(self.connection):
            if keys:
                self.connection.execute("insert into stretches values (?, ?, ?)", (first, len(keys), digest))
                self.connection.executemany("insert into vectors values (?, ?)", enumerate(keys, first))
            self.connection.executemany("insert or ignore into pictures values (?, ?)", pictures)
            return [entry for entry in entries if not self._insert(entry)]

    def _insert(self, entry: Entry) -> bool:
        values = (json.dumps(entry.id), entry.number, entry.key, entry.stamp, entry.text, entry.instruction, json.dumps(entry.images))
        replace = f"insert into next ({COLUMNS}, run) values (?, ?, ?, ?, ?, ?, ?, ?) on conflict (id) do update set "
        replace += ", ".join(f"{name} = excluded.{name}" for name in (*COLUMNS.split(", ")[1:], "run")) + " where run <> excluded.run"
        return self.connection.execute(replace, (*values, self.run)).rowcount == 1

    def _append(self, first: int, data: bytes) -> str:
        """Write rows behind the first `first`, over what a killed run left there, and flush them; returns their sha256."""
        file = self.folder / self.meta["file"]
        with DiskErrors(file, self.folder, lambda: len(data)), open(file, "ab") as stream:
            stream.truncate(first * self.row_bytes)
            stream.write(data)
            stream.flush()
            io.fault("after-write", file.name)
            os.fsync(stream.fileno())
        return io.sha256_bytes(data)

    def _drop_damaged(self) -> None:
        """Forget the rows of stretches that differ from their sha256, so that their items are encoded again."""
        for first, rows, digest in self.connection.execute("select first, rows, sha256 from stretches").fetchall():
            if io.sha256_bytes(self._bytes(first, rows)) != digest:
                logger.warning("%s: rows %d to %d are damaged; their items are encoded again", self.meta["file"], first, first + rows - 1)
                self.connection.execute("delete from vectors where row >= ? and row < ?", (first, first + rows))
                filler = io.sha256_bytes(bytes(rows * self.row_bytes))
                self.connection.execute("update stretches set sha256 = ? where first = ?", (filler, first))
                self._blank(first, rows)

    def _bytes(self, first: int, rows: int) -> bytes:
        try:
            with open(self.folder / self.meta["file"], "rb") as stream:
                stream.seek(first * self.row_bytes)
                return stream.read(rows * self.row_bytes)
        except OSError:
            return b""

    def _blank(self, first: int, rows: int) -> None:
        """Zeros in the place of damaged rows, which may be NaN."""
        file = self.folder / self.meta["file"]
        with DiskErrors(file, self.folder, lambda: rows * self.row_bytes):
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                os.pwrite(descriptor, bytes(rows * self.row_bytes), first * self.row_bytes)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def changes(self) -> dict[str, int]:
        """How many items this run has, and how many of them are new, of another content, or gone since the run before."""
        mine = "select id, key from next where run = ?"
        return {
            "items": self._one(f"select count(*) from ({mine})", self.run),
            "added": self._one(f"select count(*) from ({mine}) where id not in (select id from items)", self.run),
            "changed": self._one(f"select count(*) from ({mine}) as now join items using (id) where now.key <> items.key", self.run),
            "removed": self._one("select count(*) from items where id not in (select id from next where run = ?)", self.run),
        }

    def finish(self, **settings: Any) -> None:
        """Make the items of this run the index, all at once, with new settings."""
        with transaction(self.connection):
            self.connection.execute("delete from items")
            self.connection.execute(f"insert into items ({COLUMNS}) select {COLUMNS} from next where run = ?", (self.run,))
            self.connection.execute("delete from next")
            dead_N = self._dead()
            if dead_N.sum() * 2 > len(dead_N):
                dead_N = self._rewrite(~dead_N)
            self._set(rows=len(dead_N), dead=np.flatnonzero(dead_N).tolist(), **settings)

    def publish(self, **settings: Any) -> None:
        """Change settings of the finished index."""
        with transaction(self.connection):
            self._set(**settings)

    def _set(self, **settings: Any) -> None:
        self.meta = {**self.meta, **settings, "version": self.meta["version"] + 1}
        write_meta(self.connection, **settings, version=self.meta["version"], file=self.meta["file"], numbering=self.meta["numbering"])

    def tidy(self) -> None:
        """Remove files that no version names any more: older ones, and those of a run that was killed."""
        lists = self.meta.get("approximate") or {}
        for pattern in ("vectors-*.f32", "lists-*.faiss"):
            for file in self.folder.glob(pattern):
                if file.name not in (self.meta["file"], lists.get("file")):
                    file.unlink()

    def _dead(self) -> NDArray[np.bool_]:
        """(N,) whether no item has the content of the row."""
        dead_N = np.ones(self.count(), dtype=bool)
        used = self.connection.execute("select row from vectors where key in (select key from items)")
        dead_N[np.fromiter((row for (row,) in used), dtype=np.int64)] = False
        return dead_N

    def _rewrite(self, live_N: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Write the matrix anew with the live rows alone, and number them anew; returns which of its rows are dead, which is none."""
        whole, kept_N = matrix(self.folder, self.meta, len(live_N)), np.flatnonzero(live_N)
        name = f"vectors-{int(self.meta['file'].split('-')[1].split('.')[0]) + 1}.f32"
        stretches = []
        self.meta = {**self.meta, "file": name, "numbering": _numbering()}
        for first in range(0, len(kept_N), STRETCH):
            rows_ND = whole[kept_N[first : first + STRETCH]]
            stretches.append((first, len(rows_ND), self._append(first, rows_ND.tobytes())))
        self.connection.execute("delete from vectors where key not in (select key from items)")
        self.connection.execute("delete from pictures where key not in (select key from items)")
        self.connection.executemany("update vectors set row = ? where row = ?", enumerate(kept_N.tolist()))  # upwards: no number twice
        self.connection.execute("delete from stretches")
        self.connection.executemany("insert into stretches values (?, ?, ?)", stretches)
        return np.zeros(len(kept_N), dtype=bool)
