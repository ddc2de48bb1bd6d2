"""The lock of a run folder: two processes never train into the same one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm2vec.errors import RunLockedError
from vlm2vec.io.disk import DiskErrors
from vlm2vec.log import get_logger

LOCK = ".lock"

_logger = get_logger(__name__)
_held: dict[str, int] = {}  # real path of a lock file -> pid that holds it; a forked child inherits the entry but not the lock


@contextlib.contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Hold `directory` for this process; RunLockedError names the holder. The lock ends with the process, however it ends.

    It is a POSIX record lock: workers forked later do not inherit it, so an orphaned one never blocks a restart. Its trap: closing any
    other descriptor of the lock file in this process drops it. On a filesystem without locks the holder written in the file decides: one
    that is dead on this host is taken over, any other is believed.
    """
    path = Path(os.path.realpath(directory)) / LOCK
    if _held.get(str(path)) == os.getpid():
        raise RunLockedError(f"{directory} is held by this process, pid {os.getpid()}, already")
    with DiskErrors(path, path.parent, lambda: 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _acquire(descriptor, directory, path)
        _held[str(path)] = os.getpid()
        yield
    finally:
        if _held.get(str(path)) == os.getpid():
            del _held[str(path)]
            os.ftruncate(descriptor, 0)
        os.close(descriptor)


def _acquire(descriptor: int, directory: Path, path: Path) -> None:
    holder = _read_holder(descriptor)
    state = _state(holder) if holder else "unknown"
    if not _granted(descriptor, holder, state):
        who = f"pid {holder['pid']} on host {holder['host']} since {holder['since']} ({state})" if holder else "another process"
        raise RunLockedError(f"{directory} is held by {who}: wait for it or choose another run folder; if that run is over, delete {path}")
    if holder:
        _logger.warning("%s: taking over from pid %s on host %s, which is gone", directory, holder["pid"], holder["host"])
    os.ftruncate(descriptor, 0)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}).encode("ascii"), 0)


def _granted(descriptor: int, holder: dict[str, Any], state: str) -> bool:
    """Ask the kernel for the lock; where it has none to give, judge by what the file says."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN) and (not holder or state == "dead")
    return True


def _read_holder(descriptor: int) -> dict[str, Any]:
    """Who wrote the lock file; {} when it was released or says nothing usable."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0).decode("utf-8"))
    except ValueError:
        return {}
    usable = isinstance(holder, dict) and {"pid", "host", "since"} <= holder.keys() and isinstance(holder["pid"], int)
    return holder if usable else {}


def _state(holder: dict[str, Any]) -> str:
    if holder["host"] != socket.gethostname():
        return "on another host, cannot be asked from here"
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return "dead"
    except PermissionError:
        return "alive"
    return "alive"
