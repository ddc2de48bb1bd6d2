"""From a socket to a running server, and its end: signals stop it in order."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from vlm2vec.address import listen
from vlm2vec.serve.counts import Counts
from vlm2vec.serve.limits import Limits
from vlm2vec.serve.protocol import guarded
from vlm2vec.signals import StopSignal


def serve(app: ASGIApp, sock: socket.socket, limits: Limits, counts: Counts, stop: StopSignal) -> None:
    """Answer requests until `stop` asks for the end; then take no more, and give those in the house `stop_seconds`.

    Raises EnvError where another process listens at the address meanwhile.
    """
    listen(sock)
    config = uvicorn.Config(
        app,
        http=guarded(limits, counts),
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",  # its messages are of clients' making, or quote them
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=limits.head_seconds,
        timeout_graceful_shutdown=limits.stop_seconds,
    )
    _Stoppable(config, stop).run(sockets=[sock])


class _Stoppable(uvicorn.Server):
    """uvicorn's server, asking our own flag instead of catching signals: a second one must end the process at once."""

    def __init__(self, config: uvicorn.Config, stop: StopSignal) -> None:
        super().__init__(config)
        self.stop = stop

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        self.should_exit = self.should_exit or self.stop.requested
        return await super().on_tick(counter)
