"""What the server tells about itself, in Prometheus' text format 0.0.4: https://prometheus.io/docs/instrumenting/exposition_formats."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence

TEXT = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
Labels = tuple[tuple[str, str], ...]


class Counter:
    """A number that only grows, one for each set of labels. Label values must be ours: each new one is kept for good."""

    def __init__(self, name: str, meaning: str) -> None:
        self.name, self.meaning = name, meaning
        self._values: dict[Labels, float] = {}
        self._lock = threading.Lock()

    def add(self, amount: float = 1, **labels: str) -> None:
        key = tuple(sorted(labels.items()))
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount

    def lines(self) -> list[str]:
        with self._lock:
            values = sorted(self._values.items()) or [((), 0)]
        return [*_head(self.name, self.meaning, "counter"), *(f"{self.name}{_shown(key)} {value:.12g}" for key, value in values)]


class Gauge:
    """A number that is asked for when it is shown."""

    def __init__(self, name: str, meaning: str, ask: Callable[[], float]) -> None:
        self.name, self.meaning, self.ask = name, meaning, ask

    def lines(self) -> list[str]:
        return [*_head(self.name, self.meaning, "gauge"), f"{self.name} {self.ask():.12g}"]


class Histogram:
    """How many values were at most so large, for each of `bounds`, which ascend."""

    def __init__(self, name: str, meaning: str, bounds: Sequence[float]) -> None:
        self.name, self.meaning, self.bounds = name, meaning, bounds
        self._counts, self._sum = [0] * (len(bounds) + 1), 0.0
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        with self._lock:
            self._counts[bisect_left(self.bounds, value)] += 1
            self._sum += value

    def lines(self) -> list[str]:
        with self._lock:
            counts, total = list(self._counts), self._sum
        lines = _head(self.name, self.meaning, "histogram")
        for index, bound in enumerate([*map("{:g}".format, self.bounds), "+Inf"]):
            lines.append(f'{self.name}_bucket{{le="{bound}"}} {sum(counts[: index + 1])}')
        return [*lines, f"{self.name}_sum {total:.12g}", f"{self.name}_count {sum(counts)}"]


class Counts:
    """All that is counted."""

    def __init__(self) -> None:
        self.requests = Counter("vlm2vec_requests_total", "Requests by route and status of the answer; 499: the client went away.")
        self.refused = Counter("vlm2vec_connections_refused_total", "Connections closed before a request, by reason.")
        self.items = Counter("vlm2vec_items_total", "Items embedded, by what they hold.")
        self.tokens = Counter("vlm2vec_tokens_total", "Tokens embedded, padding not included.")
        self.request_seconds = Histogram("vlm2vec_request_seconds", "From the head of an embeddings request to its answer's end.", SECONDS)
        self.prepare_seconds = Histogram("vlm2vec_prepare_seconds", "Decoding and tokenizing of an item.", SECONDS)
        self.batch_seconds = Histogram("vlm2vec_batch_seconds", "The model's work on a batch.", SECONDS)
        self.batch_items = Histogram("vlm2vec_batch_items", "Items of a batch.", SIZES)
        self.gauges: list[Gauge] = []

    def watch(self, name: str, meaning: str, ask: Callable[[], float]) -> None:
        """Show what `ask` says, a thread-safe function."""
        self.gauges.append(Gauge(name, meaning, ask))

    def page(self) -> str:
        kept = [value for value in vars(self).values() if isinstance(value, Counter | Histogram)]
        return "\n".join(line for shown in (*kept, *self.gauges) for line in shown.lines()) + "\n"


def _head(name: str, meaning: str, kind: str) -> list[str]:
    return [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]


def _shown(labels: Labels) -> str:
    return "{" + ",".join(f'{key}="{value}"' for key, value in labels) + "}" if labels else ""
