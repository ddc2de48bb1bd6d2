"""A benchmark as data: `datasets.yaml` says which sets there are, where they lie and what they hold. Adding a set needs no Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from vlm2vec import metrics
from vlm2vec.data.tiny import TINY_ROOT, tiny_root
from vlm2vec.errors import DataError, InputError, RecipeError
from vlm2vec.io import digest, sha256_bytes
from vlm2vec.strict_yaml import build, nearest, parse

FILE = "datasets.yaml"
MetaTask = Literal["classification", "vqa", "retrieval", "grounding"]
Split = Literal["IND", "OOD"]


@dataclass(frozen=True, kw_only=True)
class Known:
    """Where the facts of a row come from: names of entries of `sources`."""

    counts: str | None = None
    prompts: str | None = None
    distinct: str | None = None


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A source of facts, named by `Known`."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class SetSpec:
    """One evaluation set. `path` is its folder, or a file of one's own data, below the data root; `queries` rows with `candidates`
    candidates each (the median). A suite that is a lone data file knows no counts: they are 0.

    `scope` global: one corpus of `candidates` entries for all queries. `distinct` counts the different candidates of a local set. `query`
    and `target` show how a row reads, {text} standing for its own words and a backslash with n for a newline. `train` is the training set
    it belongs to.
    """

    name: str
    meta_task: MetaTask
    split: Split
    path: str
    query_modality: str
    target_modality: str
    queries: int
    candidates: int
    scope: Literal["local", "global"] = "local"
    metric: str = "precision@1"
    distinct: int | None = None
    query: str = ""
    target: str = ""
    train: str | None = None
    source: str
    licence: str
    note: str = ""
    known: Known = Known()


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """One training set that belongs to the suite; evaluation does not read it.

    `rows` is exact, or rounded to a multiple of `rounded`. `query` and `target` are given where they differ from the evaluation set's.
    """

    name: str
    path: str
    meta_task: MetaTask
    rows: int
    rounded: int = 1
    query: str = ""
    target: str = ""
    known: Known = Known()


@dataclass(frozen=True, kw_only=True)
class _Sheet:
    """What `datasets.yaml` may hold."""

    suite: str
    description: str
    root: str
    sets: tuple[SetSpec, ...]
    train: tuple[TrainSpec, ...] = ()
    sources: tuple[Origin, ...] = ()
    get: str = ""


@dataclass(frozen=True)
class Suite:
    """A benchmark and the folder its data lie in. `digest` is the sha256 of its `datasets.yaml`, `get` the command that brings the data."""

    name: str
    description: str
    root: Path
    sets: tuple[SetSpec, ...]
    train: tuple[TrainSpec, ...]
    digest: str
    get: str = ""

    def only(self, names: Sequence[str]) -> Suite:
        """The same suite reduced to the named sets, in the suite's own order. Raises DataError for a name it does not have."""
        known = [spec.name for spec in self.sets]
        for name in names:
            if name not in known:
                raise DataError(f"suite {self.name} has no set {name!r}{_instead(name, known)}")
        return dataclasses.replace(self, sets=tuple(spec for spec in self.sets if spec.name in names))


def load_suite(name_or_path: str | Path, root: str | Path | None = None) -> Suite:
    """Read a suite by the path of its `datasets.yaml` (or of the folder that holds it) or by its name under `benchmarks/`.

    A path that ends in .jsonl or .parquet is a suite of one set, the rows of that file, which lies below `root` (None: in its folder).

    `benchmarks/` is looked for in the current folder and beside the package. `root` is the folder of the data; None means the one the suite
    names, looked for beside its file, in the current folder and in `data/`. Raises DataError naming the file and the row.
    """
    if is_data_file(name_or_path):
        return _lone(Path(name_or_path), Path(root) if root else None)
    file = suite_file(str(name_or_path))
    data = file.read_bytes()
    try:
        sheet = build(_Sheet, parse(data, str(file)))
    except RecipeError as error:
        raise DataError(str(error)) from None
    for problem in _violations(sheet):
        raise DataError(f"{file}: {problem}")
    return Suite(
        sheet.suite, sheet.description, Path(root or _data_root(file, sheet)), sheet.sets, sheet.train, sha256_bytes(data), sheet.get
    )


def is_data_file(name_or_path: str | Path) -> bool:
    """Whether what should name a suite names a file of rows."""
    return Path(name_or_path).suffix in (".jsonl", ".parquet")


def _lone(file: Path, root: Path | None) -> Suite:
    """The suite of one data file: all its rows against all that they name, scored by precision@1."""
    if not file.is_file():
        raise DataError(f"{file} not found: a suite is a name under benchmarks/, a {FILE}, or a file of pairs")
    root = root or file.parent
    if not file.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{file} must lie below {root}, the root at which the paths of its pictures start")
    spec = SetSpec(
        name=file.stem,
        path=file.resolve().relative_to(root.resolve()).as_posix(),
        scope="global",
        meta_task="retrieval",
        split="IND",
        query_modality="any",
        target_modality="any",
        queries=0,
        candidates=0,
        source="one's own data",
        licence="not stated",
    )
    return Suite(file.stem, f"the pairs of {file.name}", root, (spec,), (), digest(dataclasses.asdict(spec)))


def _data_root(file: Path, sheet: _Sheet) -> Path:
    """The first of the three places that holds the first set; the last one if none does."""
    places = [file.parent / sheet.root, Path(sheet.root), Path("data") / sheet.root]
    return next((place for place in places if (place / sheet.sets[0].path).exists()), places[-1])


def _violations(sheet: _Sheet) -> Iterable[str]:
    if not sheet.sets:
        yield "sets is empty; give at least one set"
    listed: dict[str, Sequence[SetSpec | TrainSpec]] = {"sets": sheet.sets, "train": sheet.train}
    for key, rows in listed.items():
        names = [row.name for row in rows]
        for index, row in enumerate(rows):
            place = f"{key}[{index}] ({row.name})"
            if not row.name.strip() or names.index(row.name) != index:
                yield f"{place}: name is empty or was used before"
            path = PurePosixPath(row.path)
            if not row.path or path.is_absolute() or ".." in path.parts:
                yield f"{place}: path {row.path!r} must be a folder below the data root"
            for fact, origin in dataclasses.asdict(row.known).items():
                if origin is not None and origin not in [source.name for source in sheet.sources]:
                    yield f"{place}: known.{fact} names {origin!r}, which is none of the sources"
    trained = [spec.name for spec in sheet.train]
    for index, spec in enumerate(sheet.sets):
        if spec.train is not None and spec.train not in trained:
            yield f"sets[{index}] ({spec.name}): train names {spec.train!r}, which is no training set"
        try:
            metrics.parse(spec.metric)
        except InputError as error:
            yield f"sets[{index}] ({spec.name}): {error}"
        for count in ("queries", "candidates"):
            if getattr(spec, count) < 1:
                yield f"sets[{index}] ({spec.name}): {count} must be >= 1, got {getattr(spec, count)}"


def suite_file(name: str) -> Path:
    """The `datasets.yaml` meant by a path or a name; `builtin/tiny` is made on the spot."""
    if name == TINY_ROOT:
        return tiny_root(()).parent / FILE
    given = Path(name)
    folders = [Path("benchmarks"), Path(__file__).resolve().parent.parent / "benchmarks"]
    for candidate in (given, given / FILE, *(folder / name / FILE for folder in folders)):
        if candidate.is_file():
            return candidate
    known = sorted({file.parent.name for folder in folders for file in folder.glob(f"*/{FILE}")})
    raise DataError(f"no benchmark suite {name!r}{_instead(name, known)}; a path of a {FILE} is accepted too")


def _instead(name: str, known: Sequence[str]) -> str:
    near = nearest(name, known)
    return (f"; did you mean {near}?" if near else "") + f" (there are: {', '.join(known) or 'none'})"
