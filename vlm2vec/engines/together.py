"""Ranks end together: the first error of any rank ends all others within a second, in its own words and with its exit code.

A rank that fails leaves the others waiting in a collective, half an hour under gloo. So each rank watches a key of the process group's
store, where the first that fails writes what happened.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vlm2vec import dist
from vlm2vec.errors import Vlm2VecError

KEY = "vlm2vec/first-error"
SECONDS = 0.25  # between two looks
GRACE = 5.0  # for a rank to end by itself once another has failed


class PeerError(Vlm2VecError):
    """Another rank failed first; the message and exit code are its own."""

    def __init__(self, told: dict[str, Any]) -> None:
        super().__init__(f"rank {told['rank']}: {told['message']}")
        self.exit_code = told["exit_code"]


@contextmanager
def ending_together() -> Iterator[None]:
    """Inside, an error on any rank ends every rank; a rank whose own error only follows from another's raises PeerError instead.

    Errors that all ranks raise at the same place (a signal, a NaN) pass through unchanged. One process: nothing happens.
    """
    if dist.world_size() == 1:
        yield
        return
    store = torch.distributed.distributed_c10d._get_default_store()
    over = threading.Event()
    threading.Thread(target=_watch, args=(store, over), daemon=True).start()
    try:
        yield
        dist.barrier()  # rank 0 holds the store: it must not leave while others look
    except BaseException as error:
        first = _tell(store, error)
        if first["rank"] != dist.rank() and not isinstance(error, Vlm2VecError):
            raise PeerError(first) from None
        raise
    finally:
        over.set()


def _tell(store: Any, error: BaseException) -> dict[str, Any]:
    """Write down this rank's error unless another was first; returns the first."""
    message = str(error) if isinstance(error, Vlm2VecError) else f"{type(error).__name__}: {error}"
    mine = {"rank": dist.rank(), "message": message, "exit_code": getattr(error, "exit_code", 1)}
    try:
        return json.loads(store.compare_set(KEY, "", json.dumps(mine)))
    except RuntimeError:  # the store is gone, and with it rank 0
        return mine


def _watch(store: Any, over: threading.Event) -> None:
    """End this process when another rank has failed and this one does not end by itself, as in a collective that never returns."""
    while not over.wait(SECONDS):
        try:
            first = json.loads(store.get(KEY)) if store.check([KEY]) else None
        except RuntimeError:
            first = {"rank": 0, "message": "ended without a word; see its output", "exit_code": 1}
        if first is not None and not over.wait(GRACE if first["rank"] == dist.rank() else 4 * SECONDS):
            sys.stderr.write(f"error: {PeerError(first)}\n")
            sys.stderr.flush()
            os._exit(first["exit_code"])
