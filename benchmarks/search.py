"""How long exact and approximate search over a million stored rows take, and what the index costs.

    python benchmarks/search.py                        1,000,000 rows of 1,024 numbers; 4.2 GB of disk, half as much again with the lists
    python benchmarks/search.py --dims 256 --no-lists

Rows are drawn around 2,000 centres, most of the noise in 64 directions, so that neighbours exist, as they do among embeddings. The index is
filled and read as `vlm2vec index` and `vlm2vec search` do it, without a model. The exact results are held against a float64 product with
every row. Times are those of a shared machine unless it is idle: the load average is printed.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from vlm2vec import approximate, store
from vlm2vec.index import Index
from vlm2vec.store import Entry, Writer

ROWS, DIMS, WINDOW, TOP, QUERIES = 1_000_000, 1024, 1024, 10, 21
SECONDS = 1.0  # the bar
META = {"kind": "vlm2vec index", "fingerprint": "none", "source": "made up", "root": "/", "columns": {}}


class Rows:
    """Unit rows around centres."""

    def __init__(self, dims: int) -> None:
        draw = np.random.default_rng(0)
        self.centre = draw.standard_normal((2000, dims), dtype=np.float32)
        self.basis = draw.standard_normal((64, dims), dtype=np.float32) / 8

    def draw(self, seed: int, count: int) -> NDArray[np.float32]:
        draw = np.random.default_rng(seed)
        row = self.centre[draw.integers(0, len(self.centre), count)] + 0.5 * draw.standard_normal((count, 64), np.float32) @ self.basis
        row += 0.3 * draw.standard_normal(row.shape, np.float32)
        return row / np.linalg.norm(row, axis=1, keepdims=True)


def entries(first: int, count: int) -> list[Entry]:
    return [Entry(f"r{row}", row, row.to_bytes(32, "little"), "", f"item {row}", "", ()) for row in range(first, first + count)]


def fill(folder: Path, rows: int, source: Rows, dims: int, lists: bool) -> None:
    """Make the index, and say what each part took."""
    store.create(folder, {**META, "dims": dims})
    writing = 0.0
    with store.connected(folder) as connection:
        writer = Writer(folder, connection)
        for first in range(0, rows, WINDOW):
            block_ND = source.draw(first + 1, min(WINDOW, rows - first))
            kept = entries(first, len(block_ND))
            started = time.perf_counter()
            writer.put(kept, [entry.key for entry in kept], block_ND)
            writing += time.perf_counter() - started
        started = time.perf_counter()
        writer.finish(items=rows, instruction="", loading={}, approximate=None)
        print(f"{rows:,} x {dims}: kept in {writing:.1f} s, made the index in {time.perf_counter() - started:.1f} s more")
        started = time.perf_counter()
        Writer(folder, connection)
        print(f"held against its sha256, as the next run does first, in {time.perf_counter() - started:.1f} s")
        if lists:
            started = time.perf_counter()
            rows_ND = store.matrix(folder, writer.meta, rows)
            made = {"file": "lists.faiss", **approximate.build(rows_ND, folder / "lists.faiss", np.zeros(rows, bool))}
            writer.publish(approximate=made)
            size = (folder / "lists.faiss").stat().st_size / 1e9
            print(f"lists: {made} in {time.perf_counter() - started:.1f} s, {size:.2f} GB")
    for name in (store.DATABASE, writer.meta["file"]):
        print(f"{name}: {(folder / name).stat().st_size / 1e9:.2f} GB")


def timed(search: Callable[[int], object]) -> tuple[float, float]:
    """Median and longest seconds of a query, after one that warms up."""
    search(0)
    seconds = []
    for query in range(1, QUERIES):
        started = time.perf_counter()
        search(query)
        seconds.append(time.perf_counter() - started)
    return median(seconds), max(seconds)


def memory() -> str:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("ascii").splitlines())
    own, mapped = (int(fields[name].split()[0]) / 1e6 for name in ("RssAnon", "RssFile"))
    return f"{own:.2f} GB of its own, {mapped:.2f} GB of mapped files"


def best_in_float64(rows_ND: NDArray[np.float32], query_D: NDArray[np.float32]) -> list[int]:
    wide_D = query_D.astype(np.float64)
    score_N = np.concatenate([(rows_ND[at : at + 8192].astype(np.float64) * wide_D).sum(axis=1) for at in range(0, len(rows_ND), 8192)])
    return np.lexsort((np.arange(len(score_N)), -score_N))[:TOP].tolist()


def measure(folder: Path, source: Rows, checks: int, lists: bool) -> bool:
    started = time.perf_counter()
    index = Index.open(folder)
    print(f"opened in {time.perf_counter() - started:.3f} s")
    query_QD = source.draw(0, QUERIES)
    middle, longest = timed(lambda query: index.search(query_QD[query : query + 1], TOP))
    held = middle < SECONDS
    print(f"exact top {TOP}, warm: median {middle:.3f} s, longest {longest:.3f} s ({'holds' if held else 'MISSED'}: under {SECONDS:g} s)")
    started = time.perf_counter()
    exact = [[hit.number for hit in hits] for hits in index.search(query_QD, TOP)]
    print(f"{QUERIES} queries at once: {(time.perf_counter() - started) / QUERIES:.3f} s each; memory: {memory()}")
    rows_ND = store.matrix(folder, index.meta, index.meta["rows"])
    right = sum(best_in_float64(rows_ND, query_QD[query]) == exact[query] for query in range(checks))
    print(f"the same items in the same order as a float64 product with every row: {right} of {checks} queries")
    if lists:
        middle, longest = timed(lambda query: index.search(query_QD[query : query + 1], TOP, approximately=True))
        found = [{hit.number for hit in hits} for hits in index.search(query_QD, TOP, approximately=True)]
        recall = sum(len(some & set(true)) for some, true in zip(found, exact, strict=True)) / (TOP * QUERIES)
        print(f"approximate, warm: median {middle:.3f} s, longest {longest:.3f} s; recall of {QUERIES} other queries {recall:.3f}")
    return held and right == checks


def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--dims", type=int, default=DIMS)
    parser.add_argument("--checks", type=int, default=3, help="queries to hold against float64")
    parser.add_argument("--no-lists", dest="lists", action="store_false", help="leave approximate search out")
    parser.add_argument("--folder", type=Path, help="where the index may lie; a temporary folder unless given")
    options = parser.parse_args()
    load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, load before: {load}, numpy {np.__version__}")
    source = Rows(options.dims)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        fill(Path(folder), options.rows, source, options.dims, options.lists)
        return measure(Path(folder), source, options.checks, options.lists)


if __name__ == "__main__":
    raise SystemExit(not main())
