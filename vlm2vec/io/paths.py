"""Joining a path from a dataset to a folder so that it cannot leave the folder."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from vlm2vec.errors import PathError

LONGEST = 4096  # characters
_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFCHR: "device", stat.S_IFBLK: "device", stat.S_IFSOCK: "socket"}


def safe_join(root: Path, relative: str) -> Path:
    """The real path of `relative` below `root`; it need not exist, but if it does it is a regular file. Opens nothing.

    Raises PathError when the path is absolute, has a drive, a `..` part, a NUL or over 4096 characters, leaves `root` through a symbolic
    link, or names a folder, device, pipe or socket.
    """
    reason = _refused_text(relative)
    if not reason:
        real_root = os.path.realpath(root)
        real = os.path.realpath(os.path.join(real_root, relative))
        inside = os.path.commonpath([real_root, real]) == real_root
        reason = not_a_file(real) if inside else "a symbolic link points outside"
    if reason:
        shown = relative if len(relative) <= 120 else relative[:117] + "..."
        raise PathError(f"path leaves root: {shown!r}: {reason} (root: {root})")
    return Path(real)


def not_a_file(path: str | Path) -> str:
    """Why what exists cannot be read as a file, or ""; also "" when nothing is there, about which the reader knows best what to say."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return ""
    except OSError as error:
        return str(error.strerror)
    return "" if stat.S_ISREG(mode) else f"not a regular file but a {_KINDS.get(stat.S_IFMT(mode), 'special file')}"


def _refused_text(relative: str) -> str:
    """Why the text alone is refused, or ""."""
    if "\0" in relative:
        return "holds a NUL character"
    if len(relative) > LONGEST:
        return f"{len(relative)} characters, at most {LONGEST}"
    if relative.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", relative):
        return "absolute path"
    if ".." in re.split(r"[/\\]", relative):
        return "holds a '..' part"
    try:
        os.fsencode(relative)
    except UnicodeEncodeError:
        return "cannot be encoded as a file name"
    return ""


def cache_folder() -> Path:
    """Where what is made once and used again is kept: VLM2VEC_CACHE, or ~/.cache/vlm2vec."""
    return Path(os.environ.get("VLM2VEC_CACHE") or "~/.cache/vlm2vec").expanduser()
