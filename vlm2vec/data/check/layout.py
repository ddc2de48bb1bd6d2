"""Which folders and files of a data folder belong to which set, what is missing or has another name, and what else lies there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlm2vec.data.archives import is_junk
from vlm2vec.data.check.report import Example, Finding, finding
from vlm2vec.data.readers import find_files
from vlm2vec.errors import DataError
from vlm2vec.strict_yaml import nearest
from vlm2vec.suite import SetSpec, Suite, TrainSpec

SPLITS = {"eval": ("test",), "train": ("original", "diverse_instruction", "train")}
EVAL_IMAGES = "eval_images"
ARCHIVES = (".zip", ".tar.gz", ".tgz", ".tar")
DEPTH = 2  # folders below the data folder in which archives are looked for
SHOWN = 8  # names in a note


@dataclass(frozen=True)
class Place:
    """Where a set lies: `files` of its rows, `pictures` the folder that their paths start from; or the `problem` that it does not.

    `label` is the name, with the split if there are several; `rows`, `rounded` and `candidates` are what the suite says.
    """

    name: str
    label: str
    side: str
    folder: Path
    pictures: Path
    rows: int
    rounded: int = 1
    candidates: int | None = None
    files: tuple[Path, ...] = ()
    problem: Finding | None = None


def find(folder: Path, suite: Suite) -> list[Place]:
    """The places of all sets of the sides that the folder holds. Raises DataError if it holds none."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; fetch it with `vlm2vec data get`")
    specs: dict[str, Sequence[SetSpec | TrainSpec]] = {"eval": suite.sets, "train": suite.train}
    parents = {(folder / spec.path).parent for side in specs.values() for spec in side}
    below = [child for parent in sorted(parents) if parent.is_dir() for child in sorted(parent.iterdir()) if child.is_dir()]
    holding = {side: [child for child in below if any(_has(child, split) for split in splits)] for side, splits in SPLITS.items()}
    if not any(holding.values()):
        here = ", ".join(sorted(child.name for child in folder.iterdir())[:SHOWN]) or "nothing"
        wanted = "no <SET>/test*.parquet and no <SET>/original*.parquet"
        raise DataError(f"{folder}: neither evaluation nor training data of {suite.name}: {wanted}; it holds {here}")
    places: list[Place] = []
    for side, children in holding.items():
        expected = {folder / spec.path for spec in specs[side]}
        strangers = [child for child in children if child not in expected]
        places += [place for spec in specs[side] if children for place in _places(folder, spec, side, strangers)]
    return places


def _has(folder: Path, split: str) -> bool:
    return any(next(folder.glob(f"{split}{end}"), None) for end in (".parquet", "-*.parquet", ".jsonl", "-*.jsonl"))


def _places(root: Path, spec: SetSpec | TrainSpec, side: str, strangers: Sequence[Path]) -> Iterator[Place]:
    """One place for each split that is there, or one that says that none is."""
    folder = root / spec.path
    if isinstance(spec, SetSpec):
        place = Place(spec.name, spec.name, side, folder, root / EVAL_IMAGES, spec.queries, candidates=spec.candidates)
    else:
        place = Place(spec.name, spec.name, side, folder, folder.parent, spec.rows, spec.rounded)
    splits = [split for split in SPLITS[side] if folder.is_dir() and _has(folder, split)]
    if not splits:
        yield replace(place, problem=_missing(folder, side, strangers))
    for split in splits:
        named = place if len(splits) == 1 else replace(place, label=f"{spec.name} ({split})")
        try:
            yield replace(named, files=tuple(find_files(root, spec.path, split)))
        except DataError as error:
            yield replace(named, problem=finding("corrupt", [Example(str(error))])[0])


def _missing(folder: Path, side: str, strangers: Sequence[Path]) -> Finding:
    """A set whose folder or split is not there: missing, or there under another name."""
    splits = " or ".join(f"{split}-*.parquet" for split in SPLITS[side])
    if folder.is_dir():
        here = sorted(child.name for child in folder.iterdir() if not is_junk(child.name))
        kind = "misnamed" if any(name.endswith((".parquet", ".jsonl")) for name in here) else "missing"
        held = ", ".join(here[:SHOWN]) or "nothing"
        return finding(kind, [Example(f"holds {held}, but no {splits}", path=folder.name)])[0]
    plain = {_plain(child.name): child.name for child in strangers}
    near = plain.get(_plain(folder.name)) or nearest(folder.name, [child.name for child in strangers])
    if near:
        return finding("misnamed", [Example(f"not there, but {near} is: rename it", path=folder.name)])[0]
    return finding("missing", [Example("no such folder; fetch it with `vlm2vec data get`", path=folder.name)])[0]


def _plain(name: str) -> str:
    """A name without case, hyphens and underscores: ImageNet-1K and ImageNet_1K are alike."""
    return re.sub(r"[-_ ]", "", name).casefold()


# -- what else lies there ----------------------------------------------------------------------------------------------------------------


def notes(folder: Path, places: Sequence[Place], complete: bool) -> Iterator[str]:
    """Remarks on what is in the folder besides sets and pictures; `complete` tells whether every picture is there."""
    archives = sorted(path.relative_to(folder).as_posix() for path in _archives(folder, DEPTH))
    if archives:
        what = "everything in them is in place, they may be deleted" if complete else "still packed? `vlm2vec data get` unpacks them"
        yield f"{len(archives)} archives ({_listing(archives)}): {what}"
    roots = dict.fromkeys([folder, *(place.folder for place in places), *(place.pictures for place in places)])
    junk = [entry.path for root in roots if root.is_dir() for entry in os.scandir(root) if is_junk(entry.name)]
    if junk:
        yield f"{len(junk)} files that macOS or Windows left ({_listing([os.path.relpath(path, folder) for path in junk])}): harmless"


def _archives(folder: Path, depth: int) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and depth > 1 and not entry.name.startswith("."):
                yield from _archives(Path(entry.path), depth - 1)
            elif entry.name.endswith(ARCHIVES) and entry.is_file() and not is_junk(entry.name):
                yield Path(entry.path)


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
