"""Who may ask at all, and what every answer says to browsers: plain ASGI around the app."""

from __future__ import annotations

import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL = ("localhost", "127.0.0.1", "[::1]")
EVERYWHERE = ("0.0.0.0", "::")
_ADDRESS = re.compile(r"[\d.]+|\[[\da-f:.]+\]")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Guard:
    """Refuses requests that another site has made, and puts `HEADERS` onto every answer.

    A page elsewhere may let its name lead to this machine (DNS rebinding) and then read all it asks for: only a Host that is local, or the
    one that is served, gets an answer. Served everywhere, any address does, which no rebinding can have. Requests that a page elsewhere
    makes by the right name are told by Sec-Fetch-Site; following a link from there is allowed.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app = app
        self.names = {*LOCAL, host.lower(), f"[{host.lower()}]"}
        self.addresses = host in EVERYWHERE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The answer of the app, or 403."""

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        reason = self.refusal(scope) if scope["type"] == "http" else ""
        await (PlainTextResponse(reason, 403) if reason else self.app)(scope, receive, marked)

    def refusal(self, scope: Scope) -> str:
        """Why a request gets no answer, or ""."""
        headers = Headers(scope=scope)
        host = re.sub(r":\d*$", "", headers.get("host", "").lower())
        if host not in self.names and not (self.addresses and _ADDRESS.fullmatch(host)):
            return "this name is not served; open the address that vlm2vec ui printed, or start it with --host NAME"
        elsewhere = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        followed = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"
        return "requests that another site makes are not answered" if elsewhere and not followed else ""
