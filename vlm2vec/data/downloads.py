"""What can be fetched: `benchmarks/mmeb/downloads.yaml` says which repositories, files and archives make up each dataset."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from vlm2vec.errors import DataError, RecipeError
from vlm2vec.strict_yaml import build, nearest, parse
from vlm2vec.suite import Origin, load_suite

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "mmeb" / "downloads.yaml"


@dataclass(frozen=True, kw_only=True)
class RowsSpec:
    """Files of rows: `files` is their path in the repository with {set}, {split} and *; `into` the folder they go to, below the target."""

    repository: str
    files: str
    splits: tuple[str, ...]
    into: str = ""
    known: str


@dataclass(frozen=True, kw_only=True)
class PicturesKnown:
    """Where the facts about an archive come from: names of entries of `sources`."""

    place: str
    unpacked: str


@dataclass(frozen=True, kw_only=True)
class PicturesSpec:
    """Archives of pictures: one per set when `file` holds {set}, else one for all sets.

    They are unpacked into the folder `into`, below the target; the content of a top folder `strip` moves up. `unpacked` estimates how many
    times larger the pictures are than their archive.
    """

    repository: str
    file: str
    into: str
    strip: str = ""
    unpacked: float
    known: PicturesKnown

    @property
    def per_set(self) -> bool:
        return "{set}" in self.file


@dataclass(frozen=True, kw_only=True)
class Download:
    """One dataset that `vlm2vec data get` knows. `side` says which sets of `suite` it holds; `next` is what to run once it is there."""

    name: str
    text: str
    suite: str
    side: Literal["eval", "train"]
    to: str
    rows: RowsSpec
    pictures: PicturesSpec
    next: str = ""

    def sets(self) -> dict[str, str]:
        """The sets by name, each with its folder, in the suite's order."""
        suite = load_suite(self.suite)
        return {spec.name: spec.path for spec in (suite.sets if self.side == "eval" else suite.train)}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """An archive as it was when the sheet was written."""

    repository: str
    file: str
    gigabytes: float
    sha256: str | None = None
    known: str


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """What `downloads.yaml` may hold."""

    sources: tuple[Origin, ...]
    downloads: tuple[Download, ...]
    seen: tuple[Seen, ...] = ()

    def find(self, name: str) -> Download:
        """Raises DataError for a name that the sheet does not have."""
        for download in self.downloads:
            if download.name == name:
                return download
        known = ["mini", *(download.name for download in self.downloads)]
        near = nearest(name, known)
        raise DataError(f"no dataset {name!r}{f'; did you mean {near}?' if near else ''} (there are: {', '.join(known)})")


@cache
def load_sheet(file: Path = FILE) -> Sheet:
    """Read a sheet of downloads. Raises DataError naming the file and the line."""
    try:
        return build(Sheet, parse(file.read_bytes(), str(file)))
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    except RecipeError as error:
        raise DataError(str(error)) from None
