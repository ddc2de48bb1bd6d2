"""Folders that appear whole or not at all, with a manifest that shows later damage."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from vlm2vec.errors import EnvError, InputError, ManifestError, PathError
from vlm2vec.io.disk import DiskErrors, fsync_path
from vlm2vec.io.faults import fault
from vlm2vec.io.files import read_json, sha256_file, write_json
from vlm2vec.io.paths import safe_join

MANIFEST = "manifest.json"
FORMAT = 1


@contextlib.contextmanager
def publishing(directory: Path, needed: int = 0, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill. When the body ends it becomes `directory`, whole and with a manifest; when it raises, nothing changes.

    A published `directory` is exchanged only once the new one is complete, and then removed. One that holds files but no manifest was not
    made here: InputError, unless the caller owns the name and says `replace`. What a killed process left beside it is removed first.
    A full, closed or vanished disk raises EnvError with the bytes free and those needed: `needed`, or what was written if that is more.
    """
    directory = Path(os.path.realpath(directory))
    with DiskErrors(directory, directory.parent, lambda: needed):
        if directory.exists() and any(directory.iterdir()) and not replace and not (directory / MANIFEST).exists():
            raise InputError(f"{directory} holds files but no {MANIFEST}, so it is not ours to replace: choose a new or an empty folder")
        directory.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(directory.parent)
        staging, lock = _stage(directory)
    try:
        with DiskErrors(directory, staging, lambda: max(needed, _bytes_under(staging))):
            yield staging
            _check_same(staging, lock, directory)
            _seal(staging)
            _put_in_place(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # absent after a first publication, the old folder after an exchange
        os.close(lock)


def verify_manifest(directory: Path, apart_from: Collection[str] = ()) -> None:
    """Check a published folder, apart from some names, against its manifest; ManifestError says which file differs and how. Files added
    later are ignored.
    """
    for name, expected in _read_manifest(directory).items():
        if name in apart_from:
            continue
        try:
            path = safe_join(directory, name)
            size = path.stat().st_size
        except (OSError, PathError) as error:
            raise ManifestError(f"{directory}: {name} is missing ({error})") from error
        if size != expected["bytes"]:
            raise ManifestError(f"{directory}: {name} has {size} bytes, expected {expected['bytes']}")
        if sha256_file(path) != expected["sha256"]:
            raise ManifestError(f"{directory}: {name} differs from its sha256 in {MANIFEST}")


def unpublish(directory: Path) -> None:
    """Remove a published folder, its manifest first, so that a kill leaves nothing that looks whole. Raises EnvError."""
    try:
        (directory / MANIFEST).unlink(missing_ok=True)
        fault("prune", directory.name)
        shutil.rmtree(directory)
    except OSError as error:
        raise EnvError(f"cannot remove {directory}: {error.strerror or error}") from error


def _read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    if not (directory / MANIFEST).is_file():
        raise ManifestError(f"{directory}: manifest missing")
    try:
        manifest = read_json(directory / MANIFEST)
    except InputError as error:
        raise ManifestError(f"manifest damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise ManifestError(f"{directory}: manifest has format {found!r}, this version reads format {FORMAT}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) and {"sha256", "bytes"} <= entry.keys() for entry in files.values()):
        raise ManifestError(f"{directory}: manifest damaged: its files are not listed with sha256 and bytes")
    return files


def _stage(directory: Path) -> tuple[Path, int]:
    """A new folder beside `directory`, and the descriptor whose lock says that its publisher lives."""
    while True:
        staging = directory.with_name(f".{directory.name}.staging-{secrets.token_hex(4)}")
        staging.mkdir()
        try:
            lock = os.open(staging, os.O_RDONLY)
        except FileNotFoundError:  # somebody took it for abandoned already
            continue
        with contextlib.suppress(OSError):  # no locks on this filesystem: then nobody takes the folder for abandoned either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if staging.exists():  # else somebody was faster with the lock
            return staging, lock
        os.close(lock)


def _remove_abandoned(parent: Path) -> None:
    """Remove staging folders whose publisher died: the kernel dropped its lock."""
    for path in parent.glob(".*.staging-????????"):
        with contextlib.suppress(OSError):  # its publisher lives, or somebody else removed it just now
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fault("prune", path.name)
                shutil.rmtree(path)
            finally:
                os.close(lock)


def _check_same(staging: Path, lock: int, directory: Path) -> None:
    """Raise EnvError if somebody removed the folder meanwhile: what was written later made a new one, and what came before is lost."""
    if not staging.exists() or not os.path.samestat(os.stat(staging), os.fstat(lock)):
        raise EnvError(f"cannot write {directory}: {staging} was removed while it was filled; keep other programs away from its parent")


def _bytes_under(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _seal(staging: Path) -> None:
    """Flush every file, give it the mode that the umask grants (safetensors leaves 0600) and list it in the manifest, written last."""
    mode = staging.stat().st_mode & 0o666
    files: dict[str, dict[str, Any]] = {}
    folders = [staging]
    for path in sorted(staging.rglob("*")):
        name = path.relative_to(staging).as_posix()
        found = path.lstat().st_mode
        if stat.S_ISDIR(found):
            folders.append(path)
        elif not stat.S_ISREG(found):
            raise InputError(f"{name} is no regular file and cannot be published")
        elif name != MANIFEST:
            path.chmod(mode)
            fsync_path(path)
            files[name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    write_json(staging / MANIFEST, {"format": FORMAT, "files": files})
    for folder in folders:
        fsync_path(folder)


def _put_in_place(staging: Path, directory: Path) -> None:
    previous = directory.with_name(f".{directory.name}.previous")
    fault("before-rename", directory.name)
    try:
        os.rename(staging, directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _exchange(staging, directory):
            _rename_twice(staging, directory, previous)
    fault("after-rename", directory.name)
    fsync_path(directory.parent)
    fault("prune", directory.name)
    shutil.rmtree(previous, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one atomic step (Linux renameat2); False where the system or the filesystem cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


def _rename_twice(staging: Path, directory: Path, previous: Path) -> None:
    """Replace without an atomic exchange: a kill between the renames leaves the old folder, whole, under the name `previous`."""
    shutil.rmtree(previous, ignore_errors=True)
    os.rename(directory, previous)
    try:
        fault("between-renames", directory.name)
        os.rename(staging, directory)
    except OSError:
        os.rename(previous, directory)
        raise
