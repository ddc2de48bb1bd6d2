"""What the disk owes us and what it refuses: flushing, and one error for every way of being full, closed or gone."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from vlm2vec.errors import EnvError
from vlm2vec.io.faults import fault

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_WRONG_PLACE = {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}


class DiskErrors:
    """Context that turns a refusal to write `target` into EnvError, whoever met it.

    `folder` is where the bytes were going, `needed` counts them. Libraries wrap the refusal: safetensors and tokenizers raise exceptions of
    their own whose text ends in "(os error 28)".
    """

    def __init__(self, target: Path, folder: Path, needed: Callable[[], int]) -> None:
        self.target, self.folder, self.needed = target, folder, needed

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        number = _error_number(error)
        vanished = number == errno.ENOENT and not self.folder.exists()
        if vanished or number in _FULL | _CLOSED | _WRONG_PLACE:
            raise EnvError(f"cannot write {self.target}: {os.strerror(number)} ({self._space()})") from error

    def _space(self) -> str:
        standing = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        return f"needs at least {self.needed():,} bytes, {shutil.disk_usage(standing).free:,} bytes free"


def _error_number(error: BaseException | None) -> int:
    """The system's error number behind an exception, 0 if there is none."""
    if isinstance(error, EnvError):  # explained for a single file of a folder: explain it again for the folder
        error = error.__cause__
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, Exception) else None
    return int(found[1]) if found else 0


def fsync(descriptor: int, name: str) -> None:
    """Flush an open file or folder to the disk itself."""
    fault("before-fsync", name)
    os.fsync(descriptor)
    fault("after-fsync", name)


def fsync_path(path: Path) -> None:
    """Flush a file by name, or a folder: only then do its new names survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fsync(descriptor, path.name)
    finally:
        os.close(descriptor)
