"""Embeddings on disk, found again by what was embedded and by what embedded it; several processes may fill one folder at once.

The key of an item is a sha256 over the model's fingerprint, the whole rendered prompt, the bytes of every picture and the version of the
picture decoder, so that changing any of them misses. Rows live in `shards`, as "embeddings" (N, D) float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vlm2vec import prompts
from vlm2vec.data import images
from vlm2vec.data.types import Item
from vlm2vec.errors import EnvError
from vlm2vec.io import digest
from vlm2vec.log import get_logger
from vlm2vec.shards import Shards

TENSOR = "embeddings"
logger = get_logger(__name__)


def content_digest(item: Item, pictures: Sequence[str]) -> str:
    """What an item shows any model: its prompt and instruction, the content of its pictures in order, and the version of their decoder.

    `pictures` are their `images.content_key`. Neither paths nor names take part: copies of an item are the same item.
    """
    prompt = prompts.render(item, keep_stray=True)
    return digest({"prompt": prompt, "instruction": item.instruction, "pictures": list(pictures), "decode": images.DECODE_VERSION})


class EmbeddingCache(Shards):
    """Rows of float32 by item key for one model. Holds the keys in memory and reads at most one shard at a time.

    `model_key` is the encoder's fingerprint: weights, adapter, processor, pooling, dtype and prompt version.
    """

    def key(self, content: str) -> str:
        """The cache key of an item from its `content_digest`."""
        return digest({"model": self.model_key, "content": content})

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
        self.publish(keys, save({TENSOR: rows}))

    def _read(self, shard: str) -> NDArray[np.float32] | None:
        """The rows of a shard, or None, with a warning and its keys forgotten, when it vanished since it was checked."""
        path = self.tensors_of(shard)
        try:
            with safe_open(path, framework="numpy") as tensors:
                return tensors.get_tensor(TENSOR)
        except (OSError, SafetensorError) as error:
            logger.warning("cache shard %s cannot be read any more, its items are encoded again: %s", path, error)
            self._places = {key: place for key, place in self._places.items() if place.shard != shard}
            return None
