"""What frozen towers made of pictures, on disk, so that a picture is decoded and encoded once and not once per epoch.

The key of a picture is its content (`images.content_key`), and each model has a folder of its own (`Encoder.towers_fingerprint`): weights
of the towers, processor, precision and the version of the decoder, so that changing any of them misses. Entries live in `shards`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vlm2vec.data.images import content_key
from vlm2vec.data.types import ImageRef
from vlm2vec.errors import EnvError
from vlm2vec.shards import Shards

Picture = dict[str, Tensor]  # its features, and what else of `Processor.picture` is not pixels
LISTED = 1024  # bytes that a picture takes in headers and lists, at most


def size_of(picture: Picture) -> int:
    """Bytes on disk of one picture."""
    return LISTED + sum(tensor.nbytes for tensor in picture.values())


class FeatureCache(Shards):
    """Pictures by content. Only those that were chosen with `keep` are handed out, whatever else the folder holds."""

    def __init__(self, directory: Path, model_key: str) -> None:
        self.sizes: dict[str, int] = {}  # by key, of all pictures in the folder
        self.kept: frozenset[str] = frozenset()
        super().__init__(directory, model_key)

    def keep(self, keys: Iterable[str]) -> None:
        """Choose the pictures that `known` finds."""
        self.kept = frozenset(keys)

    def known(self, image: ImageRef) -> Picture | None:
        """What stands for a picture in `Processor.features`, or None. Raises ImageError where its file cannot be read, as decoding would.

        Raises EnvError when a shard vanished since it was checked: encoding the picture now would give other bits than the run began with.
        """
        key = content_key(image)
        return self._read(key) if key in self.kept else None

    def put(self, pictures: Mapping[str, Picture]) -> None:
        """Publish one shard of pictures by key. Raises EnvError when the disk refuses; earlier shards stay whole."""
        tensors = {f"{row}.{name}": tensor for row, picture in enumerate(pictures.values()) for name, tensor in picture.items()}
        self.publish(list(pictures), save(tensors), sizes=[size_of(picture) for picture in pictures.values()])

    def _add(self, shard: str, listing: dict[str, Any]) -> None:
        super()._add(shard, listing)
        self.sizes.update(zip(listing["keys"], listing["sizes"], strict=True))

    def _read(self, key: str) -> Picture:
        place = self._places[key]
        path, prefix = self.tensors_of(place.shard), f"{place.row}."
        try:
            with safe_open(path, framework="pt") as tensors:
                names = [name for name in tensors.keys() if name.startswith(prefix)]  # noqa: SIM118, it is no mapping
                return {name.removeprefix(prefix): tensors.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise EnvError(f"{path} cannot be read any more ({error}); run the same command to go on, it encodes them again") from error
