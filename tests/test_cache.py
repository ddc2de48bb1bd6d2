from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.suites import Compass
from vlm2vec import cache as module
from vlm2vec.cache import EmbeddingCache, content_digest
from vlm2vec.data import images
from vlm2vec.data.images import content_key
from vlm2vec.data.types import ImageRef, Item
from vlm2vec.errors import EnvError


def rows(count: int, seed: int = 0, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def keys(count: int, kind: str = "k") -> list[str]:
    return [f"{kind}{index}" for index in range(count)]


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A cache of three shards of four rows for the model "m"."""
    cache = EmbeddingCache(tmp_path, "m")
    for part in range(3):
        cache.put(keys(12)[4 * part : 4 * part + 4], rows(12)[4 * part : 4 * part + 4])
    return tmp_path


def shards(directory: Path, kind: str = "safetensors") -> list[Path]:
    return sorted(directory.rglob(f"*.{kind}"))


# -- keys --------------------------------------------------------------------------------------------------------------------------------

MODEL = {
    "weights": "w", "adapter": "a", "revision": "r", "processor": "p",
    "pooling": "last", "dtype": "float32", "prompts": 1, "max_tokens": 512,
}  # fmt: skip
ITEM = Item("a red\nfish", (ImageRef(b"one"), ImageRef(b"two")), "Find it.")
OTHER_ITEMS = [
    dataclasses.replace(ITEM, text="a red fish"),
    dataclasses.replace(ITEM, text="<|image_2|><|image_1|>\na red\nfish"),
    dataclasses.replace(ITEM, instruction="Find it!"),
    dataclasses.replace(ITEM, images=(ImageRef(b"one"), ImageRef(b"twO"))),
    dataclasses.replace(ITEM, images=(ImageRef(b"two"), ImageRef(b"one"))),
    dataclasses.replace(ITEM, images=(ImageRef(b"one"),)),
]


def key_of(item: Item, directory: Path, **model: Any) -> str:
    content = content_digest(item, [content_key(image) for image in item.images])
    return EmbeddingCache(directory, Compass(**{**MODEL, **model}).fingerprint()).key(content)


@pytest.mark.parametrize("field", MODEL)
def test_another_model_misses(tmp_path: Path, field: str) -> None:
    assert key_of(ITEM, tmp_path, **{field: "other"}) != key_of(ITEM, tmp_path)


@pytest.mark.parametrize("other", OTHER_ITEMS)
def test_another_item_misses(tmp_path: Path, other: Item) -> None:
    assert key_of(other, tmp_path) != key_of(ITEM, tmp_path)


def test_another_decoder_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(ITEM, tmp_path)
    monkeypatch.setattr(images, "DECODE_VERSION", images.DECODE_VERSION + 1)
    assert key_of(ITEM, tmp_path) != before


def test_another_place_or_label_hits(tmp_path: Path) -> None:
    (tmp_path / "copy.png").write_bytes(b"one")
    moved = dataclasses.replace(ITEM, images=(ImageRef(tmp_path / "copy.png", "row 7"), ImageRef(b"two")))
    assert key_of(moved, tmp_path) == key_of(ITEM, tmp_path)


# -- rows --------------------------------------------------------------------------------------------------------------------------------


def test_rows_come_back_bit_for_bit_in_any_order(filled: Path) -> None:
    cache = EmbeddingCache(filled, "m")
    order = np.random.default_rng(1).permutation(12)
    found, values = cache.get([keys(12)[index] for index in order])
    assert found.all() and values.dtype == np.float32 and values.tobytes() == rows(12)[order].tobytes()


def test_what_is_not_there_is_said(filled: Path) -> None:
    cache = EmbeddingCache(filled, "m")
    assert cache.missing(["x", "k3", "y"]) == ["x", "y"]
    found, values = cache.get(["x", "k3"])
    assert found.tolist() == [False, True] and values[0].tolist() == [0] * 16
    found, values = EmbeddingCache(filled, "another").get(["k3"])
    assert not found.any() and values.shape == (1, 0)


def test_the_shard_seen_first_wins(tmp_path: Path) -> None:
    first, second = EmbeddingCache(tmp_path, "m"), EmbeddingCache(tmp_path, "m")
    first.put(["k"], rows(1, seed=1))
    second.put(["k", "l"], rows(2, seed=2))
    assert first.missing(["l"]) == []  # sees the other's shard
    assert first.get(["k"])[1].tobytes() == EmbeddingCache(tmp_path, "m").get(["k"])[1].tobytes() == rows(1, seed=1).tobytes()


@pytest.mark.parametrize(("names", "shape"), [(["a"], (2, 3)), (["a", "a"], (2, 3)), (["a", "b"], (2,))])
def test_rows_that_do_not_fit_their_keys_are_refused(tmp_path: Path, names: list[str], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"{len(names)} keys"):
        EmbeddingCache(tmp_path, "m").put(names, np.zeros(shape, dtype=np.float32))
    assert shards(tmp_path) == []


# -- damage ------------------------------------------------------------------------------------------------------------------------------


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def tear(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "bit in the rows": lambda data, listing: flip(data, -5),
    "bit in the header": lambda data, listing: flip(data, 20),
    "torn rows": lambda data, listing: tear(data),
    "empty rows": lambda data, listing: data.write_bytes(b""),
    "no rows": lambda data, listing: data.unlink(),
    "torn list": lambda data, listing: listing.write_bytes(listing.read_bytes()[:-9]),
    "list is not JSON of ours": lambda data, listing: listing.write_text("[]"),
    "a key was changed": lambda data, listing: listing.write_text(listing.read_text().replace("k5", "k9")),
    "rows of another shard": lambda data, listing: shutil.copy(shards(data.parent)[0], data),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_named_and_ignored(filled: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    bad = shards(filled)[1]
    DAMAGE[damage](bad, bad.with_suffix(".json"))
    with caplog.at_level(logging.WARNING, "vlm2vec"):
        cache = EmbeddingCache(filled, "m")
    assert [str(bad) in record.message for record in caplog.records] == [True]
    assert cache.missing(keys(12)) == keys(12)[4:8]
    cache.put(keys(12)[4:8], rows(12)[4:8])
    assert EmbeddingCache(filled, "m").get(keys(12))[1].tobytes() == rows(12).tobytes()


@pytest.mark.parametrize("position", range(0, 400, 13))
def test_no_flipped_bit_gets_through(filled: Path, position: int) -> None:
    for file in (shards(filled)[0], shards(filled, "json")[1]):
        flip(file, position % file.stat().st_size)
    cache = EmbeddingCache(filled, "m")
    found, values = cache.get(keys(12))
    assert found.tolist() == [False] * 8 + [True] * 4
    assert values[8:].tobytes() == rows(12)[8:].tobytes()


def test_a_list_for_another_model_is_ignored(filled: Path) -> None:
    other = EmbeddingCache(filled, "other").directory
    shutil.copytree(EmbeddingCache(filled, "m").directory, other)
    assert EmbeddingCache(filled, "other").missing(keys(1)) == keys(1)


def test_a_shard_that_vanishes_in_use_is_missing_again(filled: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = EmbeddingCache(filled, "m")
    shards(filled)[2].unlink()
    found, values = cache.get(keys(12))
    assert found.tolist() == [True] * 8 + [False] * 4 and values[:8].tobytes() == rows(12)[:8].tobytes()
    assert str(shards(filled, "json")[2].with_suffix(".safetensors")) in caplog.text
    assert cache.missing(keys(12)) == keys(12)[8:]


def test_a_full_disk_is_said_and_loses_nothing(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for point in ("after-write", "before-rename"):
        for count in (1, 2):  # the rows, the list
            monkeypatch.setenv("VLM2VEC_FAULT", f"{point}:{count}:enospc")
            with pytest.raises(EnvError, match="No space left"):
                EmbeddingCache(filled, "m").put(["new"], rows(1))
            monkeypatch.delenv("VLM2VEC_FAULT")
            cache = EmbeddingCache(filled, "m")
            assert cache.missing([*keys(12), "new"]) == ["new"] and cache.get(keys(12))[1].tobytes() == rows(12).tobytes()


def test_four_processes_fill_one_folder(tmp_path: Path) -> None:
    children = []
    for number in range(4):
        if not (child := os.fork()):
            try:
                cache = EmbeddingCache(tmp_path, "m")
                for index in range(number, 40):  # all four write most of the keys
                    cache.put([f"k{index}"], rows(1, seed=index))
            finally:
                os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    cache = EmbeddingCache(tmp_path, "m")
    found, values = cache.get(keys(40))
    assert found.all() and values.tobytes() == np.concatenate([rows(1, seed=index) for index in range(40)]).tobytes()
    assert len(shards(tmp_path)) == len(shards(tmp_path, "json")) == 40 + 39 + 38 + 37


def test_a_lookup_holds_one_shard_at_a_time(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    original = module.EmbeddingCache._read
    monkeypatch.setattr(module.EmbeddingCache, "_read", lambda self, shard: opened.append(shard) or original(self, shard))
    EmbeddingCache(filled, "m").get(keys(12)[::-1] + keys(12)[4:8])
    assert len(opened) == len(set(opened)) == 3


def test_the_list_says_what_it_lists(filled: Path) -> None:
    listing = json.loads(shards(filled, "json")[0].read_text())
    assert listing["keys"] == keys(4) and listing["model"] == "m" and set(listing) == {"format", "model", "sha256", "keys", "digest"}
