"""The routes: the page, searches, pictures of items by their place in the index, and whether all is well."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

from anyio import CapacityLimiter, Lock
from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.datastructures import FormData, QueryParams, UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Message

from vlm2vec.errors import EnvError, ImageError, InputError, ManifestError, NonFiniteError, Vlm2VecError
from vlm2vec.log import get_logger
from vlm2vec.ui import page, pictures
from vlm2vec.ui.guard import Guard
from vlm2vec.ui.search import GoneError, Question, Searcher

FIELD = 100_000  # bytes of a text field
AT_ONCE = 4  # pictures that are decoded at the same time
# The first that fits: a damaged index is an input error too.
_STATUS = ((GoneError, 404), (ManifestError, 500), (NonFiniteError, 500), (InputError, 400), (EnvError, 503), (Vlm2VecError, 500))
logger = get_logger(__name__)


def app(searcher: Searcher, host: str = "127.0.0.1") -> Starlette:
    """The page of an index, to be served at `host`."""
    site = _Site(searcher)
    routes = [
        Route("/", site.whole, methods=["GET", "POST"]),
        Route("/search", site.part, methods=["GET", "POST"]),
        Route("/picture/{place}", site.picture),
        Route("/static/{name}", site.static),
        Route("/health", site.health),
    ]
    return Starlette(routes=routes, middleware=[Middleware(Guard, host=host)])


class _Site:
    def __init__(self, searcher: Searcher) -> None:
        self.searcher = searcher
        self.files = page.static()
        self.turn = Lock()  # questions wait here, not in a thread, so that one whose browser has gone on is never computed
        self.decoding = CapacityLimiter(AT_ONCE)

    async def whole(self, request: Request) -> Response:
        """The page, with results if something was asked."""
        question, results, status = await self._results(request)
        return HTMLResponse(page.page(self.searcher, question, results), status)

    async def part(self, request: Request) -> Response:
        """The results alone, as HTML, or as JSON for those who accept that."""
        if "application/json" in request.headers.get("accept", ""):
            return await self._json(request)
        _, results, status = await self._results(request)
        return HTMLResponse(results, status)

    async def picture(self, request: Request) -> Response:
        """A picture of an item: the file, or a small copy."""
        try:
            side, number = _whole(request.query_params, "size", 0), _whole(request.query_params, "number", 0)
            if side not in (0, *pictures.SIDES):
                raise InputError(f"size: expected one of {', '.join(map(str, pictures.SIDES))}, got {side}")
            make = partial(self._picture, request.path_params["place"], number, side or None)
            return _sent(request, await run_sync(make, limiter=self.decoding))
        except Vlm2VecError as error:
            return PlainTextResponse(str(error), 404 if isinstance(error, ImageError) else _status(error))

    async def static(self, request: Request) -> Response:
        """A file that belongs to the page."""
        found = self.files.get(request.path_params["name"])
        return PlainTextResponse("no such file", 404) if found is None else Response(found[0], media_type=found[1])

    async def health(self, request: Request) -> Response:
        """Whether the index can be read."""
        try:
            await run_sync(self.searcher.sample, 1)
        except Vlm2VecError as error:
            return JSONResponse({"status": "failing", "reason": str(error)}, 503)
        return JSONResponse({"status": "ok", "items": len(self.searcher.index)})

    def _picture(self, place: str, number: int, side: int | None) -> pictures.Picture:
        return pictures.picture(self.searcher.at(place), number, side)

    async def _results(self, request: Request) -> tuple[Question, Any, int]:
        """The question, what stands below it, and the status of the answer."""
        question = Question()
        try:
            question = await _question(request)
            if question.blank and request.method == "GET" and request.url.path == "/":
                return question, page.beginning(await run_sync(self.searcher.sample, page.SHOWN)), 200
            return question, await self._asked(request, lambda: page.answered(self.searcher.answer(question))), 200
        except (Vlm2VecError, HTTPException) as error:
            return question, page.failed(_message(error)), _status(error)

    async def _json(self, request: Request) -> Response:
        try:
            question = await _question(request)
            return JSONResponse(await self._asked(request, lambda: page.plain(self.searcher.answer(question))))
        except (Vlm2VecError, HTTPException) as error:
            return JSONResponse({"error": _message(error)}, _status(error))

    async def _asked(self, request: Request, compute: Callable[[], Any]) -> Any:
        async with self.turn:
            if await request.is_disconnected():
                raise HTTPException(499, "the browser has gone on")
            return await run_sync(compute)


async def _question(request: Request) -> Question:
    """What a form asks, from the address or from the body. Raises InputError, and HTTPException for a body that is too long or broken."""
    if request.method != "POST":
        return _asked(request.query_params, None)
    async with Request(request.scope, _limited(request)).form(max_files=1, max_fields=8, max_part_size=FIELD) as form:
        image = form.get("image")
        return _asked(form, await image.read() or None if isinstance(image, UploadFile) else None)


def _limited(request: Request) -> Callable[[], Any]:
    """The body of a request as it comes, up to what a picture may have."""
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > page.UPLOAD + 2 * FIELD:
            raise HTTPException(413, f"the picture is too large: at most {page.UPLOAD // 1_000_000} MB are read")
        return message

    return receive


def _asked(values: QueryParams | FormData, picture: bytes | None) -> Question:
    instruction = values.get("instruction")
    top = _whole(values, "top", None)
    return Question(_text(values, "text"), picture, _text(values, "like"), instruction if isinstance(instruction, str) else None, top)


def _text(values: QueryParams | FormData, name: str) -> str:
    value = values.get(name, "")
    return value if isinstance(value, str) else ""


def _whole(values: QueryParams | FormData, name: str, default: Any) -> Any:
    text = _text(values, name).strip()
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise InputError(f"{name}: expected a whole number, got {text[:40]!r}")
    return int(text)


def _sent(request: Request, picture: pictures.Picture) -> Response:
    """A picture that browsers keep, and ask about again before they show it."""
    fresh = {"cache-control": "private, no-cache"}
    if not isinstance(picture.source, bytes):
        return FileResponse(picture.source, media_type=picture.type, headers=fresh)
    tag = f'"{hashlib.sha256(picture.source).hexdigest()[:32]}"'
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers={**fresh, "etag": tag})
    return Response(picture.source, media_type=picture.type, headers={**fresh, "etag": tag})


def _message(error: Vlm2VecError | HTTPException) -> str:
    return error.detail if isinstance(error, HTTPException) else str(error)


def _status(error: Vlm2VecError | HTTPException) -> int:
    """The status of an answer that tells of an error; the terminal hears of those that are not the browser's."""
    if isinstance(error, HTTPException):
        return error.status_code
    status = next(status for kind, status in _STATUS if isinstance(error, kind))
    if status >= 500:
        logger.error("%s", error)
    return status
