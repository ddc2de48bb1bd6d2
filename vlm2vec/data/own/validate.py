"""Everything that is wrong with files of one's own pairs, and what they hold, in one pass over them.

Rows are read here and looked at in other processes, a chunk at a time; what is kept of a row is counts and, on disk, 16 bytes for each of
its keys, so that memory does not grow with the rows.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from vlm2vec.data.images import load_image
from vlm2vec.data.own.records import CHUNK, Chunk, chunks, count_rows, place
from vlm2vec.data.own.report import Found, Report, statistics
from vlm2vec.data.own.schema import Picture, Problem, Row, Side, fingerprint, picture_key, read_row, side_key
from vlm2vec.data.own.sightings import Seen
from vlm2vec.data.readers import split_of
from vlm2vec.data.types import ImageRef
from vlm2vec.errors import DataError, EnvError, ImageError, PathError
from vlm2vec.io import safe_join
from vlm2vec.log import progress

KEPT = 1000  # examples kept of a kind; the count is always whole
SAMPLE = 2000  # texts of a side whose tokens are counted
_REMEMBERED = 1 << 16  # pictures whose state a process keeps
_AHEAD = 4  # chunks in flight for each process
_ROW_BITS = 40  # of a place; above them stands the number of the file
Tokens = Callable[[list[str]], list[int]]


@dataclass
class Part:
    """What a chunk brought: problems, counts, keys with the lines they stand on, and some texts by side."""

    rows: int = 0
    problems: list[tuple[int, Problem]] = field(default_factory=list)
    counts: dict[str, Counter[Any]] = field(default_factory=lambda: defaultdict(Counter))
    keys: dict[str, list[tuple[str, int]]] = field(default_factory=lambda: defaultdict(list))
    texts: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def validate(
    files: Sequence[Path], root: Path | None = None, pictures: bool = True, workers: int | None = None, tokens: Tokens | None = None
) -> Report:
    """Look at every row of `files` and, with `pictures`, decode every picture they name, which lie below `root` (None: each file's folder).

    `workers` processes look (None: one a core). `tokens` counts those of texts. Files whose names say another split (`train.jsonl`,
    `eval.jsonl`) must not share a group. What is found is no error here; raises DataError for a file that is no file of rows at all.
    """
    total = sum(map(count_rows, files))
    look = _Look(root, pictures, tokens is not None)
    with Seen() as seen, progress(total, "checking rows", "row") as bar:
        sums = _Sums(files, seen)
        for number, part in _looked(look, files, total, workers):
            sums.add(number, part)
            bar.update(part.rows)
        if tokens:
            for side, sample in sums.texts.items():
                sums.counts[f"{side} tokens"].update(tokens(sample))
        shared = _Shared(seen, sums.files, [split_of(file.name) for file in files])
        for kind, example in chain(shared.repeated_ids(), shared.leaks()):
            sums.note(kind, example)
        return Report(tuple(sums.files), pictures, sums.problems, statistics(sums.counts, shared.distinct()))


class _Sums:
    """What all parts brought so far."""

    def __init__(self, files: Sequence[Path], seen: Seen) -> None:
        self.files, self._seen = [str(file) for file in files], seen
        self.problems: dict[str, Found] = {}
        self.counts: dict[str, Counter[Any]] = defaultdict(Counter)
        self.texts: dict[str, list[str]] = defaultdict(list)

    def note(self, kind: str, example: str) -> None:
        self.problems.setdefault(kind, Found()).add(example, KEPT)

    def add(self, number: int, part: Part) -> None:
        """A part of file `number`."""
        self.counts["rows"][self.files[number]] += part.rows
        for line, problem in part.problems:
            self.note(problem.kind, f"{place(self.files[number], line)}: {problem}")
        for name, counter in part.counts.items():
            self.counts[name].update(counter)
        for kind, found in part.keys.items():
            self._seen.add(kind, ((key, number << _ROW_BITS | line) for key, line in found))
        for side, texts in part.texts.items():
            self.texts[side] += texts[: SAMPLE - len(self.texts[side])]


# -- a chunk, in any process -------------------------------------------------------------------------------------------------------------


class _Look:
    """Looks at the rows of chunks. Remembers pictures, so that most are decoded once in each process."""

    def __init__(self, root: Path | None, pictures: bool, texts: bool) -> None:
        self.root, self.pictures, self.texts = root, pictures, texts
        self._states: dict[tuple[Path, str], Problem | tuple[int, int]] = {}

    def __call__(self, chunk: Chunk) -> Part:
        part = Part(len(chunk))
        for number, values in chunk.records():
            if isinstance(values, str):
                part.problems.append((number, Problem("unreadable row", "", values)))
                continue
            row, problems = read_row(values)
            part.problems += [(number, problem) for problem in problems]
            if row is not None:
                self._count(row, number, part)
                part.problems += [(number, problem) for problem in self._look_at(row, chunk, number, part)]
        return part

    def _count(self, row: Row, number: int, part: Part) -> None:
        keys = {"query": side_key(row.query), "positive": fingerprint(map(side_key, row.positives))}
        keys["row"] = fingerprint([*keys.values(), *map(side_key, row.negatives)])
        named = {"id": row.id, "group": row.group}
        keys |= {name: fingerprint([text]) for name, text in named.items() if text}
        for kind, key in keys.items():
            part.keys[kind].append((key, number))
        part.counts["positives of a row"][len(row.positives)] += 1
        part.counts["negatives of a row"][len(row.negatives)] += 1
        part.counts["rows with"].update(name for name, text in named.items() if text)
        if row.score != 1.0:
            part.counts["rows with"]["score"] += 1
        for key, side in row.sides():
            self._count_side(key.partition("[")[0], side, part)

    def _count_side(self, name: str, side: Side, part: Part) -> None:
        pictures = len(side["image"])
        kinds = ["text"] * bool(side["text"].strip()) + ["several images" if pictures > 1 else "image"] * bool(pictures)
        part.counts[f"{name} holds"][" + ".join(kinds)] += 1
        if side["instruction"]:
            part.counts["instructed"][name] += 1
        if side["text"]:
            part.counts[f"{name} characters"][len(side["text"])] += 1
            if self.texts:
                part.texts[name].append(side["text"])

    def _look_at(self, row: Row, chunk: Chunk, number: int, part: Part) -> Iterator[Problem]:
        root = self.root or Path(chunk.file).parent
        for key, side in row.sides():
            for picture in side["image"]:
                part.keys["picture"].append((fingerprint([str(root), picture_key(picture)]), number))
                if not key.startswith("negatives"):
                    part.keys["shown"].append(part.keys["picture"][-1])
                state = self._state(root, picture) if self.pictures else (0, 0)
                if isinstance(state, Problem):
                    yield state._replace(key=key)
                elif self.pictures:
                    part.counts["picture width"][state[0]] += 1
                    part.counts["picture height"][state[1]] += 1

    def _state(self, root: Path, picture: Picture) -> Problem | tuple[int, int]:
        """Width and height of a picture, or what is wrong with it."""
        if picture["bytes"]:
            return _decoded(ImageRef(picture["bytes"], f"image {picture['path'] or 'bytes'!r}"))
        known = (root, picture["path"])
        if known not in self._states:
            if len(self._states) >= _REMEMBERED:
                self._states.clear()
            self._states[known] = _found(*known)
        return self._states[known]


def _found(root: Path, path: str) -> Problem | tuple[int, int]:
    try:
        file = safe_join(root, path)
    except PathError as error:
        return Problem("path outside the root", "", f"image {path!r}: {error}")
    if not file.exists():
        return Problem("missing picture", "", f"image {path!r}: no such file below {root}")
    return _decoded(ImageRef(file, f"image {path!r}"))


def _decoded(image: ImageRef) -> Problem | tuple[int, int]:
    try:
        return load_image(image).size
    except (ImageError, EnvError) as error:
        return Problem("unreadable picture", "", str(error))


# -- all chunks --------------------------------------------------------------------------------------------------------------------------

_look: _Look  # of this process, where it is a worker


def _start(look: _Look) -> None:
    global _look
    _look = look


def _work(chunk: Chunk) -> Part:
    return _look(chunk)


def _looked(look: _Look, files: Sequence[Path], total: int, workers: int | None) -> Iterator[tuple[int, Part]]:
    """(number of the file, what was found) for every chunk, in order. A few rows are not worth a process."""
    numbered = ((number, chunk) for number, file in enumerate(files) for chunk in chunks(file))
    workers = min(workers or os.cpu_count() or 1, -(-total // CHUNK))
    if workers <= 1:
        yield from ((number, look(chunk)) for number, chunk in numbered)
        return
    # Forked where that is safe: a fresh interpreter would run an unguarded script of the user's again.
    context = multiprocessing.get_context("fork") if sys.platform == "linux" else None
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(look,)) as pool:
        yield from _in_order(pool, numbered, _AHEAD * workers)


def _in_order(pool: ProcessPoolExecutor, numbered: Iterable[tuple[int, Chunk]], ahead: int) -> Iterator[tuple[int, Part]]:
    """At most `ahead` chunks are read before they are looked at."""
    waiting: deque[tuple[int, Future[Part]]] = deque()
    for number, chunk in numbered:
        waiting.append((number, pool.submit(_work, chunk)))
        if len(waiting) >= ahead:
            done, future = waiting.popleft()
            yield done, future.result()
    yield from ((number, future.result()) for number, future in waiting)


# -- what rows have in common ------------------------------------------------------------------------------------------------------------


class _Shared:
    """What the keys of all rows tell together."""

    def __init__(self, seen: Seen, files: Sequence[str], splits: Sequence[str]) -> None:
        self.seen, self.files = seen, files
        names = sorted(set(splits))
        self.split_of_file = np.array([names.index(split) for split in splits])

    def _called(self, where: int) -> str:
        return place(self.files[where >> _ROW_BITS], where & ((1 << _ROW_BITS) - 1))

    def repeated_ids(self) -> Iterator[tuple[str, str]]:
        """Every use of an id after its first."""
        for place_S, starts in self.seen.grouped("id"):
            again = np.ones(len(place_S), dtype=bool)
            again[starts] = False
            first = np.repeat(starts, np.diff(starts, append=len(place_S)))
            for index in np.flatnonzero(again).tolist():
                where = self._called(int(place_S[index]))
                yield "duplicate id", f"{where}: id: was used before, at {self._called(int(place_S[first[index]]))}"

    def leaks(self) -> Iterator[tuple[str, str]]:
        """Groups, and pictures of queries or positives, that two splits share."""
        for kind, what in (("group", "group in two splits"), ("shown", "picture in two splits")):
            for place_S, starts in self.seen.grouped(kind):
                split_S = self.split_of_file[(place_S >> np.uint64(_ROW_BITS)).astype(np.int64)]
                low, high = np.minimum.reduceat(split_S, starts), np.maximum.reduceat(split_S, starts)
                for index in np.flatnonzero(low != high).tolist():
                    first = int(starts[index])
                    other = first + int(np.argmax(split_S[first:] != split_S[first]))
                    shared = "its group" if kind == "group" else "a picture of its query or positive"
                    yield what, f"{self._called(int(place_S[other]))}: {shared} is also in {self._called(int(place_S[first]))}"

    def distinct(self) -> dict[str, tuple[int, int, str]]:
        """By kind: how many different keys there are, the most rows on one of them, and the first of those rows."""
        found = {}
        for kind in ("id", "group", "row", "query", "positive", "picture"):
            number, most, where = 0, 0, ""
            for place_S, starts in self.seen.grouped(kind):
                sizes = np.diff(starts, append=len(place_S))
                number += len(starts)
                if sizes.max() > most:
                    most, where = int(sizes.max()), self._called(int(place_S[starts[np.argmax(sizes)]]))
            found[kind] = (number, most, where)
        return found


def require_files(files: Sequence[Path]) -> None:
    """DataError for a file that is not there, or that is no JSONL or parquet file."""
    for file in files:
        if not file.is_file() or file.suffix not in (".jsonl", ".parquet"):
            raise DataError(f"{file}: {'expected a .jsonl or .parquet file' if file.exists() else 'not found'}")
