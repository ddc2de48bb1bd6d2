"""Processes of one gloo group, forked from a test after its imports: a tenth of a second each."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch


def fork_ranks(function: Callable[[int], None], world: int, store: Path | None = None, seconds: float = 60) -> list[int]:
    """Run `function(rank)` as `world` processes of one group; returns their exit codes: 0 if it returned, 70 if it raised."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as folder:
        children = [_child(function, rank, world, store or Path(folder) / "store", seconds) for rank in range(world)]
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _child(function: Callable[[int], None], rank: int, world: int, store: Path, seconds: float) -> int:
    if child := os.fork():
        return child
    code = 70
    try:
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        torch.distributed.init_process_group("gloo", f"file://{store}", timedelta(seconds=seconds), rank=rank, world_size=world)
        function(rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
