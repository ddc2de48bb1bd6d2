"""From a suite on disk to sets that are ready to be encoded: everything is read and every picture looked at before the first forward.

What comes out is canonical. Items are known by their content (prompt and picture bytes, never a path), queries and candidates are sorted by
it, and copies of an item are one item: neither the order of the rows nor the place of the files can reach a score.

Shape letters: Q queries, N distinct targets of a set, M candidates of one query.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from vlm2vec.cache import EmbeddingCache, content_digest
from vlm2vec.data.images import content_key, load_image
from vlm2vec.data.mmeb import read_eval
from vlm2vec.data.types import ImageRef, Item
from vlm2vec.errors import DataError, ImageError
from vlm2vec.io import digest, sha256_bytes
from vlm2vec.suite import SetSpec, Suite

IMAGES = "eval_images"  # folder of the evaluation sets' pictures, below the data root
THREADS = min(8, os.cpu_count() or 1)
Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class Task:
    """One set in canonical form.

    Queries and targets are content digests; `candidates[q]` (M_q,) indexes `targets`, each target once, the gold first, the rest ascending.
    `listed` is how many candidates a query has in the data, copies included (the median).
    """

    spec: SetSpec
    queries: list[str]
    targets: list[str]
    candidates: list[NDArray[np.int64]]
    listed: int

    @cached_property
    def digest(self) -> str:
        """sha256 over all that is scored: every query with its gold and its other candidates, picture bytes included."""
        rows = [[query, sha256_bytes(members.tobytes())] for query, members in zip(self.queries, self.candidates, strict=True)]
        return digest([self.targets, rows])

    @property
    def chance(self) -> float:
        """Expected precision@1 of distinct candidates in random order."""
        return float(np.mean([1 / len(members) for members in self.candidates]))


@dataclass(frozen=True)
class Intake:
    """The sets that can be scored, one item per content digest, and for each set that cannot be scored what is wrong with it."""

    tasks: list[Task]
    items: dict[str, Item]
    problems: dict[str, list[str]]


def take_in(suite: Suite, cache: EmbeddingCache, limit: int | None = None, seed: int = 17) -> Intake:
    """Read all sets of `suite` and open every picture that is still to be encoded (one in the cache was opened when it was encoded).

    `limit` keeps that many queries of each set, chosen by a hash of `seed` and what they say; their candidates stay whole.
    Raises DataError if the data folder is not there.
    """
    if not suite.root.is_dir():
        raise DataError(f"suite {suite.name}: data folder {suite.root} does not exist; get the data or give their folder as root")
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
            tasks.append(rows.canonical(contents))
            _collect(rows.items(), contents, items)
    return Intake(tasks, items, problems)


@dataclass(frozen=True, eq=False)
class _Rows:
    """The chosen rows of one set as the reader gives them: `members[q]` indexes `candidates`, of which only the used ones are kept."""

    spec: SetSpec
    queries: list[Item]
    candidates: dict[int, Item]
    members: list[NDArray[np.int32]]
    listed: int

    def items(self) -> Iterator[Item]:
        yield from self.queries
        yield from self.candidates.values()

    def canonical(self, contents: Mapping[str, str]) -> Task:
        targets = sorted({contents[item.key] for item in self.candidates.values()})
        position = {content: index for index, content in enumerate(targets)}
        place = np.zeros(max(self.candidates) + 1, dtype=np.int64)
        for index, item in self.candidates.items():
            place[index] = position[contents[item.key]]
        members = [_gold_first(place[row]) for row in self.members]
        queries = [contents[item.key] for item in self.queries]
        order = sorted(range(len(queries)), key=lambda row: (queries[row], members[row].tolist()))
        return Task(self.spec, [queries[row] for row in order], targets, [members[row] for row in order], self.listed)


def _gold_first(members: NDArray[np.int64]) -> NDArray[np.int64]:
    """Distinct entries: the first one, which is the gold, then the others ascending."""
    others = np.unique(members)
    return np.concatenate([members[:1], others[others != members[0]]])


def _read(spec: SetSpec, root: Path, limit: int | None, seed: int, problems: dict[str, list[str]]) -> _Rows | None:
    """One set, or None with the reason noted in `problems`."""
    try:
        data = read_eval(root, spec.name, spec.path, root / IMAGES)
        local_QM = data.candidates_QM or [np.arange(len(data.candidates), dtype=np.int32)] * len(data.queries)
        listed = int(np.median([len(row) for row in local_QM]))
        if (len(data.queries), listed) != (spec.queries, spec.candidates):
            wanted = f"the suite says {spec.queries} and {spec.candidates}; another version of the data?"
            raise DataError(f"{root / spec.path}: {len(data.queries)} queries and {listed} candidates (median), {wanted}")
    except DataError as error:
        problems[spec.name] = [str(error)]
        return None
    golds = [data.candidates[row[0]] for row in data.relevant_QR]
    said = [digest([seed, spec.name, _says(query, root), _says(gold, root)]) for query, gold in zip(data.queries, golds, strict=True)]
    chosen = sorted(range(len(said)), key=lambda row: said[row])[:limit]
    members = [local_QM[row] for row in chosen]
    used = np.unique(np.concatenate(members)).tolist()
    return _Rows(spec, [data.queries[row] for row in chosen], {index: data.candidates[index] for index in used}, members, listed)


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
    """`look` at every picture, in threads: what it gave and, for pictures that cannot be read, why."""
    values: dict[str, Value] = {}
    errors: dict[str, str] = {}

    def one(key: str) -> None:
        try:
            values[key] = look(images[key])
        except ImageError as error:
            errors[key] = str(error)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(one, images))
    return values, errors


def _content(item: Item, pictures: Mapping[str, str]) -> str:
    """Content digest; of no use for an item with a missing picture, whose set is refused."""
    return content_digest(item, [pictures.get(image.key, "missing") for image in item.images])


def _unreadable(sets: Iterable[_Rows], contents: Mapping[str, str], pictures: Mapping[str, str], cache: EmbeddingCache) -> dict[str, str]:
    """Why a picture cannot be decoded, by image key; every distinct picture of an item that is not in the cache is tried once."""
    keys = {contents[item.key]: cache.key(contents[item.key]) for rows in sets for item in rows.items()}
    fresh = set(cache.missing(list(keys.values())))
    items = [item for rows in sets for item in rows.items() if keys[contents[item.key]] in fresh]
    tried = [image for item in items for image in item.images if image.key in pictures]
    _, errors = _each(_decodes, {pictures[image.key]: image for image in reversed(tried)})
    return {image.key: errors[pictures[image.key]] for image in tried if pictures[image.key] in errors}


def _decodes(image: ImageRef) -> None:
    load_image(image)


def _collect(found: Iterable[Item], contents: Mapping[str, str], items: dict[str, Item]) -> None:
    """Keep one item per content: of copies the one whose pictures come first by path, whatever the order of the rows."""
    for item in found:
        kept = items.setdefault(contents[item.key], item)
        if [str(image.source) for image in item.images] < [str(image.source) for image in kept.images]:
            items[contents[item.key]] = item
