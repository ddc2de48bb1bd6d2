"""Search by meaning over one's own items: `build_index` makes an index of pictures, JSONL or parquet, `Index` answers queries.

    index = Index.open("pictures.index")
    encoder = index.load_encoder()
    for hit in index.search(index.embed(encoder, ["a red car"]), top=10)[0]:
        print(hit.score, hit.id, hit.images)

An index is a `store`: exact search reads all rows, approximate search the lists of `approximate`. An `Index` may be used by several threads
at once and takes in what `build_index` made meanwhile.

Shape letters: Q queries, N rows, D numbers of a row.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from vlm2vec import approximate, dist, io, log, store
from vlm2vec.batch import featurize
from vlm2vec.bulk import blocks_of, embed_window, windows_of
from vlm2vec.cache import content_digest
from vlm2vec.collate import Features
from vlm2vec.data.images import content_key, load_image
from vlm2vec.data.items import Corpus, Row, item_of, scan
from vlm2vec.data.types import ImageRef, Item
from vlm2vec.errors import DataError, InputError
from vlm2vec.io import digest
from vlm2vec.nearest import Best, nearest
from vlm2vec.quantize import truncate
from vlm2vec.report.thumbnails import LEVELS, shrunk, webp
from vlm2vec.signals import StopSignal
from vlm2vec.store import Entry, Writer
from vlm2vec.transport import read_ahead
from vlm2vec.vectors import LISTING, Shard

KIND = "vlm2vec index"
SKIPPED = "skipped.jsonl"
MOST = 10_000  # results of a query


# -- searching ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hit:
    """An item that was found. `images` are paths; a picture that lay inside a parquet file is `thumbnail`, a small WebP.

    `place` is where its row lies, by which `Index.at` finds the item again, and nothing once that row has moved or is gone.
    """

    score: float
    id: str | int
    number: int
    text: str
    instruction: str
    images: tuple[Path, ...]
    thumbnail: bytes | None = None
    place: str = ""


@dataclass(frozen=True)
class _View:
    """What one version of an index looks like: its settings, its rows, and which of them are no item's any more."""

    meta: dict[str, Any]
    rows_ND: NDArray[np.float32]
    dead_N: NDArray[np.bool_] | None
    lists: Any = None


class Index:
    """A finished index. Raises InputError, or ManifestError for a damaged one, EnvError where the storage fails."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / store.DATABASE).is_file():
            there = "holds no index; make one with vlm2vec index" if self.folder.is_dir() else "not found"
            raise InputError(f"{self.folder} {there}")
        self._lock = Lock()
        self._seen: _View | None = None
        with store.connected(self.folder) as connection, store.transaction(connection, "deferred"):
            self._view(connection)

    @classmethod
    def open(cls, folder: str | Path) -> Index:
        """The index in a folder."""
        return cls(folder)

    def _view(self, connection: sqlite3.Connection, lists: bool = False) -> _View:
        """The index as the transaction of `connection` sees it."""
        meta = store.read_meta(connection, self.folder)
        if not meta["version"]:
            raise InputError(f"{self.folder} is not finished: run the same vlm2vec index again")
        with self._lock:
            view = self._seen
            if view is None or any(view.meta[key] != meta[key] for key in ("numbering", "version")):
                view = _View(meta, store.matrix(self.folder, meta, meta["rows"]), _mask(meta["dead"], meta["rows"]))
            if lists and view.lists is None:
                view = replace(view, lists=approximate.opened(self.folder / meta["approximate"]["file"], meta["dims"], meta["rows"]))
            self._seen = view
        return view

    @property
    def meta(self) -> dict[str, Any]:
        """Its settings: the model and how to load it, the instruction, the input, the numbers of items and rows."""
        assert self._seen is not None
        return self._seen.meta

    def __len__(self) -> int:
        return int(self.meta["items"])

    def load_encoder(self, path: str | None = None, device: Any = None) -> Any:
        """The encoder that the index was made with, from `path` if it has moved. Raises InputError where that is another one."""
        from vlm2vec.encoder import Encoder

        loading = self.meta["loading"]
        options = {"device": device, "revision": None if path else loading["revision"], **loading["options"]}
        encoder = Encoder.from_pretrained(path or loading["path"], loading["adapter"], **options)
        encoder.precision = loading["precision"]
        self.check(encoder)
        return encoder

    def check(self, encoder: Any) -> None:
        """Raise InputError unless `encoder` is what the index was made with: scores across models mean nothing."""
        if encoder.fingerprint() != self.meta["fingerprint"]:
            raise InputError(
                f"{self.folder} was made with {self.meta['loading']['path']}, and {encoder.source} is another model, or has changed since: "
                "search with the one it was made with, or make an index with this one"
            )

    def embed(self, encoder: Any, items: Sequence[Any], instruction: str | None = None) -> NDArray[np.float32]:
        """Rows (Q, D) of queries, each a text, a PIL image or a dict as `Encoder.encode` takes; by default with the model's instruction."""
        chosen = encoder.query_instruction if instruction is None else instruction
        return truncate(np.asarray(encoder.encode(items, instruction=chosen)), self.meta["dims"], "query")

    def search(self, query_QD: ArrayLike, top: int = 10, approximately: bool = False) -> list[list[Hit]]:
        """The `top` nearest items of every query, best first; items of equal content have equal scores and stand in the order of the input.

        Exact unless `approximately`, which needs an index that was made for it. Raises InputError for no query, rows of another size and a
        `top` outside 1 to 10,000, NonFiniteError for damaged rows.
        """
        rows_QD = self._checked(query_QD, top)
        with store.connected(self.folder) as connection, store.transaction(connection, "deferred"):
            if approximately and not store.read_meta(connection, self.folder).get("approximate"):
                raise InputError(f"{self.folder} has no lists for approximate search; make them with vlm2vec index --approximate")
            view = self._view(connection, approximately)
            return [self._hits(connection, view, best, top) for best in self._best(view, rows_QD, top, approximately)]

    def _checked(self, query_QD: ArrayLike, top: int) -> NDArray[np.float32]:
        rows_QD = np.ascontiguousarray(query_QD, dtype=np.float32)
        if rows_QD.ndim != 2 or not len(rows_QD) or rows_QD.shape[1] != self.meta["dims"]:
            raise InputError(f"expected one query at least, as rows of {self.meta['dims']} numbers, got shape {rows_QD.shape}")
        if not 1 <= top <= MOST:
            raise InputError(f"top: expected 1 to {MOST:,}, got {top:,}")
        return rows_QD

    def _best(self, view: _View, rows_QD: NDArray[np.float32], top: int, approximately: bool) -> list[Best]:
        if not approximately:
            return nearest(view.rows_ND, rows_QD, top, view.dead_N)
        with self._lock:  # the number of probes is set on the lists
            return approximate.search(view.lists, view.rows_ND, rows_QD, top, view.meta["approximate"]["probes"])

    def at(self, place: str) -> tuple[Hit, NDArray[np.float32]] | None:
        """The first item whose row lies at the `place` of a hit, and that row (D,); None where there is none any more."""
        numbering, _, row = place.rpartition("-")
        with store.connected(self.folder) as connection, store.transaction(connection, "deferred"):
            view = self._view(connection)
            if numbering != view.meta["numbering"] or not re.fullmatch("[0-9]{1,12}", row) or int(row) >= len(view.rows_ND):
                return None
            found = self._items(connection, view, int(row), 1.0, 1)
            return (found[0], np.array(view.rows_ND[int(row)])) if found else None

    def sample(self, count: int) -> list[Hit]:
        """At most `count` items, from all over the index."""
        with store.connected(self.folder) as connection, store.transaction(connection, "deferred"):
            view = self._view(connection)
            rows = np.unique(np.linspace(0, max(0, len(view.rows_ND) - 1), count, dtype=np.int64))
            return [hit for row in rows.tolist() for hit in self._items(connection, view, row, 0.0, 1)]

    def _hits(self, connection: sqlite3.Connection, view: _View, best: Best, top: int) -> list[Hit]:
        hits: list[Hit] = []
        for row, score in zip(best[0].tolist(), best[1].tolist(), strict=True):
            hits += self._items(connection, view, row, score, top - len(hits))
        return hits

    def _items(self, connection: sqlite3.Connection, view: _View, row: int, score: float, most: int) -> list[Hit]:
        """The first `most` items that have a row."""
        query = """select id, number, text, instruction, images, webp from vectors
            join items using (key) left join pictures using (key) where row = ? order by number limit ?"""
        root, place = Path(view.meta["root"]), f"{view.meta['numbering']}-{row}"
        try:
            return [
                Hit(score, json.loads(id), number, text, instruction, tuple(root / path for path in json.loads(images)), webp, place)
                for id, number, text, instruction, images, webp in connection.execute(query, (row, most))
            ]
        except (ValueError, TypeError) as error:
            raise store.damaged(self.folder, f"an item of row {row}: {error}") from None


def _mask(dead: Sequence[int], rows: int) -> NDArray[np.bool_] | None:
    if not dead:
        return None
    dead_N = np.zeros(rows, dtype=bool)
    dead_N[dead] = True
    return dead_N


# -- making ------------------------------------------------------------------------------------------------------------------------------


def build_index(
    encoder: Any,
    source: str | Path,
    to: str | Path,
    *,
    instruction: str | None = None,
    dims: int | None = None,
    columns: Mapping[str, str] | None = None,
    images: str | Path | None = None,
    skip_bad: bool = False,
    approximately: bool = False,
    loading: Mapping[str, Any] | None = None,
    chunk_tokens: int = 32768,
    workers: int = 0,
    progress: bool | None = None,
    stop: StopSignal | None = None,
) -> dict[str, Any]:
    """Make the folder `to` the index of the items of `source` (see `data.items`); returns what was made.

    The same call goes on after a kill, and later takes in what is new or changed and forgets what is gone: contents that are known are not
    encoded again. Items are encoded with `instruction`, by default the target instruction of the model, where they bring none. `loading`
    says how to load the encoder again: path, revision, adapter, options, precision. `skip_bad` leaves out an item that cannot be read,
    listed in skipped.jsonl, where DataError naming file and row would end the call. `approximately` makes the lists for approximate search.
    Raises InputError where `to` holds something else and on one of several ranks, RunLockedError while another process fills it, EnvError
    when the disk refuses, NonFiniteError for an embedding that is none, Interrupted once `stop` was signalled.
    """
    check_alone()
    folder = Path(to)
    if approximately:
        approximate.faiss()  # better missing before hours of encoding than after
    given = {"path": encoder.source, "revision": None, "adapter": None, "options": {}, "precision": encoder.precision, **(loading or {})}
    default = encoder.target_instruction if instruction is None else instruction
    with TemporaryDirectory() as aside, io.run_lock(folder):
        corpus = scan(Path(source), Path(aside) / LISTING, columns, Path(images) if images else None)
        store.create(folder, _fixed(encoder, Path(source), corpus, dims))
        with store.connected(folder) as connection:
            job = _Job(encoder, corpus, Writer(folder, connection), default, skip_bad, chunk_tokens, workers, stop)
            made = job.run(progress)
            changed = made["added"] or made["changed"] or made["removed"]
            kept = None if changed else job.writer.meta.get("approximate")
            job.writer.finish(items=made["items"], instruction=default, loading=given, approximate=kept)
            if approximately and not kept:
                job.writer.publish(approximate=_lists(folder, connection, progress))
            job.writer.tidy()
            return {**made, **store.read_meta(connection, folder)}


def check_alone() -> None:
    """Raise InputError on one of several ranks, which would all fill the same folder."""
    if dist.world_size() > 1:
        raise InputError(f"one process makes an index, and this is one of {dist.world_size()}: start vlm2vec index without a launcher")


def _fixed(encoder: Any, source: Path, corpus: Corpus, dims: int | None) -> dict[str, Any]:
    """What stays the same over the runs that fill one folder."""
    whole = int(encoder.backbone.hidden_size)
    if dims is not None and not 1 <= dims <= whole:
        raise InputError(f"dims: expected 1 to {whole}, the size of the model's embeddings, got {dims}")
    places = {"source": str(source.absolute()), "root": str(Path(corpus.images).absolute()), "columns": corpus.columns}
    return {"kind": KIND, "fingerprint": encoder.fingerprint(), "dims": dims or whole, **places}


def _lists(folder: Path, connection: sqlite3.Connection, progress: bool | None) -> dict[str, Any] | None:
    """Make the lists for approximate search beside the rows; returns what is to be known of them. An empty index has none."""
    meta = store.read_meta(connection, folder)
    name = f"lists-{meta['version']}.faiss"
    rows_ND, dead_N = store.matrix(folder, meta, meta["rows"]), _mask(meta["dead"], meta["rows"])
    if not meta["items"]:
        return None
    return {"file": name, **approximate.build(rows_ND, folder / name, np.zeros(len(rows_ND), bool) if dead_N is None else dead_N, progress)}


@dataclass(frozen=True)
class _Task:
    """A row on its way: what is kept of it, or why it cannot be, and the item if it has to be encoded."""

    row: Row  # without its values
    id: str | int
    entry: Entry | None = None
    item: Item | None = None
    reason: str = ""


@dataclass(frozen=True)
class _Outcome:
    """A task with the features of its item, and small copies of the pictures that have no file."""

    task: _Task
    features: Features | None = None
    thumbnail: bytes | None = None
    reason: str = ""


class _Featurizer(torch.utils.data.Dataset):
    """A block of tasks as outcomes; the sampler of the loader gives the tasks themselves."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __getitem__(self, tasks: Sequence[_Task]) -> list[_Outcome]:
        return [self.outcome(task) for task in tasks]

    def outcome(self, task: _Task) -> _Outcome:
        if task.item is None:
            return _Outcome(task, reason=task.reason)
        try:
            features = featurize(self.processor, task.item)
            return _Outcome(replace(task, item=None), features, _thumbnail(task.item))
        except DataError as error:
            return _Outcome(replace(task, item=None), reason=str(error))


def _thumbnail(item: Item) -> bytes | None:
    """A small copy of the first picture where that is no file, which search could not show otherwise."""
    if not item.images or isinstance(item.images[0].source, Path):
        return None
    return webp(shrunk(load_image(item.images[0]), LEVELS[0][0]), LEVELS[0][1])


@dataclass(frozen=True)
class _Job:
    encoder: Any
    corpus: Corpus
    writer: Writer
    instruction: str
    skip_bad: bool
    chunk_tokens: int
    workers: int
    stop: StopSignal | None
    bad: dict[bytes, str] = field(default_factory=dict)  # contents that cannot be encoded, and why
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def run(self, progress: bool | None) -> dict[str, int]:
        """Bring every row into the store, window by window; returns the counts."""
        encoded = 0
        with log.progress(len(self.corpus), "indexing", "item", enabled=progress) as bar:
            for _, window in windows_of([Shard("index", 0, len(self.corpus))], self.outcomes()):
                encoded += self.keep(window)
                bar.update(len(window))
                if self.stop is not None and self.stop.requested:
                    raise self.stop.interrupted("stopped between two windows of items; run the same command to go on")
        io.rewrite_jsonl(self.writer.folder / SKIPPED, self.skipped)
        return {**self.writer.changes(), "encoded": encoded, "skipped": len(self.skipped)}

    def outcomes(self) -> Iterator[_Outcome]:
        tasks = self.tasks(self.corpus.read([range(len(self.corpus))]))
        blocks = read_ahead(_Featurizer(self.encoder.processor), blocks_of(tasks), self.workers)
        return (outcome for block in blocks for outcome in block)

    def tasks(self, rows: Iterator[Row]) -> Iterator[_Task]:
        """What is to be done for each row: its item is left out where its content is known, or comes before it in this run."""
        coming: set[bytes] = set()
        for row in rows:
            light = replace(row, values={})
            try:
                item = item_of(row, Path(self.corpus.images), self.instruction)
                stamp = _stamp(item)
                key = self.writer.known(row.id, stamp) or bytes.fromhex(content_digest(item, list(map(content_key, item.images))))
            except DataError as error:
                yield _Task(light, row.id, reason=str(error))
                continue
            new = key not in coming and not self.writer.has(key)
            if new:
                coming.add(key)
            names = tuple(_name(ref, Path(self.corpus.images)) for ref in item.images if isinstance(ref.source, Path))
            entry = Entry(row.id, row.number, key, stamp, item.text, item.instruction, names)
            yield _Task(light, row.id, entry, item if new else None)

    def keep(self, window: Sequence[_Outcome]) -> int:
        """Encode what is new and put the window into the store; returns how many items were encoded."""
        fresh = [outcome for outcome in window if outcome.features is not None]
        entries = [entry for outcome in window if (entry := self.sound(outcome)) is not None]
        pictures = [(_key(outcome), outcome.thumbnail) for outcome in fresh if outcome.thumbnail]
        repeated = self.writer.put(entries, list(map(_key, fresh)), self.embed(fresh), pictures)
        places = {outcome.task.row.number: outcome.task.row for outcome in window} if repeated else {}
        for entry in repeated:
            self.skip(places[entry.number], entry.id, f"{places[entry.number].place}: an earlier item has the id {entry.id!r} too")
        return len(fresh)

    def sound(self, outcome: _Outcome) -> Entry | None:
        """The entry of an item that can be kept, after one of the same content that could not be none either."""
        entry = outcome.task.entry
        reason = outcome.reason or (self.bad.get(entry.key, "") if entry else "")
        if not reason:
            return entry
        if entry is not None:
            self.bad[entry.key] = reason
        self.skip(outcome.task.row, outcome.task.id, reason)
        return None

    def skip(self, row: Row, id: str | int, reason: str) -> None:
        """Note that an item is left out. Raises DataError unless that is wanted."""
        if not self.skip_bad:
            raise DataError(f"{reason}; repair it, or leave such items out with skip_bad (--skip-bad)")
        self.skipped.append({"row": row.number, "id": id, "reason": reason})

    def embed(self, fresh: Sequence[_Outcome]) -> NDArray[np.float32]:
        """(N, D) float32 rows of the new items, at the length of the index."""
        if not fresh:
            return np.empty((0, self.writer.meta["dims"]), np.float32)
        features = [each.features for each in fresh if each.features is not None]
        rows_ND = embed_window(self.encoder, features, [each.task.row for each in fresh], self.chunk_tokens)
        return truncate(rows_ND, self.writer.meta["dims"])


def _key(outcome: _Outcome) -> bytes:
    assert outcome.task.entry is not None  # a task without one has no item to encode
    return outcome.task.entry.key


def _name(ref: ImageRef, root: Path) -> str:
    """The path of a picture below the folder of pictures; links may have led elsewhere inside it."""
    assert isinstance(ref.source, Path)
    return os.path.relpath(ref.source, os.path.realpath(root))


def _stamp(item: Item) -> str:
    """A digest that stays the same as long as nobody touched the item: its words, and what the system knows of its pictures.

    The time of the last change of a file's state cannot be set by hand, so that no content changes behind the same stamp.
    """
    return digest([item.text, item.instruction, *map(_state, item.images)])


def _state(ref: ImageRef) -> list[Any]:
    if not isinstance(ref.source, Path):
        return [ref.key]
    try:
        state = os.stat(ref.source)
    except OSError:
        return [str(ref.source), "missing"]  # reading it says what is wrong
    return [str(ref.source), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
