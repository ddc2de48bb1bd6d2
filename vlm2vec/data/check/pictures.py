"""Pictures that rows name: are they there, under that very name, and do they look like pictures?

A folder is listed once, whatever the number of its files; a file is opened for its first bytes, or decoded when that is asked for.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from vlm2vec import io
from vlm2vec.data.check.report import Example, Finding, finding
from vlm2vec.data.images import load_image, sniff
from vlm2vec.data.types import ImageRef
from vlm2vec.errors import EnvError, ImageError, PathError

BATCH = 256  # files that a thread takes at a time

Named = tuple[str, int]  # path below the root, first row that names it


class Pictures:
    """The pictures below `root`. Not safe for use by several threads; it makes its own."""

    def __init__(self, root: Path, decode: bool, workers: int) -> None:
        self._root, self._decode, self._workers = root, decode, workers
        self._folders: dict[str, _Folder] = {}

    def look(self, path_P: Sequence[str], row_P: NDArray[np.int64]) -> tuple[int, list[Finding]]:
        """How many of the pictures are fine, and what is wrong with the others."""
        problems: dict[str, list[Example]] = {"missing pictures": [], "misnamed pictures": []}
        there: list[Named] = []
        for path, row in zip(path_P, row_P.tolist(), strict=True):
            kind, text = self._absent(path)
            if kind:
                problems.setdefault(kind, []).append(Example(text, row, path))
            else:
                there.append((path, row))
        bad = list(self._opened(there))
        for kind, example in bad:
            problems.setdefault(kind, []).append(example)
        return len(there) - len(bad), [found for kind, examples in problems.items() for found in finding(kind, examples)]

    def _absent(self, path: str) -> tuple[str, str]:
        """Why a picture cannot even be opened, as (kind, text), or two empty texts."""
        folder, name = posixpath.split(path)
        listed = self._folders.get(folder)
        if listed is None:
            listed = self._folders[folder] = _Folder(self._root, folder)
        if listed.refused or name in ("", ".", ".."):
            return "unsafe paths", listed.refused or "no name of a file"
        entry = listed.names.get(name)
        if entry is None:
            near = listed.nearest(name)
            return ("misnamed pictures", f"not there, but {near} is") if near else ("missing pictures", listed.reason)
        if entry == "file":
            return "", ""
        try:
            return ("", "") if io.safe_join(self._root, path).is_file() else ("missing pictures", "a link to nothing")
        except PathError as error:
            return "unsafe paths", str(error)

    def _opened(self, named: Sequence[Named]) -> Iterator[tuple[str, Example]]:
        batches = [named[start : start + BATCH] for start in range(0, len(named), BATCH)]
        with ThreadPoolExecutor(self._workers) as threads:
            for found in threads.map(self._open_batch, batches):
                yield from found

    def _open_batch(self, batch: Sequence[Named]) -> list[tuple[str, Example]]:
        found = [(path, row, self._problem(path)) for path, row in batch]
        return [(_kind(text), Example(text, row, path)) for path, row, text in found if text]

    def _problem(self, path: str) -> str:
        """What is wrong with a file, or ""."""
        file = self._root / path
        try:
            if self._decode:
                load_image(ImageRef(file, path))
            else:
                sniff(file, path)
        except (ImageError, EnvError) as error:
            return str(error).removeprefix(f"{path}: ")
        return ""


def _kind(text: str) -> str:
    if "file is empty" in text:
        return "empty pictures"
    return "web pages" if "looks like HTML" in text else "unreadable pictures"


class _Folder:
    """The files of one folder: name -> "file", or "other" for links and whatever else. `refused`: why nothing in it may be read."""

    def __init__(self, root: Path, folder: str) -> None:
        self.names: dict[str, str] = {}
        self.refused, self.reason = "", "not there"
        self._alike: dict[str, str] | None = None
        try:
            place = io.safe_join(root, posixpath.join(folder, "x")).parent
        except PathError as error:
            self.refused = str(error)
            return
        try:
            with os.scandir(place) as entries:
                self.names = {entry.name: "file" if entry.is_file(follow_symlinks=False) else "other" for entry in entries}
        except OSError as error:
            self.reason = f"not there: folder {folder or root.name}: {error.strerror}"

    def nearest(self, name: str) -> str | None:
        """A file that differs from `name` in case or extension only."""
        if self._alike is None:
            self._alike = {PurePosixPath(there).stem.casefold(): there for there in self.names}
        return self._alike.get(PurePosixPath(name).stem.casefold())
