"""Items of all requests, embedded together: threads that decode and tokenize, and one that runs the model.

Requests take turns, an item each, so that a short one does not wait for a long one. What is prepared ahead is bounded, and what comes in is
bounded before: `submit` refuses. While the model works on a batch the next one gathers, so that nobody waits for company.

An item's embedding depends on its neighbours by rounding alone (1e-6 in float32), as in `Encoder.encode`; an item that the model cannot
embed fails its own request and no other.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm2vec.batch import featurize
from vlm2vec.collate import Features
from vlm2vec.data.images import Limits as PictureLimits
from vlm2vec.data.types import ImageRef, Item
from vlm2vec.encoder import Encoder
from vlm2vec.errors import NonFiniteError, Vlm2VecError
from vlm2vec.log import get_logger
from vlm2vec.serve.counts import Counts
from vlm2vec.serve.limits import Limits
from vlm2vec.serve.refusal import PATIENCE, Refusal

PROBE = Item("a probe", (ImageRef(Image.new("RGB", (64, 64), "white")),))
AHEAD_BYTES = 256 << 20  # of prepared items; one more for each thread may lie beyond it
logger = get_logger(__name__)


@dataclass(frozen=True)
class Embedded:
    """The answer to a request: unit rows (N, D) float32, and the tokens that were read for them."""

    rows_ND: NDArray[np.float32]
    tokens: int


@dataclass(eq=False)
class Job:
    """The items of a request on their way; `future` ends it, whether by rows, by a refusal or because nobody waits for it any more."""

    items: Sequence[Item]
    names: Sequence[str]
    future: Future[Embedded] = field(default_factory=Future)
    begun: int = 0  # items that were handed to a thread
    tokens: int = 0
    rows: dict[int, NDArray[np.float32]] = field(default_factory=dict)

    def put(self, index: int, row_D: NDArray[np.float32], tokens: int) -> None:
        """Called by the model's thread alone."""
        self.rows[index] = row_D
        self.tokens += tokens
        if len(self.rows) == len(self.items):
            rows_ND = np.stack([self.rows[index] for index in range(len(self.items))])
            with suppress(InvalidStateError):  # cancelled this moment
                self.future.set_result(Embedded(rows_ND, self.tokens))

    def fail(self, index: int, status: int, what: str, code: str | None = None) -> None:
        name = self.names[index]
        with suppress(InvalidStateError):
            self.future.set_exception(Refusal(status, f"{name}: {what}", name, code))


@dataclass(eq=False)
class Piece:
    """An item of a job, prepared."""

    job: Job
    index: int
    features: Features
    nbytes: int


class Batcher:
    """`start` it, `submit` items, `close` it. `healthy` tells whether the model embedded the probe when it was last in doubt."""

    def __init__(self, encoder: Encoder, limits: Limits, counts: Counts, chunk_tokens: int = 32768, threads: int = 2) -> None:
        self.encoder, self.limits, self.counts, self.chunk_tokens = encoder, limits, counts, chunk_tokens
        self.pictures = PictureLimits(pixels=limits.pixels, bytes=limits.body_bytes)
        self.healthy = False
        self.waiting = 0  # items of jobs that are not done
        self._changed = threading.Condition()
        self._turns: deque[Job] = deque()  # jobs with items that no thread has begun
        self._ready: deque[Piece] = deque()
        self._ready_tokens = self._ready_bytes = 0
        self._closed = False
        self._threads = [threading.Thread(target=self._prepare_all, name=f"prepare-{number}", daemon=True) for number in range(threads)]
        self._threads.append(threading.Thread(target=self._embed_all, name="model", daemon=True))
        counts.watch("vlm2vec_waiting_items", "Items of requests that are not answered yet.", lambda: self.waiting)
        counts.watch("vlm2vec_ready_items", "Items that are prepared and wait for the model.", lambda: len(self._ready))

    def start(self) -> None:
        """Embed the probe, then take requests. Raises what the probe raises."""
        self._embed_probe()
        self.healthy = True
        for thread in self._threads:
            thread.start()

    def submit(self, items: Sequence[Item], names: Sequence[str]) -> Future[Embedded]:
        """The embeddings to come; cancel it when nobody waits any more. Raises Refusal when the house is full or closed.

        The future raises Refusal, with what `names` calls the item, where one cannot be embedded.
        """
        job = Job(items, names)
        with self._changed:
            if self._closed:
                raise Refusal(503, "the server is stopping; ask another, or again later", code="stopping", headers=PATIENCE)
            if self.waiting and self.waiting + len(items) > self.limits.waiting_items:
                said = f"{self.waiting:,} items wait already, at most {self.limits.waiting_items:,} may; try again in a moment"
                raise Refusal(429, said, code="full", headers=PATIENCE)
            self.waiting += len(items)
            self._turns.append(job)
            self._changed.notify_all()
        job.future.add_done_callback(lambda _: self._leave(job))
        return job.future

    def close(self, seconds: float = 5) -> None:
        """Take no more, drop what nobody will get, and wait for the threads; a forward pass that takes longer is left to itself."""
        with self._changed:
            self._closed = True
            jobs = {*self._turns, *(piece.job for piece in self._ready)}
            self._changed.notify_all()
        for job in jobs:
            job.future.cancel()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(seconds)

    def _leave(self, job: Job) -> None:
        with self._changed:
            self.waiting -= len(job.items)
            self._changed.notify_all()

    # -- preparing -----------------------------------------------------------------------------------------------------------------------

    def _prepare_all(self) -> None:
        while self._prepare_one():
            pass

    def _prepare_one(self) -> bool:
        """Prepare an item; False at the end. What it held is let go on return, not with the item after it, which may be long in coming."""
        if (turn := self._next_turn()) is None:
            return False
        job, index = turn
        started = time.monotonic()
        if (features := self._prepared(job, index)) is not None:
            self._push(Piece(job, index, features, features.nbytes))
        self.counts.prepare_seconds.observe(time.monotonic() - started)
        return True

    def _next_turn(self) -> tuple[Job, int] | None:
        """An item of the job whose turn it is, once there is room for it; None at the end."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._closed or (self._turns and self._room_ahead()))
                if self._closed:
                    return None
                job = self._turns.popleft()
                if job.future.done():
                    continue
                job.begun += 1
                if job.begun < len(job.items):
                    self._turns.append(job)
                return job, job.begun - 1

    def _room_ahead(self) -> bool:
        """Whether less than two batches are prepared."""
        return self._ready_tokens < 2 * self.chunk_tokens and self._ready_bytes < AHEAD_BYTES

    def _push(self, piece: Piece) -> None:
        with self._changed:
            self._ready.append(piece)
            self._ready_tokens += len(piece.features)
            self._ready_bytes += piece.nbytes
            self._changed.notify_all()

    def _pop(self) -> Piece:
        """The first that is ready; called with the lock held."""
        piece = self._ready.popleft()
        self._ready_tokens -= len(piece.features)
        self._ready_bytes -= piece.nbytes
        return piece

    def _prepared(self, job: Job, index: int) -> Features | None:
        try:
            features = featurize(self.encoder.processor, job.items[index], limits=self.pictures)
        except Vlm2VecError as error:
            job.fail(index, 400, str(error), "unreadable_item")
        except Exception as error:  # of a library, on what a client sent
            say_where(error, "preparing an item")
            job.fail(index, 422, f"cannot be made into what the model reads ({type(error).__name__})", "unprocessable_item")
        else:
            if len(features) <= self.chunk_tokens:
                return features
            said = f"takes {len(features):,} tokens, at most {self.chunk_tokens:,} fit; send smaller or fewer pictures, or less text"
            job.fail(index, 413, said, "too_many_tokens")
        return None

    # -- the model -----------------------------------------------------------------------------------------------------------------------

    def _embed_all(self) -> None:
        while self._embed_some():
            pass

    def _embed_some(self) -> bool:
        """Embed a batch; False at the end."""
        if pieces := self._take():
            self._embed(pieces)
        return bool(pieces)

    def _take(self) -> list[Piece]:
        """What fits into a batch, in the order of turns; an empty list at the end."""
        pieces: list[Piece] = []
        room = self.chunk_tokens
        with self._changed:
            while not pieces and not self._closed:
                self._changed.wait_for(lambda: self._ready or self._closed)
                while self._ready and (not pieces or len(self._ready[0].features) <= room):
                    piece = self._pop()
                    if not piece.job.future.done():
                        pieces.append(piece)
                        room -= len(piece.features)
                self._changed.notify_all()  # there is room, also where nobody waits for what was taken and this thread waits again
        return pieces

    def _embed(self, pieces: list[Piece]) -> None:
        """Embed a batch; when it fails, each item by itself, so that one does not harm the others."""
        started = time.monotonic()
        try:
            rows_ND = self.encoder.embed_features([piece.features for piece in pieces], self.chunk_tokens).numpy()
        except Exception as error:
            if len(pieces) > 1:
                for piece in pieces:
                    if not piece.job.future.done():  # refused for another item of it, or nobody waits any more
                        self._embed([piece])
            else:
                self._blame(pieces[0], error)
            return
        self.healthy = True
        self._count(pieces, time.monotonic() - started)
        for piece, row_D in zip(pieces, rows_ND, strict=True):
            piece.job.put(piece.index, row_D, len(piece.features))

    def _blame(self, piece: Piece, error: Exception) -> None:
        """Refuse an item on which the model failed; whether the model or the item is to blame, the probe tells."""
        if isinstance(error, NonFiniteError):
            piece.job.fail(piece.index, 422, "its embedding is not a finite number", "not_finite")
            return
        say_where(error, "embedding an item")
        piece.job.fail(piece.index, 500, f"the model failed on it ({type(error).__name__})", "model_failed")
        try:
            self._embed_probe()
        except Exception:
            self.healthy = False
            logger.error("the model fails on the probe too: /health says so from now on")

    def _embed_probe(self) -> None:
        self.encoder.embed_features([featurize(self.encoder.processor, PROBE)], self.chunk_tokens)

    def _count(self, pieces: list[Piece], seconds: float) -> None:
        self.counts.batch_seconds.observe(seconds)
        self.counts.batch_items.observe(len(pieces))
        self.counts.tokens.add(sum(len(piece.features) for piece in pieces))
        for piece in pieces:
            item = piece.job.items[piece.index]
            self.counts.items.add(kind="text" if not item.images else "both" if item.text else "picture")


def say_where(error: Exception, doing: str) -> None:
    """Log the kind and place of an error, never its message: that may quote what a client sent."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    logger.error("%s while %s, at %s line %s", type(error).__name__, doing, place.filename.rpartition("site-packages")[2], place.lineno)
