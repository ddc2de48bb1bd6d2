"""The record of a data folder: at which commit each repository stands, what it lists there, and which archives were unpacked.

With it a complete folder is known to be complete without a network, and what a killed run had finished is not done again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm2vec import io
from vlm2vec.data import hub
from vlm2vec.data.archives import Unpacked
from vlm2vec.data.hub import RemoteFile
from vlm2vec.errors import DataError
from vlm2vec.log import get_logger

FOLDER = ".fetch"
FILE = "state.json"
FORMAT = 1
KINDS = (".parquet", ".jsonl", ".zip", ".tar.gz")  # files worth listing

_logger = get_logger(__name__)


@dataclass
class Ledger:
    """The content of `.fetch/state.json` in a data folder.

    `sources`: repository -> {requested, commit, files: {path: [bytes, checksum]}}. `archives`: "repository:path" -> {checksum, sets (null:
    all), folders: {folder below the data folder: files that the archive put there}}.
    """

    file: Path
    sources: dict[str, dict[str, Any]]
    archives: dict[str, dict[str, Any]]

    @classmethod
    def load(cls, folder: Path) -> Ledger:
        """Raises DataError for a record that another version wrote or that is damaged."""
        file = folder / FOLDER / FILE
        if not file.exists():
            return cls(file, {}, {})
        found = io.read_json(file)
        if not isinstance(found, dict) or found.get("format") != FORMAT or not {"sources", "archives"} <= found.keys():
            raise DataError(f"{file}: not a record of this version (format {FORMAT}); delete it, and what is there is checked anew")
        return cls(file, found["sources"], found["archives"])

    def save(self) -> None:
        io.write_json(self.file, {"format": FORMAT, "sources": self.sources, "archives": self.archives})

    def files(self, repository: str) -> list[RemoteFile]:
        source = self.sources[repository]
        return [RemoteFile(repository, source["commit"], path, size, checksum) for path, (size, checksum) in source["files"].items()]

    def locate(self, repository: str, revision: str | None) -> None:
        """Make sure that the files of `repository` are listed; the Hub is asked only about a revision that is not on record."""
        known = self.sources.get(repository)
        if known and revision in (None, known["commit"]):
            return
        requested = revision or "main"
        commit = hub.commit_of(repository, requested)
        _logger.info("%s: revision %s is commit %s", repository, requested, commit)
        if known and known["commit"] == commit:
            return
        listed = {file.path: [file.bytes, file.checksum] for file in hub.list_files(repository, commit) if file.path.endswith(KINDS)}
        self.sources[repository] = {"requested": requested, "commit": commit, "files": listed}

    def holds(self, archive: RemoteFile, folder: Path, sets: Sequence[str] | None) -> bool:
        """Whether `archive` was unpacked for `sets` (None: for all) and as many files as it gave still lie there."""
        record = self.archives.get(_key(archive))
        if record is None or record["checksum"] != archive.checksum:
            return False
        enough = record["sets"] is None or (sets is not None and set(sets) <= set(record["sets"]))
        return enough and all(_count(folder / place) >= count for place, count in record["folders"].items())

    def archive(self, archive: RemoteFile) -> dict[str, Any]:
        """The record of an archive that was unpacked."""
        return self.archives[_key(archive)]

    def remember(self, archive: RemoteFile, into: str, sets: Sequence[str] | None, made: Unpacked) -> None:
        """Write down that `archive` was unpacked, together with what it gave for other sets before."""
        folders = {f"{into}/{place}": count for place, count in made.folders.items()}
        names = None if sets is None else list(sets)
        earlier = self.archives.get(_key(archive))
        if names is not None and earlier and earlier["checksum"] == archive.checksum and earlier["sets"] is not None:
            names = sorted({*earlier["sets"], *names})
            folders = {place: max(folders.get(place, 0), earlier["folders"].get(place, 0)) for place in {**earlier["folders"], **folders}}
        self.archives[_key(archive)] = {"checksum": archive.checksum, "sets": names, "folders": folders}
        self.save()


def _key(file: RemoteFile) -> str:
    return f"{file.repository}:{file.path}"


def _count(folder: Path) -> int:
    try:
        with os.scandir(folder) as entries:
            return sum(entry.is_file() for entry in entries)
    except OSError:
        return 0
