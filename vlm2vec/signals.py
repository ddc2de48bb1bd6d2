"""SIGTERM, SIGINT and SIGUSR1 ask a run to stop at the next step; a second one stops it at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from vlm2vec.errors import Interrupted

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """Context manager that turns the first signal into a flag for the loop to poll, and restores the handlers afterwards."""

    def __init__(self) -> None:
        self.number = 0
        self._cut = ""
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.number != 0

    def interrupted(self, message: str, number: int = 0) -> Interrupted:
        """The error to end with; its exit code is 128 + `number`, or that of the signal received here (SIGINT 130, SIGTERM 143)."""
        return Interrupted(message, number or self.number or signal.SIGTERM)

    @contextmanager
    def cutting(self, message: str) -> Iterator[None]:
        """Inside, a signal raises Interrupted there and then: for work that loses nothing wherever it is cut."""
        self._cut = message
        try:
            if self.requested:
                raise self.interrupted(message)
            yield
        finally:
            self._cut = ""

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._receive) for number in HANDLED}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            os._exit(128 + number)
        self.number = number
        if self._cut:
            raise self.interrupted(self._cut)
