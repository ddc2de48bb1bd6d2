"""How fast rankings of the size of MMEB are, beside a plain loop over queries, and of a corpus of a million.

    python benchmarks/mmeb/ranking.py             36 sets of 1,000 queries with 1,000 candidates each, dimension 3,072
    python benchmarks/mmeb/ranking.py --global    1,000 queries against a memory-mapped corpus of 1,000,000, dimension 1,024

The embeddings are random unit vectors, of which some are copies of others, so that there are ties. The loop does what MMEB's published
evaluation does: for each query it gathers the vectors of the candidates from a dict by (text, path), divides by norms, multiplies, and
takes the first maximum. The corpus is ranked once more for a few queries by sorting all scores. Times are those of a shared machine unless
it is idle: the load average is printed.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm2vec.metrics import interval, per_query
from vlm2vec.ranking import Ranking, rank

SETS, QUERIES, CANDIDATES, DIMS = 36, 1000, 1000, 3072
UNIQUE = (1000, 2000, 3000, 4000, 5000, 6000)  # distinct candidates of a set, in turn
METRICS = ("hit@1", "hit@5", "hit@10", "mrr@10", "ndcg_linear@5", "recall@10")
CORPUS, CORPUS_DIMS, TOP = 1_000_000, 1024, 100
SECONDS, BYTES, RATIO = 60, 2e9, 10  # the bars


def unit(stream: np.random.Generator, count: int, dims: int) -> NDArray[np.float32]:
    rows = stream.standard_normal((count, dims), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def near(stream: np.random.Generator, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Unit rows that have the given ones among their nearest, though not always first."""
    noise = unit(stream, len(rows), rows.shape[1])
    mixed = rows + noise * stream.uniform(5, 20, (len(rows), 1)).astype(np.float32)
    return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)


class Memory:
    """Highest private memory of this process while it ran, in bytes; pages of mapped files are not counted, their highest is `mapped`."""

    def __init__(self) -> None:
        self.peak = self.mapped = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("ascii").splitlines())
            self.peak = max(self.peak, 1024 * int(fields["RssAnon"].split()[0]))
            self.mapped = max(self.mapped, 1024 * int(fields["RssFile"].split()[0]))
            if self._done.wait(0.01):
                return


@contextmanager
def timed(seconds: list[float], of_cpu: list[float] | None = None) -> Iterator[None]:
    """Append the seconds that pass, and those that all threads compute."""
    start, computed = time.perf_counter(), time.process_time()
    yield
    seconds.append(time.perf_counter() - start)
    if of_cpu is not None:
        of_cpu.append(time.process_time() - computed)


def verdict(held: bool) -> str:
    return "holds" if held else "MISSED"


# -- 36 sets -----------------------------------------------------------------------------------------------------------------------------


def make_set(index: int) -> tuple[NDArray[np.float32], NDArray[np.float32], list[NDArray[np.int64]]]:
    """Queries, targets and candidates of one set, each query's gold listed first."""
    stream = np.random.default_rng(index)
    target = unit(stream, UNIQUE[index % len(UNIQUE)], DIMS)
    copies = stream.integers(0, len(target), len(target) // 50)
    target[stream.choice(len(target), len(copies), replace=False)] = target[copies]
    gold = stream.integers(0, len(target), QUERIES)
    candidates = []
    for first in gold:
        row = stream.permutation(len(target))
        candidates.append(np.concatenate([[first], row[row != first]])[:CANDIDATES])
    return near(stream, target[gold]), target, candidates


def loop(query: NDArray[np.float32], target: NDArray[np.float32], candidates: list[NDArray[np.int64]]) -> list[bool]:
    """Hits of the published evaluation's way to rank."""
    queries = {(f"query {index}", ""): row for index, row in enumerate(query)}
    targets = {(f"target {index}", ""): row for index, row in enumerate(target)}
    listed = [[(f"target {index}", "") for index in row.tolist()] for row in candidates]
    hits = []
    for key, members in zip(queries, listed, strict=True):
        asked = queries[key]
        rows = np.stack([targets[member] for member in members])
        scores = np.dot(asked / np.linalg.norm(asked), (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T)
        hits.append(int(np.argmax(scores)) == 0)
    return hits


def mmeb(sets: int, loops: int) -> bool:
    """Rank all sets, and a few of them, of all sizes, by the loop too."""
    looped = set(np.linspace(0, min(sets, len(UNIQUE)) - 1, loops).round().astype(int).tolist())
    ours: list[float] = []
    theirs: list[float] = []
    computed: list[float] = []
    agreed = 0
    highest = 0
    for index in range(sets):
        query, target, candidates = make_set(index)
        relevant, grades = [row[:1] for row in candidates], [np.ones(1, dtype=np.float32)] * QUERIES
        with Memory() as memory, timed(ours, computed):
            found = rank(query, target, candidates, relevant, grades, ties="reference")
            values = {name: per_query(name, found.position_QR, grades) for name in METRICS}
            bounds = interval(values["hit@1"])
        highest = max(highest, memory.peak)
        if index in looped:
            with timed(theirs):
                hits = loop(query, target, candidates)
            agreed += int((values["hit@1"] == hits).sum())
            low, high = (f"{100 * bound:.1f}" for bound in bounds)
            print(f"set {index}: {len(target):,} targets, hit@1 {100 * values['hit@1'].mean():.1f} [{low}, {high}], ", end="")
            print(f"ours {ours[-1]:.2f} s, loop {theirs[-1]:.2f} s, ratio {theirs[-1] / ours[-1]:.1f}")
    whole = sum(theirs) / len(theirs) * sets  # the loop takes as long for every number of distinct targets
    ratio = whole / sum(ours)
    print(
        f"the same hits for {agreed:,} of {len(theirs) * QUERIES:,} queries (the loop's float32 sums break ties between copies at random)"
    )
    print(
        f"{sets} sets: ours {sum(ours):.1f} s ({verdict(sum(ours) < SECONDS)}: under {SECONDS} s), {sum(computed):.1f} s of CPU; ", end=""
    )
    print(f"loop {whole:.0f} s from {len(theirs)} sets; ratio {ratio:.1f} ({verdict(ratio >= RATIO)}: at least {RATIO})")
    print(f"private memory {highest / 1e9:.2f} GB at most ({verdict(highest < BYTES)}: under {BYTES / 1e9:g} GB), the embeddings too")
    return sum(ours) < SECONDS and ratio >= RATIO and highest < BYTES


# -- a corpus ----------------------------------------------------------------------------------------------------------------------------


def make_corpus(path: Path, rows: int) -> tuple[NDArray[np.float32], list[NDArray[np.int64]], list[NDArray[np.float32]]]:
    """Write the corpus; returns queries, their one to three relevant rows, and grades. Every hundredth row is a copy of an earlier one."""
    stream = np.random.default_rng(0)
    corpus = np.lib.format.open_memmap(path, "w+", np.float32, (rows, CORPUS_DIMS))
    for start in range(0, rows, 10_000):
        block = unit(stream, min(10_000, rows - start), CORPUS_DIMS)
        block[99::100] = block[: len(block[99::100])]
        corpus[start : start + len(block)] = block
    corpus.flush()
    relevant = [stream.choice(rows, stream.integers(1, 4), replace=False) for _ in range(QUERIES)]
    grades = [stream.integers(1, 4, len(row)).astype(np.float32) for row in relevant]
    return near(stream, np.stack([corpus[row[0]] for row in relevant])), relevant, grades


def sort_all(
    query: NDArray[np.float32], corpus: Any, relevant: NDArray[np.int64], grades: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the relevant rows and the best rows, by sorting the scores of the whole corpus under the pessimistic rule."""
    exact = np.rint(query.astype(np.float64) * 2**26)
    scores = np.concatenate([np.rint(corpus[start : start + 5000] * 2.0**26) @ exact for start in range(0, len(corpus), 5000)])
    grade = np.zeros(len(corpus))
    grade[relevant] = grades
    order = np.lexsort((np.arange(len(corpus)), grade, -(scores / 2.0**52).astype(np.float32)))
    position = np.empty(len(corpus), dtype=np.int64)
    position[order] = np.arange(1, len(corpus) + 1)
    return position[relevant], order[:TOP]


def same(found: Ranking, query: int, positions: NDArray[np.int64], best: NDArray[np.int64]) -> bool:
    return np.array_equal(found.position_QR[query], positions) and np.array_equal(found.top_QK[query], best)


def million(rows: int, checks: int, folder: Path) -> bool:
    """Rank a corpus that lies in `folder`, and a few queries by sorting."""
    query, relevant, grades = make_corpus(folder / "corpus.npy", rows)
    corpus = np.load(folder / "corpus.npy", mmap_mode="r")
    seconds: list[float] = []
    computed: list[float] = []
    with Memory() as memory, timed(seconds, computed):
        found = rank(query, corpus, None, relevant, grades, top=TOP)
    print(f"{rows:,} x {CORPUS_DIMS} targets ({corpus.nbytes / 1e9:.1f} GB), {QUERIES:,} queries, top {TOP}: {seconds[0]:.1f} s, ", end="")
    print(f"{computed[0]:.1f} s of CPU, {2e-9 * rows * CORPUS_DIMS * QUERIES / seconds[0]:.0f} GFLOP/s in float64")
    print(f"private memory {memory.peak / 1e9:.2f} GB at most ({verdict(memory.peak < BYTES)}: under {BYTES / 1e9:g} GB), ", end="")
    print(f"mapped at a time {memory.mapped / 1e9:.2f} GB of files")
    chosen = np.linspace(0, QUERIES - 1, checks).astype(int)
    right = sum(same(found, q, *sort_all(query[q], corpus, relevant[q], grades[q])) for q in chosen)
    print(
        f"positions and top {TOP} equal to sorting the whole corpus for {right} of {checks} queries ({verdict(right == checks)}), ", end=""
    )
    print(f"ndcg_linear@10 {per_query('ndcg_linear@10', found.position_QR, grades).mean():.3f}")
    return right == checks and memory.peak < BYTES


def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--global", dest="whole", action="store_true", help="rank a corpus of a million instead")
    parser.add_argument("--sets", type=int, default=SETS, help="sets to rank")
    parser.add_argument("--loops", type=int, default=3, help="sets to rank by the loop too")
    parser.add_argument("--rows", type=int, default=CORPUS, help="rows of the corpus")
    parser.add_argument("--checks", type=int, default=10, help="queries to check by sorting the corpus")
    parser.add_argument("--folder", type=Path, help="where the corpus may lie; a temporary folder unless given")
    options = parser.parse_args()
    load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
    threads = os.environ.get("OMP_NUM_THREADS", "as many as cores")
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, threads: {threads}, load before: {load}, numpy {np.__version__}")
    if not options.whole:
        return mmeb(options.sets, min(options.loops, options.sets))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        return million(options.rows, options.checks, Path(folder))


if __name__ == "__main__":
    raise SystemExit(not main())
