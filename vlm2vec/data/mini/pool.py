"""Work shared between a few processes, in the order it was given."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

Mapper = Callable[[Callable[[Any], Any], Iterable[Any]], list[Any]]
WORKERS = 2
CHUNK = 32  # items per message


@contextmanager
def mapper(workers: int | None = None) -> Iterator[Mapper]:
    """A `map` over `workers` processes (None: two, or one on a single core); one worker means this process."""
    workers = min(WORKERS, os.cpu_count() or 1) if workers is None else workers
    if workers <= 1:
        yield lambda function, items: [function(item) for item in items]
        return
    # Forked where that is safe: a fresh interpreter would run an unguarded script of the user's again.
    context = multiprocessing.get_context("fork") if sys.platform == "linux" else None
    with ProcessPoolExecutor(workers, mp_context=context) as executor:
        yield lambda function, items: list(executor.map(function, items, chunksize=CHUNK))
