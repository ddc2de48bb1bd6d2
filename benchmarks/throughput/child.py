"""Peak memory of one side, in a process of its own: python -m benchmarks.throughput.child '<JSON>' prints bytes by what was done.

What a process allocated once stays its own, so two sides in one process would hide each other's growth. On a GPU the allocator says it.
On a CPU freed blocks go back to the system at once: glibc keeps them otherwise, more of them the more their sizes differ, and on several
threads each. The question is what a side needs.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.throughput.measure import Memory
from benchmarks.throughput.setting import Setting
from benchmarks.throughput.workloads import Workload, make_workload

ROOT = Path(__file__).parents[2]
BLOCKS_GO_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # bytes from which a block has pages of its own


def memory_of(setting: Setting, workload: str, side: str, **options: Any) -> dict[str, int]:
    """Start a child and return what it measured. `side` is ours, peer or the name of a variant."""
    said = json.dumps({"setting": asdict(setting), "workload": workload, "side": side, "options": options})
    command = [sys.executable, "-m", "benchmarks.throughput.child", said]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **BLOCKS_GO_BACK})
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {side} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _growth(function: Callable[[], Any]) -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # give back what earlier work left free
    with Memory() as memory:
        function()
    return memory.growth


def _peer(setting: Setting, workload: Workload, rows: int | None, tokens: int | None, encode: int) -> dict[str, int]:
    from benchmarks.throughput.peer import MiniBatch, Peer

    peer = Peer(setting, MiniBatch(rows, tokens))
    peer.rows_of_encode = encode
    peer.train(peer.prepare(workload.pairs[:2]))  # what is made once and kept
    features = peer.prepare(workload.pairs)
    return {"encoding": _growth(lambda: peer.encode(workload.distinct)), "training": _growth(lambda: peer.train(features))}


def _ours(setting: Setting, workload: Workload, variant: str) -> dict[str, int]:
    from benchmarks.throughput.ablate import VARIANTS, Built

    built = Built(VARIANTS[variant], setting, workload.pairs)
    built.ours.train(built.ours.prepare(workload.pairs[:2]))
    return {
        "encoding": _growth(lambda: built.ours.encode(workload.distinct)),
        "training": _growth(built.train),
    }


def main() -> None:
    said = json.loads(sys.argv[1])
    setting = Setting(**said["setting"])
    workload = make_workload(said["workload"], setting.batch, setting.entry["scale"], setting.pictures)
    side = said["side"]
    print(json.dumps(_peer(setting, workload, **said["options"]) if side == "peer" else _ours(setting, workload, side)))


if __name__ == "__main__":
    main()
