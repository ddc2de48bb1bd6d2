"""Approximate search: scores are exact, recall is what it says, and looking everywhere is exact search."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from vlm2vec import approximate
from vlm2vec.errors import InputError, ManifestError
from vlm2vec.nearest import nearest


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    pytest.importorskip("faiss")
    draw = np.random.default_rng(0)
    return unit(draw.normal(size=(40, 32))[draw.integers(0, 40, 3000)] + 0.4 * draw.normal(size=(3000, 32)))


def test_recall_is_as_measured_and_scores_are_exact(tmp_path: Path, rows: np.ndarray) -> None:
    dead = np.zeros(len(rows), bool)
    dead[::7] = True
    made = approximate.build(rows, tmp_path / "lists", dead)
    assert made["recall"] >= approximate.WANTED and made["probes"] <= made["lists"] == int(np.sqrt(np.sum(~dead)))
    queries = unit(rows[1::50] + 0.05 * np.random.default_rng(1).normal(size=(60, 32)))
    exact, hits = nearest(rows, queries, 10, dead), 0
    index = approximate.opened(tmp_path / "lists", 32, len(rows))
    for query, (true, _), (found, score) in zip(queries, exact, approximate.search(index, rows, queries, 10, made["probes"]), strict=True):
        assert not dead[found].any() and np.array_equal(score, np.sort(score)[::-1])
        assert np.allclose(score, rows[found].astype(np.float64) @ query.astype(np.float64), atol=1e-15)
        hits += len(set(true.tolist()) & set(found.tolist()))
    assert hits / 600 > 0.9


def test_fewer_probes_find_less(tmp_path: Path, rows: np.ndarray) -> None:
    approximate.build(rows, tmp_path / "lists", np.zeros(len(rows), bool))
    index = approximate.opened(tmp_path / "lists", 32, len(rows))
    exact = [set(found.tolist()) for found, _ in nearest(rows, rows[:50], 10)]
    counts = []
    for probes in (1, 8, index.nlist):
        found = approximate.search(index, rows, rows[:50], 10, probes)
        counts.append(sum(len(true & set(each.tolist())) for true, (each, _) in zip(exact, found, strict=True)))
    assert counts[0] < counts[1] <= counts[2] and counts[2] > 495  # 8-bit numbers may lose one behind four times as many


def test_where_many_lists_are_needed_few_are_looked_into_and_recall_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without clusters, of which one list in eight finds far less than is wanted."""
    pytest.importorskip("faiss")
    asked: list[np.ndarray] = []
    monkeypatch.setattr(approximate, "FEW", 2)
    monkeypatch.setattr(approximate, "nearest", lambda rows, queries, *rest: asked.append(queries) or nearest(rows, queries, *rest))
    rows = unit(np.random.default_rng(2).normal(size=(3000, 32)))
    made = approximate.build(rows, tmp_path / "lists", np.zeros(3000, bool))
    assert (made["lists"], made["probes"], made["trials"]) == (54, 54 // 8, approximate.TRIALS)
    [queries] = asked
    assert np.abs((queries @ rows.T).max(axis=1) - 1.25**-0.5).max() < 0.1, "disturbed by half their length"
    found = approximate.search(approximate.opened(tmp_path / "lists", 32, 3000), rows, queries, 10, made["probes"])
    truth = nearest(rows, queries, 10)
    assert made["recall"] == np.mean([np.isin(true, each) for (true, _), (each, _) in zip(truth, found, strict=True)]) < 0.8


def test_a_few_rows(tmp_path: Path, rows: np.ndarray) -> None:
    made = approximate.build(rows[:3], tmp_path / "lists", np.zeros(3, bool))
    [(index, _)] = approximate.search(approximate.opened(tmp_path / "lists", 32, 3), rows[:3], rows[:1], 10, made["probes"])
    assert made["recall"] == 1 and sorted(index.tolist()) == [0, 1, 2]


def test_a_damaged_file_and_a_missing_library(tmp_path: Path, rows: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lists").write_bytes(b"nothing of the kind")
    for name in ("lists", "gone"):
        with pytest.raises(ManifestError, match=f"{name} is missing or damaged .*run vlm2vec index --approximate again"):
            approximate.opened(tmp_path / name, 32, 3000)
    approximate.build(rows, tmp_path / "lists", np.zeros(len(rows), bool))
    whole = (tmp_path / "lists").read_bytes()
    for size in (0, 3, 200, 5000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "short").write_bytes(whole[:size])
        with pytest.raises(ManifestError, match="short is missing or damaged"):
            approximate.opened(tmp_path / "short", 32, 3000)
    for dims, count in ((31, 3000), (32, 2999)):
        with pytest.raises(ManifestError, match="lists is of 3,000 rows of 32 numbers and belongs to another index"):
            approximate.opened(tmp_path / "lists", dims, count)
    with pytest.raises(ManifestError, match="are damaged: they name row 2,999 of 2,999"):
        approximate.search(approximate.opened(tmp_path / "lists", 32, 3000), rows[:-1], rows[-1:], 10, 1)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r"pip install 'vlm2vec\[search\]'"):
        approximate.faiss()
