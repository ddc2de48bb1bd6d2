"""The routes. What a client sends is counted while it arrives, read by a pool of threads, and dropped when the client goes away.

A page in somebody's browser cannot use the server behind their back: only `application/json` is read, for which browsers ask first, and
the answer to that question is 405.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlm2vec.errors import Vlm2VecError
from vlm2vec.quantize import truncate
from vlm2vec.serve.answering import pieces
from vlm2vec.serve.asking import Asked, Served, parse
from vlm2vec.serve.batcher import Batcher, Embedded, say_where
from vlm2vec.serve.counts import TEXT, Counts
from vlm2vec.serve.limits import Limits
from vlm2vec.serve.refusal import PATIENCE, Refusal

GONE = 499  # what nobody reads: the client went away
JSON = "application/json"


@dataclass
class Lease:
    """Bytes of one request, or of its answer, that are in the house."""

    bytes: int = 0


class Answer(StreamingResponse):
    """An answer on its way to a client that may be slow: until it is sent its rows take room."""

    def __init__(self, room: AbstractContextManager[Lease], content: AsyncIterator[bytes], media_type: str) -> None:
        super().__init__(content, media_type=media_type)
        self.room = room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.room:
            await super().__call__(scope, receive, send)


class Server:
    """What the routes share: the batcher, what is served, the limits, the bytes in the house."""

    def __init__(self, batcher: Batcher, served: Served, limits: Limits, counts: Counts, key: str = "", threads: int = 2) -> None:
        self.batcher, self.served, self.limits, self.counts, self.key = batcher, served, limits, counts, key
        self.started = int(time.time())
        self.bytes = 0  # of requests and answers in the house; only the event loop touches it
        self.readers = ThreadPoolExecutor(threads, "read")
        counts.watch("vlm2vec_waiting_bytes", "Bytes of requests and answers that are not done with.", lambda: self.bytes)

    def app(self) -> ASGIApp:
        """The ASGI application."""
        routes = [
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
        ]
        inner = Starlette(routes=routes, exception_handlers={HTTPException: _no_route, Refusal: _refused, Exception: _broken})
        inner.router.redirect_slashes = False
        return Counted(inner, self.counts, {route.path for route in routes})

    # -- routes --------------------------------------------------------------------------------------------------------------------------

    async def embeddings(self, request: Request) -> Response:
        self._check_key(request)
        _check_type(request)
        with self._room() as lease:
            try:
                asked = await self._asked(request, lease)
                embedded = await _unless_gone(request, self.batcher.submit(asked.items, asked.names))
            except ClientDisconnect:
                return Response(status_code=GONE)
        rows_ND = embedded.rows_ND if asked.dims is None else await self._read(_shortened, embedded.rows_ND, asked)
        made = pieces(rows_ND, self.served.name, embedded.tokens, asked.base64)
        return Answer(self._room(rows_ND.nbytes), _in_turns(made), media_type=JSON)

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        model = {"id": self.served.name, "object": "model", "created": self.started, "owned_by": "vlm2vec", "dimensions": self.served.dims}
        return _json(200, {"object": "list", "data": [model]})

    async def health(self, request: Request) -> Response:
        healthy = self.batcher.healthy
        return _json(200 if healthy else 503, {"status": "ok" if healthy else "failing", "waiting_items": self.batcher.waiting})

    async def metrics(self, request: Request) -> Response:
        return Response(self.counts.page(), headers={"content-type": TEXT})

    # -- what they are made of -----------------------------------------------------------------------------------------------------------

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if self.key and not _same(given, f"Bearer {self.key}".encode()):
            said = "no valid key: send the header Authorization: Bearer KEY, with the key that the server was started with"
            raise Refusal(401, said, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    @contextmanager
    def _room(self, size: int = 0) -> Iterator[Lease]:
        """A place for `size` bytes, and for those that come."""
        lease = Lease(size)
        self.bytes += size
        try:
            yield lease
        finally:
            self.bytes -= lease.bytes

    async def _asked(self, request: Request, lease: Lease) -> Asked:
        return await self._read(parse, await self._body(request, lease), self.served, self.limits)

    async def _read(self, function: Any, *arguments: Any) -> Any:
        """What `function` returns, from a thread: it may take long."""
        return await asyncio.get_running_loop().run_in_executor(self.readers, function, *arguments)

    async def _body(self, request: Request, lease: Lease) -> bytearray:
        """The body, given up the moment it is too long, too slow or too much for the house. Raises Refusal, or ClientDisconnect."""
        limits, body = self.limits, bytearray()
        if int(request.headers.get("content-length", 0)) > limits.body_bytes:  # the protocol let only digits through
            raise _too_long(limits)
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for chunk in request.stream():
                    if len(body) + len(chunk) > limits.body_bytes:
                        raise _too_long(limits)
                    if self.bytes + len(chunk) > limits.waiting_bytes:
                        raise Refusal(429, "too many bytes wait already; try again in a moment", code="full", headers=PATIENCE)
                    lease.bytes += len(chunk)
                    self.bytes += len(chunk)
                    body += chunk
        except TimeoutError:
            raise Refusal(408, f"the body took more than {limits.body_seconds} seconds; send it faster, or less", code="too_slow") from None
        return body


async def _unless_gone(request: Request, work: Future[Embedded]) -> Embedded:
    """The result of `work`, which is cancelled when the client goes away. Raises ClientDisconnect then."""
    done, gone = asyncio.wrap_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait(set[asyncio.Future[Any]]((done, gone)), return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise ClientDisconnect
        return done.result()
    finally:
        gone.cancel()
        done.cancel()
        work.cancel()  # at once: what `done` passes on comes a turn of the loop later, after the request was counted as gone


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _in_turns(made: Iterator[bytes]) -> AsyncIterator[bytes]:
    """The pieces of an answer, with a turn for others after each."""
    for piece in made:
        yield piece
        await asyncio.sleep(0)


def _shortened(rows_ND: NDArray[np.float32], asked: Asked) -> NDArray[np.float32]:
    try:
        return truncate(rows_ND, asked.dims, "item")
    except Vlm2VecError as error:
        raise Refusal(422, f"dimensions: {error}", "dimensions") from None


def _same(given: bytes, expected: bytes) -> bool:
    """Whether two secrets are equal, in a time that tells neither their contents nor their lengths."""
    return hmac.compare_digest(hashlib.sha256(given).digest(), hashlib.sha256(expected).digest())


def _check_type(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON:
        raise Refusal(415, f"the body must be JSON: send the header Content-Type: {JSON}", code="unsupported_type")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Refusal(415, "the body must not be compressed: send it without Content-Encoding", code="unsupported_encoding")


def _too_long(limits: Limits) -> Refusal:
    said = f"the body has more than {limits.body_bytes:,} bytes; send fewer or smaller items"
    return Refusal(413, said, code="too_long")


def _json(status: int, value: Any) -> Response:
    return Response(json.dumps(value).encode("ascii"), status, media_type=JSON)


async def _refused(request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    return Response(refusal.body(), refusal.status, dict(refusal.headers), JSON)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = "there is nothing here" if error.status_code == 404 else "this method is not for this route"
    routes = "POST /v1/embeddings, GET /v1/models, GET /health, GET /metrics"
    return await _refused(request, Refusal(error.status_code, f"{said}; the routes are {routes}", headers=error.headers))


async def _broken(request: Request, error: Exception) -> Response:
    return await _refused(request, Refusal(500, "the server failed on this request; its log says where", code="internal_error"))


class Counted:
    """Counts the requests of the application inside, and has the last word on its errors: their kind and place are logged, no message."""

    def __init__(self, inner: ASGIApp, counts: Counts, routes: Collection[str]) -> None:
        self.inner, self.counts, self.routes = inner, counts, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, status = time.monotonic(), GONE

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.inner(scope, receive, noted)
        except Exception as error:
            say_where(error, "answering a request")
        finally:
            route = scope["path"] if scope["path"] in self.routes else "other"
            self.counts.requests.add(route=route, status=str(status))
            if route == "/v1/embeddings":
                self.counts.request_seconds.observe(time.monotonic() - started)
