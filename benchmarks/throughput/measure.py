"""Clocks, memory and stages: how things are measured, whatever they are."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

STAGES = (
    *("decode", "process pictures", "tokenize", "collate", "transfer", "towers", "language, pass 1", "loss", "language, pass 2"),
    *("backward", "optimizer", "other"),
)


def settle() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Spent:
    """Seconds that passed, and seconds that all threads of this process computed: on a machine that others use, the first holds waiting."""

    passed: float
    computed: float

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.passed + other.passed, self.computed + other.computed)

    @property
    def busy(self) -> float:
        """Seconds to hold against a floor: those of a GPU, which nobody shares, or those that threads of the CPU computed, all added up."""
        return self.passed if torch.cuda.is_available() else self.computed


def spent(function: Callable[[], Any]) -> tuple[Spent, Any]:
    """What `function` takes, and what it returns."""
    settle()
    start, computed = time.perf_counter(), time.process_time()
    result = function()
    settle()
    return Spent(time.perf_counter() - start, time.process_time() - computed), result


@dataclass(frozen=True)
class Ratio:
    """How many times as long the second of two things takes as the first, pair by pair."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float]) -> Ratio:
        """From seconds that were taken in turn."""
        each = [b / a for a, b in zip(first, second, strict=True)]
        return cls(statistics.median(each), min(each), max(each))


def in_turn(sides: Sequence[Callable[[], dict[str, Spent]]], repeats: int) -> list[list[dict[str, Spent]]]:
    """What each side returns, A B A B ...: a machine that gets slower meanwhile slows both."""
    found: list[list[dict[str, Spent]]] = [[] for _ in sides]
    for _ in range(repeats):
        for side, rows in zip(sides, found, strict=True):
            rows.append(side())
    return found


# -- memory


@dataclass
class Memory:
    """Context manager: by how many bytes private memory rose at most inside; on a GPU, allocated memory."""

    growth: int = 0
    _before: int = 0
    _done: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Memory:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._before = _private_bytes()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            self.growth = torch.cuda.max_memory_allocated() - self._before
            return
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.growth = max(self.growth, _private_bytes() - self._before)


def _private_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("ascii").splitlines())
    return 1024 * int(fields["RssAnon"].split()[0])


# -- stages

Label = str | Callable[[], str]


class Stages:
    """Seconds by stage of what runs inside; a stage within another is taken out of it."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._inner = [0.0]  # seconds of the stages inside each one that is running

    @contextmanager
    def __call__(self, wraps: Sequence[tuple[Any, str, Label]]) -> Iterator[Stages]:
        """Time the methods `wraps` names: (owner, attribute, stage)."""
        with ExitStack() as stack:
            for owner, name, label in wraps:
                stack.enter_context(self._wrapped(owner, name, label))
            with self._timed("other"):
                yield self

    @contextmanager
    def _wrapped(self, owner: Any, name: str, label: Label) -> Iterator[None]:
        real, own = getattr(owner, name), name in vars(owner)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._timed(label if isinstance(label, str) else label()):
                return real(*args, **kwargs)

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, real) if own else delattr(owner, name)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        settle()
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            settle()
            passed = time.perf_counter() - start
            self.seconds[stage] += passed - self._inner.pop()
            self._inner[-1] += passed


def language_pass() -> str:
    """The stage of a forward pass by whether it builds a graph."""
    return "language, pass 2" if torch.is_grad_enabled() else "language, pass 1"
