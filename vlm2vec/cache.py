"""Embeddings on disk, found again by what was embedded and by what embedded it; several processes may fill one folder at once.

The key of an item is a sha256 over the model's fingerprint, the whole rendered prompt, the bytes of every picture and the version of the
picture decoder, so that changing any of them misses. Rows live in shards that are written once and never changed:

    <directory>/<model>/<shard>.safetensors   "embeddings" (N, D) float32
    <directory>/<model>/<shard>.json          the N keys, the sha256 of the rows and a digest of this list itself; published last

A shard counts once its list is there. A torn or altered shard is named in a warning and ignored: its items are simply encoded again.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vlm2vec import prompts
from vlm2vec.data import images
from vlm2vec.data.types import Item
from vlm2vec.errors import EnvError, InputError
from vlm2vec.io import digest, read_json, sha256_bytes, sha256_file, write_atomic, write_json
from vlm2vec.log import get_logger

FORMAT = 1
TENSOR = "embeddings"
logger = get_logger(__name__)


def content_digest(item: Item, pictures: Sequence[str]) -> str:
    """What an item shows any model: its prompt and instruction, the content of its pictures in order, and the version of their decoder.

    `pictures` are their `images.content_key`. Neither paths nor names take part: copies of an item are the same item.
    """
    prompt = prompts.render(item, keep_stray=True)
    return digest({"prompt": prompt, "instruction": item.instruction, "pictures": list(pictures), "decode": images.DECODE_VERSION})


@dataclass(frozen=True)
class Place:
    """Where a row lies: which shard, which row of it."""

    shard: str
    row: int


class EmbeddingCache:
    """Rows of float32 by item key for one model. Holds the keys in memory and reads at most one shard at a time.

    `model_key` is the encoder's fingerprint: weights, adapter, processor, pooling, dtype and prompt version. When two processes encoded the
    same item, the shard that was seen first wins.
    """

    def __init__(self, directory: Path, model_key: str) -> None:
        self.model_key = model_key
        self.directory = Path(directory) / sha256_bytes(model_key.encode())[:16]
        self._places: dict[str, Place] = {}
        self._seen: set[str] = set()
        self.refresh()

    def key(self, content: str) -> str:
        """The cache key of an item from its `content_digest`."""
        return digest({"model": self.model_key, "content": content})

    def refresh(self) -> None:
        """Take in the shards that appeared since the last look, this process's and others', after checking each against its sha256."""
        for listing in sorted(self.directory.glob("*.json")):
            if listing.stem not in self._seen:
                self._seen.add(listing.stem)
                self._index(listing)

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Those of `keys` with no row yet, in the order given; looks for new shards of other processes first."""
        self.refresh()
        return [key for key in keys if key not in self._places]

    def get(self, keys: Sequence[str]) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
        """`(found, rows)`: found (N,) bool and rows (N, D) float32, zero where nothing was found; D is 0 when nothing was.

        Raises `EnvError` when shards disagree about D.
        """
        wanted: dict[str, list[int]] = {}
        for index, key in enumerate(keys):
            if key in self._places:
                wanted.setdefault(self._places[key].shard, []).append(index)
        found = np.zeros(len(keys), dtype=bool)
        rows = np.zeros((len(keys), 0), dtype=np.float32)
        for shard, indices in wanted.items():
            values = self._read(shard)
            if values is None:
                continue
            if not rows.shape[1]:
                rows = np.zeros((len(keys), values.shape[1]), dtype=np.float32)
            if values.shape[1] != rows.shape[1]:
                widths = f"{rows.shape[1]} and of {values.shape[1]}"
                raise EnvError(f"{self.directory} holds embeddings of {widths} dimensions for one model; move that folder away, run again")
            rows[indices] = values[[self._places[keys[index]].row for index in indices]]
            found[indices] = True
        return found, rows

    def put(self, keys: Sequence[str], rows: NDArray[np.float32]) -> None:
        """Publish one shard: `rows` (N, D) for N distinct keys.

        Raises `EnvError` when the disk refuses (earlier shards stay whole) and `ValueError` for keys and rows that do not fit.
        """
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        if rows.ndim != 2 or len(rows) != len(keys) or len(set(keys)) != len(keys):
            raise ValueError(f"{len(keys)} keys ({len(set(keys))} distinct) for rows of shape {rows.shape}")
        name = f"{time.time_ns():020d}-{os.getpid()}-{secrets.token_hex(4)}"
        data = save({TENSOR: rows})
        listing = {"format": FORMAT, "model": self.model_key, "sha256": sha256_bytes(data), "keys": list(keys)}
        write_atomic(self.directory / f"{name}.safetensors", data)
        write_json(self.directory / f"{name}.json", {**listing, "digest": digest(listing)})
        self._seen.add(name)
        self._add(name, keys)

    def _index(self, listing: Path) -> None:
        """Add a shard's keys if both of its files are what was written, else warn."""
        try:
            keys = _checked_keys(listing, self.model_key)
        except (InputError, OSError) as error:
            logger.warning("ignoring cache shard %s, its items are encoded again: %s", listing.with_suffix(".safetensors"), error)
        else:
            self._add(listing.stem, keys)

    def _add(self, shard: str, keys: Sequence[str]) -> None:
        for row, key in enumerate(keys):
            self._places.setdefault(key, Place(shard, row))

    def _read(self, shard: str) -> NDArray[np.float32] | None:
        """The rows of a shard, or None, with a warning and its keys forgotten, when it vanished since it was checked."""
        path = self.directory / f"{shard}.safetensors"
        try:
            with safe_open(path, framework="numpy") as tensors:
                return tensors.get_tensor(TENSOR)
        except (OSError, SafetensorError) as error:
            logger.warning("cache shard %s cannot be read any more, its items are encoded again: %s", path, error)
            self._places = {key: place for key, place in self._places.items() if place.shard != shard}
            return None


def _checked_keys(listing: Path, model_key: str) -> list[str]:
    """The keys of a shard whose list and rows are both intact; raises `InputError` with the reason otherwise."""
    content: Any = read_json(listing)
    if not isinstance(content, dict) or content.pop("digest", None) != digest(content):
        raise InputError("the list of keys does not match its own digest")
    if content["format"] != FORMAT or content["model"] != model_key:
        raise InputError(f"it was written for format {content['format']} or another model")
    rows = listing.with_suffix(".safetensors")
    if not rows.is_file():
        raise InputError("the rows are missing")
    if sha256_file(rows) != content["sha256"]:
        raise InputError(f"the rows do not match their sha256 ({rows.stat().st_size} bytes)")
    return content["keys"]
