"""Unpacking archives that strangers made: zip and tar.gz, of which only regular files with harmless names ever reach the disk.

An archive that holds anything else (links, devices, absolute paths, `..`, encrypted or oversized entries) is refused as a whole: nothing
of it is moved into place. Entries go to a staging folder first, so that what lies in place is complete.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from vlm2vec.errors import DataError, EnvError
from vlm2vec.io.disk import DiskErrors
from vlm2vec.io.faults import fault
from vlm2vec.io.paths import LONGEST

LONGEST_PART = 255  # bytes of one part of a path, on every common file system
LARGEST_READ = 64 << 20  # bytes asked for at once; tarfile reads a header's extension in one piece, whatever size that claims
BLOCK = 1 << 20

_JUNK = re.compile(r"(^|/)(__MACOSX/|__MACOSX$|\._[^/]*$|\.DS_Store$|Thumbs\.db$|desktop\.ini$)")
_BROKEN = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, ValueError)


@dataclass(frozen=True)
class Limits:
    """What one archive may become. `ratio` is unpacked over packed bytes and counts from `spare` bytes on."""

    entries: int = 2_000_000
    bytes: int = 200_000_000_000
    ratio: float = 200.0
    spare: int = 64_000_000


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Unpacked:
    """What came out: files and bytes, files per folder (relative to the target), entries of macOS and Windows left out, and notes."""

    files: int
    bytes: int
    folders: dict[str, int]
    junk: int = 0
    notes: tuple[str, ...] = ()


def unpack(
    archive: Path,
    to: Path,
    staging: Path,
    strip: str = "",
    wanted: Collection[str] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    progress: Any = None,
) -> Unpacked:
    """Unpack `archive` into the folder `to`, by way of the folder `staging` on the same disk, whose former content is removed.

    The content of the top folder `strip` moves up. `wanted` restricts it to files with these paths below `to`. `progress` is a bar over the
    archive's bytes. Files that are there already are replaced. Raises DataError if the archive is damaged or hostile or would not keep
    within `limits`, EnvError when the disk is full; then nothing was moved to `to`. A kill leaves `staging`, or part of the files in place.
    """
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with DiskErrors(to, to.parent, lambda: 0):
            staging.mkdir(parents=True)
            to.mkdir(parents=True, exist_ok=True)
            made = _fill(archive, _Sink(staging, wanted, limits, archive), strip, progress)
            _move(staging, to)
        return made
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def is_junk(path: str) -> bool:
    """Whether a path (with forward slashes) is what macOS or Windows add to archives and folders."""
    return _JUNK.search(path) is not None


def require_space(folder: Path, needed: int, what: str, hint: str) -> int:
    """Bytes free where `folder` is, or will be. Raises EnvError when less than `needed` are."""
    free = free_space(folder)
    if free < needed:
        raise EnvError(f"{folder}: {what} needs {show_bytes(needed)}, {show_bytes(free)} are free; {hint}")
    return free


def free_space(folder: Path) -> int:
    """Bytes free on the disk where `folder` is, or will be."""
    return shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free


def show_bytes(count: float) -> str:
    """7.13 GB for 7130000000: decimal, as the Hub shows them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


# -- entries -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """One member: its name as stored, whether it is a folder, why its kind is refused ("" if it is not), where it ends in the archive."""

    name: str
    folder: bool
    refused: str
    position: int
    open: Callable[[], IO[bytes] | None] = field(repr=False)


def _zip_entries(archive: Path) -> Iterator[_Entry]:
    with zipfile.ZipFile(archive) as opened:
        position = 0
        for info in opened.infolist():
            position += info.compress_size
            kind = stat.S_IFMT(info.external_attr >> 16)
            refused = "" if kind in (0, stat.S_IFREG, stat.S_IFDIR) else "a link" if kind == stat.S_IFLNK else "a special file"
            if info.flag_bits & 1:
                refused = "encrypted"
            folder = info.is_dir() or kind == stat.S_IFDIR
            yield _Entry(_zip_name(info), folder, refused, position, partial(opened.open, info))


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The name; macOS stores UTF-8 without saying so, which the format reads as code page 437."""
    if info.flag_bits & 0x800 or info.filename.isascii():
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.filename


class _Careful:
    """A gzip stream read forwards. It refuses to give huge pieces at once, or more than `limit` bytes in all.

    tarfile steps back one byte before each header, for which gzip would start over: the last byte read is kept.
    """

    def __init__(self, stream: gzip.GzipFile, limit: int, archive: Path) -> None:
        self._stream, self._limit, self._archive = stream, limit, archive
        self._position, self._last, self._held = 0, b"", b""

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > LARGEST_READ:
            raise DataError(f"{self._archive.name}: an entry's header claims {size:,} bytes; refused, nothing was unpacked")
        data = self._held[:size]
        data += self._stream.read(size - len(data))
        self._position += len(data)
        self._last, self._held = data[-1:] or self._last, b""
        if self._position > self._limit:
            raise DataError(f"{self._archive.name}: unpacks to over {show_bytes(self._limit)}; refused, nothing was unpacked")
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if offset == self._position - 1:
            self._position, self._held = offset, self._last
        while self._position < offset and self.read(min(BLOCK, offset - self._position)):
            pass
        return self._position


def _tar_entries(archive: Path, limit: int) -> Iterator[_Entry]:
    with archive.open("rb") as raw, gzip.GzipFile(fileobj=raw) as stream:
        careful: Any = _Careful(stream, limit, archive)
        with tarfile.open(fileobj=careful, mode="r:") as opened:
            while (info := opened.next()) is not None:
                opened.members.clear()  # type: ignore[attr-defined]  # else it keeps every one of them
                refused = "" if info.isreg() or info.isdir() else "a link" if info.islnk() or info.issym() else "a special file"
                if info.issparse():
                    refused = "a sparse file"
                yield _Entry(info.name, info.isdir(), refused, raw.tell(), partial(opened.extractfile, info))


def _entries(archive: Path, ceiling: int) -> Iterator[_Entry]:
    with archive.open("rb") as stream:
        head = stream.read(4)
    if head[:2] == b"PK":
        return _zip_entries(archive)
    if head[:2] == b"\x1f\x8b":
        return _tar_entries(archive, ceiling)
    raise DataError(f"{archive}: neither a zip nor a tar.gz archive (it begins with {head!r})")


def _ceiling(archive: Path, limits: Limits) -> int:
    """Bytes that may come out of an archive."""
    return min(limits.bytes, int(max(limits.spare, limits.ratio * archive.stat().st_size)))


# -- files -------------------------------------------------------------------------------------------------------------------------------


class _Sink:
    """Writes wanted entries below a folder and counts them."""

    def __init__(self, folder: Path, wanted: Collection[str] | None, limits: Limits, archive: Path) -> None:
        self.folder, self.wanted, self.name = folder, wanted, archive.name
        self.entries_left, self.ceiling = limits.entries, _ceiling(archive, limits)
        self.files = self.bytes = self.junk = self.repeats = 0
        self.clashes: list[str] = []
        self.folders: Counter[str] = Counter()
        self._seen: dict[str, str] = {}  # path without case -> path

    def refuse(self, entry: _Entry, why: str) -> DataError:
        return DataError(f"{self.name}: entry {entry.name[:200]!a} is {why}; refused, nothing was unpacked")

    def check(self, entry: _Entry) -> None:
        """Raise DataError unless the entry may be in an archive at all."""
        self.entries_left -= 1
        if self.entries_left < 0:
            raise DataError(f"{self.name}: holds too many entries; refused, nothing was unpacked")
        if why := entry.refused or unsafe(entry.name):
            raise self.refuse(entry, why)

    def take(self, entry: _Entry, path: str) -> None:
        """Write one file below the folder, in blocks, never more than the ceiling."""
        target = self.folder / path
        self._mark(entry, path, target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as sink:
                self._copy(entry, sink)
        except (NotADirectoryError, IsADirectoryError, FileExistsError):
            raise self.refuse(entry, "a file and a folder at once") from None
        fault("unpacked", path)

    def _copy(self, entry: _Entry, sink: IO[bytes]) -> None:
        source = entry.open()
        assert source is not None  # regular files only
        with source:
            while block := source.read(BLOCK):
                self.bytes += len(block)
                if self.bytes > self.ceiling:
                    raise self.refuse(entry, f"one too many: the archive unpacks to over {show_bytes(self.ceiling)}")
                sink.write(block)

    def _mark(self, entry: _Entry, path: str, target: Path) -> None:
        earlier = self._seen.setdefault(path.casefold(), path)
        if earlier == path and target.is_file():  # as every unpacker does, the later one stays
            self.repeats += 1
            self.bytes -= target.stat().st_size
            return
        if earlier != path:
            self.clashes.append(f"{earlier} and {path}")
            if target.exists():
                raise self.refuse(entry, f"the same file as {earlier!a} on this disk, which does not tell upper from lower case")
        self.files += 1
        self.folders[str(PurePosixPath(path).parent)] += 1

    def result(self) -> Unpacked:
        notes = []
        if self.clashes:
            notes.append(f"{len(self.clashes)} names differ from another only in case, e.g. {self.clashes[0]}")
        if self.repeats:
            notes.append(f"{self.repeats} entries come twice; the later one was kept")
        return Unpacked(self.files, self.bytes, dict(sorted(self.folders.items())), self.junk, tuple(notes))


def unsafe(name: str) -> str:
    """Why an entry of this name must not be written, or ""."""
    if "\0" in name or not name.strip("./"):
        return "" if name.strip("/") in (".", "") and name else "without a usable name"
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        return "an absolute path"
    if ".." in re.split(r"[/\\]", name):
        return "a path with a '..' part"
    if "\\" in name:
        return "a path with backslashes"
    try:
        longest = max(len(os.fsencode(part)) for part in name.split("/"))
    except UnicodeEncodeError:
        return "a name that no file can have"
    return "a name that is too long" if longest > LONGEST_PART or len(name) > LONGEST else ""


def _fill(archive: Path, sink: _Sink, strip: str, progress: Any) -> Unpacked:
    try:
        for entry in _entries(archive, sink.ceiling):
            sink.check(entry)
            path = _moved_up(entry.name, strip)
            if is_junk(entry.name):
                sink.junk += not entry.folder
            elif not entry.folder and (sink.wanted is None or path in sink.wanted):
                sink.take(entry, path)
            if progress is not None:
                progress.update(entry.position - progress.n)
    except _BROKEN as error:
        raise DataError(f"{archive}: damaged, nothing was unpacked ({error}); delete it and fetch it again") from error
    return sink.result()


def _moved_up(name: str, strip: str) -> str:
    """The path without "." parts and without the top folder `strip`."""
    path = PurePosixPath(name)
    return path.relative_to(strip).as_posix() if strip and path.is_relative_to(strip) else path.as_posix()


def _move(source: Path, target: Path) -> None:
    """Move the content of one folder into another: whole folders by one rename where the target has none of that name."""
    for entry in list(os.scandir(source)):
        there = target / entry.name
        if entry.is_dir(follow_symlinks=False) and there.is_dir():
            _move(Path(entry.path), there)
        else:
            fault("before-rename", entry.name)
            os.replace(entry.path, there)
