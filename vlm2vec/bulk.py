"""Encode a corpus of any size into a folder of vectors: resumable at any kill, shared between ranks, in memory that does not grow with it.

    rows of the input -> blocks of rows -> features of each (loader workers) -> windows of features -> embeddings -> shards

A shard is a fixed range of the rows, and what is encoded together depends on the rows alone, so that neither a kill nor the number of
processes changes a byte. While a window is embedded, a thread fetches the next.

Shape letters: N rows of a shard, D embedding.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from vlm2vec import dist, io, log
from vlm2vec.batch import featurize
from vlm2vec.collate import Features
from vlm2vec.data.images import DECODE_VERSION
from vlm2vec.data.items import Corpus, Row, item_of, scan
from vlm2vec.engines.together import ending_together
from vlm2vec.errors import DataError, InputError, NonFiniteError
from vlm2vec.signals import StopSignal
from vlm2vec.transport import read_ahead
from vlm2vec.vectors import FORMAT, KIND, LISTING, Layout, Shard, VectorFolder, shards_of

SHARD_ITEMS = 4096
BLOCK = 16  # rows that a worker takes at a time
WINDOW_ITEMS = 1024  # a window is full with so many items
WINDOW_BYTES = 512 << 20  # or with so many bytes of features
logger = log.get_logger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What became of a row: its features, or the reason why there are none."""

    row: Row  # without its values
    id: str | int
    features: Features | None
    reason: str = ""


def encode_corpus(
    encoder: Any,
    source: str | Path,
    to: str | Path,
    *,
    instruction: str = "",
    precision: str = "float32",
    dims: int | None = None,
    storage: str = "safetensors",
    shard_items: int = SHARD_ITEMS,
    columns: Mapping[str, str] | None = None,
    images: str | Path | None = None,
    skip_bad: bool = False,
    chunk_tokens: int = 32768,
    workers: int = 0,
    progress: bool | None = None,
    stop: StopSignal | None = None,
) -> dict[str, Any]:
    """Encode the items of `source` (see `data.items`) into the folder `to` (see `vectors`); returns the manifest.

    The same call goes on where an earlier one was stopped; shards that are there are not encoded again. Of several ranks, rank r encodes
    the shards r, r + world, ... `skip_bad` leaves out a row that cannot be read, with the reason in skipped.jsonl, where DataError naming
    file and row would end the call. Raises InputError where `to` holds other work, naming the field that differs, RunLockedError while
    another process fills it, EnvError when the disk refuses, NonFiniteError for an embedding that is none, Interrupted once `stop` was
    signalled.
    """
    folder = Path(to)
    with ending_together(), io.run_lock(folder) if dist.is_main() else nullcontext():
        chosen = {"instruction": instruction, "precision": precision, "dims": dims, "storage": storage, "shard_items": shard_items}
        corpus, store = _begin(encoder, Path(source), folder, columns, images, chosen)
        shards = shards_of(len(corpus), shard_items)
        mine = shards[dist.rank() :: dist.world_size()]
        todo = [shard for shard in mine if not store.finished(shard)]
        job = _Job(encoder, corpus, store, instruction, skip_bad, chunk_tokens, workers, stop)
        job.run(todo, sum(shard.items for shard in mine), progress)
        dist.barrier()
        if dist.is_main():
            store.finish(shards, source=str(source), model_path=encoder.source)
    return io.read_json(folder / io.MANIFEST)


@dataclass(frozen=True)
class Estimate:
    """What `encode_corpus` would make."""

    kind: str
    items: int
    shards: int
    dims: int
    bytes: int  # of the rows, without ids


def estimate(
    encoder: Any,
    source: str | Path,
    *,
    precision: str = "float32",
    dims: int | None = None,
    shard_items: int = SHARD_ITEMS,
    columns: Mapping[str, str] | None = None,
) -> Estimate:
    """Count the items of `source`; nothing is encoded, and nothing written but a listing that is removed again."""
    with TemporaryDirectory() as aside:
        corpus = scan(Path(source), Path(aside) / LISTING, columns)
    layout = Layout(_dims(encoder, dims), precision)
    return Estimate(corpus.kind, len(corpus), len(shards_of(len(corpus), shard_items)), layout.dims, len(corpus) * layout.row_bytes)


def _dims(encoder: Any, dims: int | None) -> int:
    whole = int(encoder.backbone.hidden_size)
    if dims is not None and not 1 <= dims <= whole:
        raise InputError(f"dims: expected 1 to {whole}, the size of the model's embeddings, got {dims}")
    return dims or whole


# -- what is to be done ------------------------------------------------------------------------------------------------------------------


def _begin(
    encoder: Any, source: Path, folder: Path, columns: Mapping[str, str] | None, images: str | Path | None, chosen: dict[str, Any]
) -> tuple[Corpus, VectorFolder]:
    """Scan the input and write or check the plan on the main rank, and tell the others."""
    made: list[Any] = []
    with dist.agreeing():
        if dist.is_main():
            layout = Layout(_dims(encoder, chosen["dims"]), chosen["precision"], chosen["storage"])
            corpus = _scan(source, folder, columns, images)
            found = {"kind": corpus.kind, "items": len(corpus), "digest": corpus.digest}
            given = {"columns": corpus.columns, "images": str(images) if images else None}
            model = {"fingerprint": encoder.fingerprint(), "decode": DECODE_VERSION}
            plan = {"format": FORMAT, "kind": KIND, "model": model, "input": {**found, **given}, **chosen, "dims": layout.dims}
            VectorFolder(folder, plan).begin()
            made = [corpus.to_json(), plan]
    stored, plan = dist.gather_objects(made)[0]
    return Corpus.from_json(stored), VectorFolder(folder, plan)


def _scan(source: Path, folder: Path, columns: Mapping[str, str] | None, images: str | Path | None) -> Corpus:
    """Scan with a listing that takes its name once it is whole; the name is not part of the digest."""
    aside = folder / f".{LISTING}.tmp"
    corpus = scan(source, aside, columns, Path(images) if images else None)
    if corpus.kind != "pictures":
        return corpus
    if corpus.ignored:
        logger.info("%s: %s files that are no pictures are left alone", source, f"{corpus.ignored:,}")
    return replace(corpus, files=[str(aside.replace(folder / LISTING))])


# -- doing it ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    encoder: Any
    corpus: Corpus
    store: VectorFolder
    instruction: str
    skip_bad: bool
    chunk_tokens: int
    workers: int
    stop: StopSignal | None

    def run(self, todo: Sequence[Shard], items: int, progress: bool | None) -> None:
        """Encode and publish the shards of this rank; `items` counts those of finished ones too."""
        done = items - sum(shard.items for shard in todo)
        started, share = time.monotonic(), f" (rank 0 of {dist.world_size()})" if dist.world_size() > 1 else ""
        with log.progress(items, f"encoding{share}", "item", initial=done, enabled=progress) as bar:
            windows = ahead(windows_of(todo, self.outcomes(todo)))
            for count, (shard, group) in enumerate(groupby(windows, key=itemgetter(0)), start=1):
                ids: list[str | int] = []
                skipped: list[dict[str, Any]] = []
                rows = [np.empty((0, self.encoder.backbone.hidden_size), np.float32)]
                for _, window in group:
                    kept = [outcome for outcome in window if outcome.features is not None]
                    skipped += [self.skip(outcome) for outcome in window if outcome.features is None]
                    ids += [outcome.id for outcome in kept]
                    rows.append(self.embed(kept))
                    bar.update(len(window))
                    if self.stop is not None and self.stop.requested:
                        raise self.stop.interrupted(f"stopped in {shard.name}; run the same command to go on, from the last whole shard")
                self.store.put(shard, ids, np.concatenate(rows), skipped)
                left = (time.monotonic() - started) / count * (len(todo) - count)
                logger.info("%s: %d items, %d of %d shards, about %.0f s left", shard.name, len(ids), count, len(todo), left)

    def outcomes(self, todo: Sequence[Shard]) -> Iterator[Outcome]:
        """What becomes of the rows of the shards, in order; `workers` processes decode and tokenize ahead, across shards."""
        rows = self.corpus.read([range(shard.first, shard.first + shard.items) for shard in todo])
        featurizer = _Featurizer(self.encoder.processor, Path(self.corpus.images), self.instruction)
        blocks = read_ahead(featurizer, blocks_of(rows), self.workers)  # starts the processes here, not in a thread
        return (outcome for block in blocks for outcome in block)

    def skip(self, outcome: Outcome) -> dict[str, Any]:
        """The line that says why an item is left out. Raises DataError unless that is wanted."""
        if not self.skip_bad:
            raise DataError(f"{outcome.reason}; repair it, or leave such items out with skip_bad (--skip-bad)")
        return {"row": outcome.row.number, "id": outcome.id, "reason": outcome.reason}

    def embed(self, kept: Sequence[Outcome]) -> NDArray[np.float32]:
        features = [outcome.features for outcome in kept if outcome.features is not None]
        return embed_window(self.encoder, features, [outcome.row for outcome in kept], self.chunk_tokens)


class _Featurizer(torch.utils.data.Dataset):
    """A block of rows as outcomes; the sampler of the loader gives the rows themselves, so that only one process reads the files."""

    def __init__(self, processor: Any, images: Path, instruction: str) -> None:
        self.processor, self.images, self.instruction = processor, images, instruction

    def __getitem__(self, rows: Sequence[Row]) -> list[Outcome]:
        return [self.outcome(row) for row in rows]

    def outcome(self, row: Row) -> Outcome:
        light = replace(row, values={})
        try:
            return Outcome(light, row.id, featurize(self.processor, item_of(row, self.images, self.instruction)))
        except DataError as error:
            return Outcome(light, row.id, None, str(error))


Given = TypeVar("Given")


def blocks_of(rows: Iterator[Given]) -> Iterator[list[Given]]:
    """Consecutive rows, BLOCK at a time: what a worker takes."""
    while block := list(islice(rows, BLOCK)):
        yield block


def embed_window(encoder: Any, features: Sequence[Features], rows: Sequence[Row], chunk_tokens: int) -> NDArray[np.float32]:
    """Embeddings (N, D) of the N items of a window, made of `rows`. Raises NonFiniteError that says between which rows."""
    if not features:
        return np.empty((0, encoder.backbone.hidden_size), np.float32)
    try:
        return np.asarray(encoder.embed_features(features, chunk_tokens), dtype=np.float32)
    except NonFiniteError as error:
        raise NonFiniteError(f"between {rows[0].place} and {rows[-1].place}: {error}") from None


class Featured(Protocol):
    """What came of a row: its features, or None."""

    @property
    def features(self) -> Features | None: ...


Came = TypeVar("Came", bound=Featured)


def windows_of(shards: Iterable[Shard], outcomes: Iterator[Came]) -> Iterator[tuple[Shard, list[Came]]]:
    """The outcomes of each shard in windows of at most WINDOW_ITEMS, fewer where their features are large.

    Raises DataError if there are fewer than the scan counted.
    """
    for shard in shards:
        window: list[Came] = []
        size = count = 0
        for outcome in islice(outcomes, shard.items):
            window.append(outcome)
            count, size = count + 1, size + (outcome.features.nbytes if outcome.features is not None else 0)
            if len(window) == WINDOW_ITEMS or size >= WINDOW_BYTES:
                yield shard, window
                window, size = [], 0
        if count < shard.items:
            raise DataError(f"the input ended {shard.items - count} rows early: it changed while it was read; run the same command again")
        if window:
            yield shard, window


def ahead(values: Iterator[Any]) -> Iterator[Any]:
    """The same values, of which a thread fetches the next while the last is in use."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, values, end)
        while (value := coming.result()) is not end:
            coming = thread.submit(next, values, end)
            yield value
