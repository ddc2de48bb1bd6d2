"""Vectors on disk: every precision comes back within its stated error, shards are whole, and damage is named."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from vlm2vec import io
from vlm2vec.errors import InputError, ManifestError
from vlm2vec.io import write_json
from vlm2vec.ranking import rank
from vlm2vec.vectors import FORMAT, KIND, PRECISIONS, STORAGES, Layout, VectorFolder, iterate_vectors, read_vectors, shards_of

D = 21  # not a multiple of eight


def unit(count: int, seed: int = 0, dims: int = D) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, dims))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def plan(**changed: Any) -> dict[str, Any]:
    layout = {"dims": D, "precision": "float32", "storage": "safetensors"}
    return {"format": FORMAT, "kind": KIND, "model": {"fingerprint": "m"}, **layout, **changed}


def filled(folder: Path, rows: np.ndarray, size: int = 4, **changed: Any) -> VectorFolder:
    store = VectorFolder(folder, plan(**changed))
    store.begin()
    shards = shards_of(len(rows), size)
    for shard in shards:
        part = range(shard.first, shard.first + shard.items)
        store.put(shard, [f"i{index}" for index in part], rows[part], [])
    store.finish(shards)
    return store


# -- numbers -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_precision_comes_back_within_its_stated_error(tmp_path: Path, precision: str, storage: str) -> None:
    wanted = unit(10)
    filled(tmp_path / "v", wanted, precision=precision, storage=storage)
    ids, rows = read_vectors(tmp_path / "v", verify=True)
    found = np.asarray(rows)
    assert ids == [f"i{index}" for index in range(10)] and found.shape == rows.shape == (10, D) and found.dtype == np.float32
    peak = np.abs(wanted).max(axis=1, keepdims=True)
    bound = {"float32": 0, "float16": 2.0**-12, "int8": peak / 254 * (1 + 1e-5), "binary": 1}[precision]
    assert (np.abs(found - wanted) <= bound).all()
    if precision == "binary":
        hamming = ((wanted[0] > 0) != (wanted[1:] > 0)).sum(axis=1)
        np.testing.assert_allclose(found[1:] @ found[0], 1 - 2 * hamming / D, atol=1e-6)


def test_what_is_documented_is_what_lies_there(tmp_path: Path) -> None:
    wanted = unit(3)
    filled(tmp_path / "i", wanted, precision="int8")
    tensors = load_file(tmp_path / "i" / "part-00000.safetensors")
    assert tensors["embeddings"].dtype == np.int8 and tensors["factor"].dtype == np.float32 and tensors["factor"].shape == (3,)
    assert (np.abs(tensors["embeddings"]).max(axis=1) == 127).all()
    assert np.abs(tensors["embeddings"] * tensors["factor"][:, None] - wanted).max() <= tensors["factor"].max() / 2 * (1 + 1e-5) <= 1 / 250
    filled(tmp_path / "b", wanted, precision="binary", storage="numpy")
    bits = np.load(tmp_path / "b" / "part-00000.npy")
    assert bits.shape == (3, 3) and bits.dtype == np.uint8
    assert bits[0, 0] == sum(1 << (7 - place) for place in range(8) if wanted[0, place] > 0)
    filled(tmp_path / "n", wanted, precision="int8", storage="numpy")
    assert np.load(tmp_path / "n" / "part-00000.factor.npy").tolist() == tensors["factor"].tolist()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bytes_of_a_row(precision: str) -> None:
    layout = Layout(D, precision)
    assert layout.row_bytes == sum(array.nbytes for array in layout.pack(unit(5)).values()) / 5


def test_fewer_dims_have_unit_length() -> None:
    rows = unit(4)
    short = Layout(5).pack(rows)["embeddings"]
    np.testing.assert_allclose(short, rows[:, :5] / np.linalg.norm(rows[:, :5], axis=1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("changed", [{"precision": "int4"}, {"storage": "csv"}])
def test_an_unknown_layout_lists_the_known(changed: dict[str, str]) -> None:
    with pytest.raises(InputError, match="there are float32, float16|there are safetensors, numpy"):
        Layout(D, **changed)


# -- reading -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_rows_are_those_of_the_array(tmp_path: Path, precision: str, storage: str) -> None:
    filled(tmp_path, unit(11), precision=precision, storage=storage)
    rows = read_vectors(tmp_path)[1]
    whole = np.asarray(rows)
    for index in (slice(2, 9), slice(4, 8), slice(None, None, -3), slice(5, 5), slice(8, 99), [3, 0, 10, 3], np.array([9, -1]), []):
        assert np.array_equal(rows[index], whole[index if len(np.atleast_1d(index)) else slice(0)]), index
    right = whole[:, 0] > 0
    assert np.array_equal(rows[7], whole[7]) and np.array_equal(rows[-1], whole[-1]) and np.array_equal(rows[right], whole[right])
    assert len(rows) == 11 and rows.ndim == 2 and rows.dtype == np.float32
    for beyond in (11, -12):
        with pytest.raises(IndexError):
            rows[beyond]
    assert np.array_equal(pickle.loads(pickle.dumps(rows))[3:6], whole[3:6])


def test_a_folder_is_searched_without_being_loaded(tmp_path: Path) -> None:
    filled(tmp_path, unit(11))
    queries, relevant = unit(2, seed=1), [np.array([3], np.int32), np.array([9], np.int32)]
    grades = [np.ones(1, np.float32)] * 2
    found, wanted = (rank(queries, targets, None, relevant, grades) for targets in (read_vectors(tmp_path)[1], unit(11)))
    assert [list(top) for top in found.top_QK] == [list(top) for top in wanted.top_QK]


def test_one_shard_after_the_other(tmp_path: Path) -> None:
    filled(tmp_path, unit(11))
    parts = list(iterate_vectors(tmp_path))
    assert [len(ids) for ids, _ in parts] == [4, 4, 3] and np.array_equal(np.concatenate([rows for _, rows in parts]), unit(11))


def test_shards_of_which_nothing_is_left_are_passed_over(tmp_path: Path) -> None:
    store = VectorFolder(tmp_path, plan())
    store.begin()
    shards = shards_of(6, 2)
    for shard, rows in zip(shards, (unit(2), unit(0), unit(1)), strict=True):
        store.put(shard, list(range(len(rows))), rows, [])
    store.finish(shards)
    ids, rows = read_vectors(tmp_path)
    assert ids == [0, 1, 0] and np.array_equal(rows[:], np.concatenate([unit(2), unit(1)]))
    assert [len(ids) for ids, _ in iterate_vectors(tmp_path)] == [2, 0, 1]


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    filled(tmp_path, unit(3))
    code = f"import sys; from vlm2vec import read_vectors; print(read_vectors({str(tmp_path)!r})[1].shape, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.split() == ["(3,", f"{D})", "False"], done.stderr


# -- refusals and damage -----------------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_ours_or_not_finished(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no vectors of ours"):
        read_vectors(tmp_path)
    VectorFolder(tmp_path, plan()).begin()
    with pytest.raises(InputError, match="is not finished: run the same command again"):
        next(iterate_vectors(tmp_path))
    write_json(tmp_path / "manifest.json", {"format": 1, "files": {}})
    with pytest.raises(InputError, match="is not the manifest of vectors"):
        read_vectors(tmp_path)
    write_json(tmp_path / "manifest.json", {**plan(format=9), "shards": []})
    with pytest.raises(InputError, match="format 9; this version reads format 1"):
        read_vectors(tmp_path)


def test_another_plan_is_refused_naming_the_field(tmp_path: Path) -> None:
    filled(tmp_path / "v", unit(2))
    for changed, words in {
        "fingerprint": ({"model": {"fingerprint": "other"}}, 'another model.fingerprint: "m" there, "other" here'),
        "dims": ({"dims": 3}, "another dims: 21 there, 3 here"),
        "new": ({"later": 1}, "another later: null there, 1 here"),
    }.values():
        with pytest.raises(InputError, match=words):
            VectorFolder(tmp_path / "v", plan(**changed)).begin()
    VectorFolder(tmp_path / "v", plan()).begin()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="holds thesis.tex but no plan.json"):
        VectorFolder(tmp_path / "mine", plan()).begin()


def tear(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [tear, flip, Path.unlink])
@pytest.mark.parametrize("name", ["part-00000.safetensors", "part-00000.ids.jsonl", "part-00000.json"])
def test_a_damaged_shard_is_not_finished(tmp_path: Path, name: str, damage: Any, caplog: pytest.LogCaptureFixture) -> None:
    store = filled(tmp_path, unit(8))
    damage(tmp_path / name)
    first, second = shards_of(8, 4)
    assert not store.finished(first) and store.finished(second)
    assert (name in caplog.text) is (name != "part-00000.json" or damage is not Path.unlink)
    if name != "part-00000.json":
        with pytest.raises(ManifestError, match=name):
            read_vectors(tmp_path, verify=True)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("damage", [tear, Path.unlink, lambda file: file.write_bytes(b"")])
def test_torn_rows_are_named_when_read(tmp_path: Path, damage: Any, storage: str) -> None:
    filled(tmp_path, unit(8), storage=storage)
    file = next(path for path in tmp_path.glob("part-00001.*") if path.suffix in (".npy", ".safetensors"))
    damage(file)
    rows = read_vectors(tmp_path)[1]
    assert rows[:4].shape == (4, D)
    with pytest.raises(ManifestError, match=file.name):
        rows[:]


def test_ids_that_do_not_fit_are_named(tmp_path: Path) -> None:
    filled(tmp_path, unit(8))
    (tmp_path / "part-00001.ids.jsonl").write_text('"a"\n')
    with pytest.raises(ManifestError, match="part-00001.ids.jsonl has 1 ids for 4 rows"):
        read_vectors(tmp_path)


def test_the_manifest_counts_and_lists(tmp_path: Path) -> None:
    filled(tmp_path, unit(6))
    found = json.loads((tmp_path / "manifest.json").read_text())
    assert (found["rows"], found["skipped"], found["shards"][1]) == (6, 0, {"name": "part-00001", "first": 4, "rows": 2})
    assert sorted(found["files"]) == [
        "part-00000.ids.jsonl", "part-00000.safetensors", "part-00001.ids.jsonl", "part-00001.safetensors", "skipped.jsonl",
    ]  # fmt: skip


def test_rows_that_can_be_seen_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file with the embeddings is put in place after all that goes with it, and the receipt last."""
    written: list[str] = []
    original = io.write_atomic
    monkeypatch.setattr(io, "write_atomic", lambda path, data: written.append(path.name) or original(path, data))
    monkeypatch.setattr(io, "write_json", lambda path, data: io.write_atomic(path, json.dumps(data)))
    filled(tmp_path, unit(4), precision="int8", storage="numpy")
    assert written[1:5] == ["part-00000.ids.jsonl", "part-00000.factor.npy", "part-00000.npy", "part-00000.json"]


def test_a_receipt_that_was_changed_or_is_of_another_plan_does_not_count(tmp_path: Path) -> None:
    store, other = filled(tmp_path / "v", unit(4)), filled(tmp_path / "w", unit(4), model={"fingerprint": "other"})
    shard = shards_of(4, 4)[0]
    file = tmp_path / "v" / "part-00000.json"
    own = file.read_text()
    for content in (own.replace('"rows": 4', '"rows": 3'), "[]", "{}", (other.folder / "part-00000.json").read_text()):
        file.write_text(content)
        assert not store.finished(shard)
    file.write_text(own)
    assert store.finished(shard)
