"""What one model computed, in files that are written once and never changed; several processes may fill one folder at once.

    <directory>/<model>/<shard>.safetensors   tensors
    <directory>/<model>/<shard>.json          the keys of its entries, the sha256 of the tensors and a digest of this list; published last

A shard counts once its list is there. A torn or altered shard is named in a warning and ignored: what it held is simply computed again.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm2vec.errors import InputError
from vlm2vec.io import digest, read_json, sha256_bytes, sha256_file, write_atomic, write_json
from vlm2vec.log import get_logger

FORMAT = 1
logger = get_logger(__name__)


@dataclass(frozen=True)
class Place:
    """Where an entry lies: which shard, which row of it."""

    shard: str
    row: int


class Shards:
    """Places of entries by key for one model; all keys are held in memory. When two processes made the same entry, the shard that was seen
    first wins.

    `model_key` is a digest of all that an entry depends on beside its own key.
    """

    def __init__(self, directory: Path, model_key: str) -> None:
        self.model_key = model_key
        self.directory = Path(directory) / sha256_bytes(model_key.encode())[:16]
        self._places: dict[str, Place] = {}
        self._seen: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """Take in the shards that appeared since the last look, this process's and others', after checking each against its sha256."""
        for listing in sorted(self.directory.glob("*.json")):
            if listing.stem not in self._seen:
                self._seen.add(listing.stem)
                self._index(listing)

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Those of `keys` with no entry yet, in the order given; looks for new shards of other processes first."""
        self.refresh()
        return [key for key in keys if key not in self._places]

    def tensors_of(self, shard: str) -> Path:
        """The file of a shard."""
        return self.directory / f"{shard}.safetensors"

    def publish(self, keys: Sequence[str], data: bytes, **about: Any) -> None:
        """Write one shard of distinct keys; `data` is its safetensors file, `about` is kept in the list.

        Raises EnvError when the disk refuses; earlier shards stay whole.
        """
        name = f"{time.time_ns():020d}-{os.getpid()}-{secrets.token_hex(4)}"
        listing = {"format": FORMAT, "model": self.model_key, "sha256": sha256_bytes(data), "keys": list(keys), **about}
        write_atomic(self.tensors_of(name), data)
        write_json(self.directory / f"{name}.json", {**listing, "digest": digest(listing)})
        self._seen.add(name)
        self._add(name, listing)

    def _index(self, listing: Path) -> None:
        """Add a shard's keys if both of its files are what was written, else warn."""
        try:
            content = _checked(listing, self.model_key)
        except (InputError, OSError) as error:
            logger.warning("ignoring cache shard %s, its items are encoded again: %s", listing.with_suffix(".safetensors"), error)
        else:
            self._add(listing.stem, content)

    def _add(self, shard: str, listing: dict[str, Any]) -> None:
        for row, key in enumerate(listing["keys"]):
            self._places.setdefault(key, Place(shard, row))


def _checked(listing: Path, model_key: str) -> dict[str, Any]:
    """The list of a shard whose files are both intact; raises `InputError` with the reason otherwise."""
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
    return content
