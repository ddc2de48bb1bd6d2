"""HTTP/1.1 on a connection, as uvicorn speaks it, with what uvicorn leaves open: clients that never finish a head, that never read their
answer, and more connections than there is room for.

A connection is closed when the head of its next request is not complete in time, however many bytes of it trickle in, and cut when its
client takes nothing of an answer for too long. The time for a body is the application's to keep.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.h11_impl import H11Protocol

from vlm2vec.serve.counts import Counts
from vlm2vec.serve.limits import Limits
from vlm2vec.serve.refusal import Refusal

LINGER = 1  # seconds for the last bytes of a connection that was closed


class GuardedProtocol(H11Protocol):
    """See `guarded`."""

    limits: ClassVar[Limits]
    counts: ClassVar[Counts]
    _head_timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._turn_away(Refusal(503, "too many connections; try again in a moment", code="full", headers={"retry-after": "1"}), "full")
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(self._head_timer)
        self._stop(self._read_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._answering() and not self.cycle.more_body and len(self.conn.trailing_data[0]) < HIGH_WATER_LIMIT:
            self.flow.resume_reading()  # paused by what a client sends ahead; its leaving could not be heard

    def handle_events(self) -> None:
        super().handle_events()
        if self._answering():
            self._stop(self._head_timer)

    def on_response_complete(self) -> None:
        self._await_head()  # before uvicorn takes up the next request, which may be here already
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read_timer = self.loop.call_later(self.limits.read_seconds, self._cut, "slow_reader")

    def resume_writing(self) -> None:
        self._stop(self._read_timer)
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for what is no HTTP."""
        self._turn_away(Refusal(400, "this is not HTTP/1.1 as it should be; the connection is closed", code="invalid_http"), "malformed")

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        self._stop(self._head_timer)
        self._head_timer = self.loop.call_later(self.limits.head_seconds, self._too_slow)

    def _too_slow(self) -> None:
        begun = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if begun:
            said = f"the head of a request took more than {self.limits.head_seconds} seconds; the connection is closed"
            self._turn_away(Refusal(408, said, code="too_slow"), "slow_head")
        else:
            self._close()

    def _turn_away(self, refusal: Refusal, reason: str) -> None:
        """Say why and close; cut where half an answer is on its way already."""
        self.counts.refused.add(reason=reason)
        if self._answering() and self.cycle.response_started:
            self.transport.abort()
            return
        body = refusal.body()
        fields = {"content-type": "application/json", "content-length": len(body), "connection": "close", **refusal.headers}
        lines = [f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}", *(f"{name}: {value}" for name, value in fields.items())]
        self.transport.write("\r\n".join([*lines, "", ""]).encode("ascii") + body)
        self._close()

    def _close(self) -> None:
        """Close once what was written is sent, which must not take long."""
        self.transport.close()
        self.loop.call_later(LINGER, self.transport.abort)

    def _cut(self, reason: str) -> None:
        self.counts.refused.add(reason=reason)
        self.transport.abort()

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


def guarded(limits: Limits, counts: Counts) -> type[Any]:
    """The protocol class with these limits, for uvicorn to make one of for each connection."""
    return type("Guarded", (GuardedProtocol,), {"limits": limits, "counts": counts})
