"""Single files: digests, atomic writing, JSON and JSON lines."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlm2vec.errors import InputError
from vlm2vec.io.disk import DiskErrors, fsync, fsync_path
from vlm2vec.io.faults import fault


def sha256_bytes(data: bytes) -> str:
    """Hexadecimal sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in blocks of 1 MiB."""
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def digest(obj: Any) -> str:
    """sha256 of the canonical JSON of `obj`: sorted keys, no whitespace, ASCII; NaN and infinity raise ValueError."""
    return sha256_bytes(json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii"))


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) so that a reader finds the old content or the new one, never a part. Raises EnvError."""
    path = Path(os.path.realpath(path))
    content = data.encode("utf-8") if isinstance(data, str) else data
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with DiskErrors(path, path.parent, lambda: len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(aside, "xb") as file:
                file.write(content)
                file.flush()
                fault("after-write", path.name)
                fsync(file.fileno(), path.name)
            fault("before-rename", path.name)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        fault("after-rename", path.name)
        fsync_path(path.parent)


def read_json(path: Path) -> Any:
    """The JSON value in a file; InputError names the file and the line."""
    content = _read(path)
    try:
        return json.loads(content.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{content.count(10, 0, error.start) + 1}: byte {error.start} is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not usable JSON: {error}") from error


def write_json(path: Path, obj: Any) -> None:
    """Write `obj` as indented JSON, atomically; NaN and infinity raise ValueError."""
    write_atomic(path, json.dumps(obj, indent=2, allow_nan=False) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file. Blank lines are skipped, a torn last line is dropped, all else raises InputError with file:line."""
    lines = _read(path).split(b"\n")
    if not _whole(lines[-1]):
        lines.pop()
    return [_row(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def append_jsonl(path: Path, obj: Any) -> None:
    """Add one line. Not flushed to disk: a kill loses nothing that was added, a power cut may tear the tail, which the next call mends."""
    line = json.dumps(obj, allow_nan=False).encode("ascii") + b"\n"
    with DiskErrors(path, path.parent, lambda: len(line)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", buffering=0) as file:  # a buffer would try again on closing, after the cut below
            end = _mend_tail(file.fileno())
            try:
                written = file.write(line)
                while written < len(line):  # a disk that fills up takes a part first and refuses the next byte
                    written += file.write(line[written:])
                fault("after-write", path.name)
            except OSError:
                os.ftruncate(file.fileno(), end)
                raise


def rewrite_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Replace all rows of a JSON-lines file, atomically."""
    write_atomic(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def _mend_tail(descriptor: int) -> int:
    """End the last line of a file that lacks its newline: keep it when it is whole, cut it when it is torn. Returns the size then."""
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return size
    content = os.pread(descriptor, size, 0)
    start = content.rfind(b"\n") + 1
    if _whole(content[start:]):
        return size + os.write(descriptor, b"\n")
    os.ftruncate(descriptor, start)
    return start


def _whole(line: bytes) -> bool:
    """Whether the last line was written to its end: a strict prefix of a JSON object is never JSON."""
    try:
        json.loads(line.decode("utf-8") or "{}")
    except (ValueError, RecursionError):
        return False
    return True


def _row(line: bytes, where: str) -> dict[str, Any]:
    shown = line[:80].decode("utf-8", "replace")
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}): {shown!r}") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object, got {type(row).__name__}: {shown!r}")
    return row


def _read(path: Path) -> bytes:
    """The bytes of a text file, less a byte order mark."""
    try:
        return Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
