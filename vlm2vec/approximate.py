"""Approximate search: the rows sorted into lists by the nearest of some centres (an inverted file, built and read by faiss).

A query looks into the lists of the `probes` nearest centres, where rows lie as 8-bit numbers; the best of those are then scored exactly
(`nearest.among`), so that a score is always exact and what may be missed is a row in another list. How many are missed is measured.

Shape letters: Q queries, N rows, D numbers of a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm2vec import log
from vlm2vec.errors import InputError, ManifestError
from vlm2vec.io.disk import DiskErrors, fsync_path
from vlm2vec.nearest import among, nearest

POINTS = 64  # rows a centre that the centres are fitted to
FETCHED = 4  # times as many rows are scored exactly as are asked for
TILE = 4096
TRIALS = 50  # rows whose neighbours are looked for to measure recall
WANTED = 0.95  # of the true best ten
FEW, SHARE = 64, 8  # so many lists are looked into at any rate, and of more at most one in eight: else exact search is as fast
TOP = 10


def faiss() -> Any:
    """The library. Raises InputError where it is not installed."""
    try:
        import faiss
    except ImportError:
        raise InputError("approximate search needs faiss: pip install 'vlm2vec[search]'; without --approximate search is exact") from None
    return faiss


def build(rows_ND: NDArray[np.float32], file: Path, dead_N: NDArray[np.bool_], progress: bool | None = None) -> dict[str, Any]:
    """Write the lists to `file`; returns how they are to be read, and what was measured: {"lists", "probes", "recall", "trials"}.

    There are about as many centres as the root of N. The number of probes is the first power of two with a recall of WANTED, or one list in
    eight if that is less; what is to be found are the true best ten of TRIALS rows, each disturbed by noise half as long as itself.
    """
    library = faiss()
    live = np.flatnonzero(~dead_N)
    lists = max(1, int(np.sqrt(len(live))))
    draw = np.random.default_rng(0)
    sample = np.sort(draw.choice(live, min(len(live), POINTS * lists), replace=False))
    kind, product = library.ScalarQuantizer.QT_8bit, library.METRIC_INNER_PRODUCT
    index = library.IndexIVFScalarQuantizer(library.IndexFlatIP(rows_ND.shape[1]), rows_ND.shape[1], lists, kind, product)
    index.cp.min_points_per_centroid = 1
    index.train(rows_ND[sample])
    with log.progress(len(live), "sorting into lists", "row", enabled=progress) as bar:
        for start in range(0, len(live), TILE):
            part = live[start : start + TILE]
            index.add_with_ids(rows_ND[part], part)
            bar.update(len(part))
    with DiskErrors(file, file.parent, lambda: len(live) * rows_ND.shape[1]):
        library.write_index(index, str(file))
        fsync_path(file)
    return {"lists": lists, **_measured(index, rows_ND, sample[:: max(1, len(sample) // TRIALS)][:TRIALS], dead_N, draw)}


def search(index: Any, rows_ND: NDArray[np.float32], query_QD: NDArray[np.float32], top: int, probes: int) -> list[Any]:
    """As `nearest.nearest`, of the rows in the lists that are looked into. Raises ManifestError where they name rows that are not there."""
    index.nprobe = probes
    _, found_QA = index.search(np.ascontiguousarray(query_QD), FETCHED * top)
    if (found_QA >= len(rows_ND)).any():
        raise _unusable("the lists for approximate search", f"are damaged: they name row {found_QA.max():,} of {len(rows_ND):,}")
    return [among(rows_ND, query_D, found_A[found_A >= 0], top) for query_D, found_A in zip(query_QD, found_QA, strict=True)]


def opened(file: Path, dims: int, rows: int) -> Any:
    """The lists, mapped into memory, of at most `rows` rows of `dims` numbers. Raises ManifestError where the file is not that."""
    library = faiss()
    try:
        index = library.read_index(str(file), library.IO_FLAG_MMAP)
    except RuntimeError as error:
        raise _unusable(file, f"is missing or damaged ({str(error).strip().splitlines()[-1][:120]})") from None
    if index.d != dims or index.ntotal > rows:
        raise _unusable(file, f"is of {index.ntotal:,} rows of {index.d} numbers and belongs to another index ({rows:,} of {dims})")
    return index


def _unusable(place: object, what: str) -> ManifestError:
    return ManifestError(f"{place} {what}; run vlm2vec index --approximate again")


def _measured(
    index: Any, rows_ND: NDArray[np.float32], trial: NDArray[np.int64], dead_N: NDArray[np.bool_], draw: np.random.Generator
) -> dict[str, Any]:
    """The number of probes, and the share of the true best that they find."""
    noise_QD = draw.standard_normal((len(trial), rows_ND.shape[1])).astype(np.float32)
    query_QD = rows_ND[trial] + noise_QD / (2 * np.linalg.norm(noise_QD, axis=1, keepdims=True))
    query_QD /= np.linalg.norm(query_QD, axis=1, keepdims=True)
    truth = [set(index_K.tolist()) for index_K, _ in nearest(rows_ND, query_QD, TOP, dead_N)]
    probes, most = 1, min(index.nlist, max(FEW, index.nlist // SHARE))
    while True:
        found = search(index, rows_ND, query_QD, TOP, probes)
        hits = sum(len(true & set(index_K.tolist())) for true, (index_K, _) in zip(truth, found, strict=True))
        recall = hits / sum(map(len, truth))
        if recall >= WANTED or probes >= most:
            return {"probes": probes, "recall": recall, "trials": len(trial)}
        probes = min(2 * probes, most)
