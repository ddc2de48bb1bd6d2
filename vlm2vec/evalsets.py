"""From a suite on disk to sets that are ready to be encoded: everything is read and every picture looked at before the first forward.

What comes out is canonical. Items are known by their content (prompt and picture bytes, never a path) and queries are sorted by it, so
that neither the order of the rows nor the place of the files can reach a score.

Shape letters: Q queries, N targets of a set, M candidates of one query, R relevant ones among them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from vlm2vec import dist
from vlm2vec.cache import EmbeddingCache, content_digest
from vlm2vec.data.images import content_key, load_image
from vlm2vec.data.mmeb import read_set
from vlm2vec.data.types import EvalSet, ImageRef, Item
from vlm2vec.errors import DataError, ImageError
from vlm2vec.io import digest, sha256_bytes
from vlm2vec.suite import SetSpec, Suite

IMAGES = "eval_images"  # folder of the evaluation sets' pictures, below the data root
THREADS = min(8, os.cpu_count() or 1)
Identity = Literal["content", "name"]
Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class Task:
    """One set in canonical form.

    Queries and targets are content digests; `rows[q]` is the row of the data that query q comes from. `candidates[q]` (M_q,) indexes
    `targets` in the order of the data, each target once; None means all targets. `relevant[q]` (R_q,) are those that count as right, with
    their `grades[q]`. `listed` is how many candidates a query has in the data, copies included (the median).
    """

    spec: SetSpec
    queries: list[str]
    rows: list[int]
    targets: list[str]
    candidates: list[NDArray[np.int32]] | None
    relevant: list[NDArray[np.int32]]
    grades: list[NDArray[np.float32]]
    listed: int

    @cached_property
    def digest(self) -> str:
        """sha256 over all that is scored: every query with its candidates and the right ones among them, picture bytes included."""
        rows = []
        for index, query in enumerate(self.queries):
            members = b"" if self.candidates is None else np.sort(self.candidates[index]).tobytes()
            order = np.argsort(self.relevant[index])
            right = self.relevant[index][order].tobytes() + self.grades[index][order].tobytes()
            rows.append([query, sha256_bytes(members), sha256_bytes(right)])
        return digest([self.targets, rows])

    @property
    def chance(self) -> float:
        """Expected precision@1 of distinct candidates in random order."""
        counts = [len(self.targets)] * len(self.queries) if self.candidates is None else [len(row) for row in self.candidates]
        return float(np.mean([len(right) / count for right, count in zip(self.relevant, counts, strict=True)]))


@dataclass(frozen=True)
class Intake:
    """The sets that can be scored, one item per content digest, and for each set that cannot be scored what is wrong with it."""

    tasks: list[Task]
    items: dict[str, Item]
    problems: dict[str, list[str]]


def take_in(
    suite: Suite, cache: EmbeddingCache | None = None, limit: int | None = None, seed: int = 17, identity: Identity = "content"
) -> Intake:
    """Read all sets of `suite` and open every picture that is still to be encoded (one in the cache was opened when it was encoded).

    `limit` keeps that many queries of each set, chosen by a hash of `seed` and what they say; their candidates stay whole. `identity` says
    when two candidates are one: equal content, or equal text and path. Several ranks share the reading of pictures. Raises DataError if
    the data folder is not there.
    """
    require_data(suite)
    problems: dict[str, list[str]] = {}
    sets = [rows for spec in suite.sets if (rows := _read(spec, suite.root, limit, seed, problems))]
    pictures, broken = _each(content_key, {image.key: image for rows in sets for item in rows.items() for image in item.images})
    contents = {item.key: _content(item, pictures) for rows in sets for item in rows.items()}
    broken |= _unreadable(sets, contents, pictures, cache)
    items: dict[str, Item] = {}
    tasks = []
    for rows in sets:
        found = dict.fromkeys(broken[image.key] for item in rows.items() for image in item.images if image.key in broken)
        if found:
            problems[rows.spec.name] = list(found)
        else:
            tasks.append(rows.canonical(contents, suite.root, identity))
            _collect(rows.items(), contents, items)
    return Intake(tasks, items, problems)


def require_data(suite: Suite) -> None:
    """Raise DataError if the data folder of the suite is not there, saying how to get it."""
    if not suite.root.is_dir():
        how = f"run {suite.get}" if suite.get else "get the data"
        raise DataError(f"suite {suite.name}: data folder {suite.root} does not exist; {how}, or give the folder as root")


@dataclass(frozen=True, eq=False)
class _Rows:
    """The chosen rows of one set as the reader gives them; of the candidates only those `used` (ascending) are kept."""

    spec: SetSpec
    data: EvalSet
    chosen: list[int]
    used: list[int]
    listed: int

    def items(self) -> Iterator[Item]:
        yield from (self.data.queries[row] for row in self.chosen)
        yield from (self.data.candidates[index] for index in self.used)

    def canonical(self, contents: Mapping[str, str], root: Path, identity: Identity) -> Task:
        keys = [self._key(self.data.candidates[index], contents, root, identity) for index in self.used]
        distinct = list(dict.fromkeys(keys))
        if identity == "content" or self.data.candidates_QM is not None:  # else the order of the corpus decides ties
            distinct.sort()
        position = {key: place for place, key in enumerate(distinct)}
        place_N = np.zeros(len(self.data.candidates), dtype=np.int32)
        place_N[self.used] = [position[key] for key in keys]
        members = None if self.data.candidates_QM is None else [_first_seen(place_N[self.data.candidates_QM[row]]) for row in self.chosen]
        right = [_merged(place_N[self.data.relevant_QR[row]], self.data.grades_QR[row]) for row in self.chosen]
        queries = [contents[self.data.queries[row].key] for row in self.chosen]
        order = sorted(range(len(queries)), key=lambda index: (queries[index], right[index][0].tolist(), _sorted_list(members, index)))
        return Task(
            self.spec,
            [queries[index] for index in order],
            [self.chosen[index] for index in order],
            [key[0] for key in distinct],
            members and [members[index] for index in order],
            [right[index][0] for index in order],
            [right[index][1] for index in order],
            self.listed,
        )

    def _key(self, item: Item, contents: Mapping[str, str], root: Path, identity: Identity) -> tuple[str, ...]:
        """What tells candidates apart; its first part is always the content."""
        return (contents[item.key],) if identity == "content" else (contents[item.key], *_says(item, root))


def _first_seen(members: NDArray[np.int32]) -> NDArray[np.int32]:
    """The distinct entries in the order of their first occurrence."""
    _, first = np.unique(members, return_index=True)
    return members[np.sort(first)]


def _merged(relevant: NDArray[np.int32], grades: NDArray[np.float32]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Distinct relevant targets ascending, each with its best grade."""
    distinct, inverse = np.unique(relevant, return_inverse=True)
    best = np.zeros(len(distinct), dtype=np.float32)
    np.maximum.at(best, inverse, grades)
    return distinct, best


def _sorted_list(members: list[NDArray[np.int32]] | None, index: int) -> list[int]:
    return [] if members is None else np.sort(members[index]).tolist()


def _read(spec: SetSpec, root: Path, limit: int | None, seed: int, problems: dict[str, list[str]]) -> _Rows | None:
    """One set, or None with the reason noted in `problems`."""
    try:
        data = read_set(root, spec, root / IMAGES)
        listed = (
            len(data.candidates) + data.duplicates
            if data.candidates_QM is None
            else int(np.median([len(row) for row in data.candidates_QM]))
        )
        if spec.queries and (len(data.queries), listed) != (spec.queries, spec.candidates):
            wanted = f"the suite says {spec.queries} and {spec.candidates}; another version of the data?"
            raise DataError(f"{root / spec.path}: {len(data.queries)} queries and {listed} candidates (median), {wanted}")
    except DataError as error:
        problems[spec.name] = [str(error)]
        return None
    chosen = list(range(len(data.queries)))
    if limit is not None:
        golds = [sorted(_says(data.candidates[index], root) for index in row) for row in data.relevant_QR]
        said = [digest([seed, spec.name, _says(query, root), gold]) for query, gold in zip(data.queries, golds, strict=True)]
        chosen = sorted(chosen, key=lambda row: said[row])[:limit]
    if data.candidates_QM is None:
        return _Rows(spec, data, chosen, list(range(len(data.candidates))), listed)
    return _Rows(spec, data, chosen, np.unique(np.concatenate([data.candidates_QM[row] for row in chosen])).tolist(), listed)


def _says(item: Item, root: Path) -> list[str]:
    """An item as its row has it, wherever the data lie; known without opening a picture."""
    return [item.instruction, item.text, *(picture_name(image, root) or "" for image in item.images)]


def picture_name(image: ImageRef, root: Path) -> str | None:
    """Path of a picture relative to `root`, with forward slashes; the whole path if it lies elsewhere, None if it is no file."""
    if not isinstance(image.source, Path):
        return None
    # readers give resolved paths, and root may be a link
    bases = [base for base in (root, root.resolve()) if image.source.is_relative_to(base)]
    return (image.source.relative_to(bases[0]) if bases else image.source).as_posix()


def _each(look: Callable[[ImageRef], Value], images: Mapping[str, ImageRef]) -> tuple[dict[str, Value], dict[str, str]]:
    """`look` at every picture, in threads and shared between ranks: what it gave and, for pictures that cannot be read, why."""
    values: dict[str, Value] = {}
    errors: dict[str, str] = {}

    def one(key: str) -> None:
        try:
            values[key] = look(images[key])
        except ImageError as error:
            errors[key] = str(error)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(one, list(images)[dist.rank() :: dist.world_size()]))
    shares = dist.gather_objects([values, errors])
    return {key: found[0][key] for found in shares for key in found[0]}, {key: found[1][key] for found in shares for key in found[1]}


def _content(item: Item, pictures: Mapping[str, str]) -> str:
    """Content digest; of no use for an item with a missing picture, whose set is refused."""
    return content_digest(item, [pictures.get(image.key, "missing") for image in item.images])


def _unreadable(
    sets: Iterable[_Rows], contents: Mapping[str, str], pictures: Mapping[str, str], cache: EmbeddingCache | None
) -> dict[str, str]:
    """Why a picture cannot be decoded, by image key; every distinct picture of an item that is not in the cache is tried once."""
    items = [item for rows in sets for item in rows.items()]
    if cache is not None:
        keys = {contents[item.key]: cache.key(contents[item.key]) for item in items}
        fresh = set(cache.missing(list(keys.values())))
        items = [item for item in items if keys[contents[item.key]] in fresh]
    tried = [image for item in items for image in item.images if image.key in pictures]
    _, errors = _each(_decodes, {pictures[image.key]: image for image in reversed(tried)})
    return {image.key: errors[pictures[image.key]] for image in tried if pictures[image.key] in errors}


def _decodes(image: ImageRef) -> None:
    load_image(image)


def _collect(found: Iterable[Item], contents: Mapping[str, str], items: dict[str, Item]) -> None:
    """Keep one item per content: of copies the one whose pictures come first by path, whatever the order of the rows."""
    for item in found:
        kept = items.setdefault(contents[item.key], item)
        if _paths(item) < _paths(kept):
            items[contents[item.key]] = item


def _paths(item: Item) -> list[str]:
    return [str(image.source) for image in item.images]
