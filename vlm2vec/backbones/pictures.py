"""Pictures of a chunk one by one, where some come as pixels and others as the features that a frozen tower made of them before.

A chunk of pixels alone holds its pictures joined, and the towers see them at once. Otherwise each picture has entries of its own in the
collated batch: what the tower needs of it, or its features under `VECTORS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

VECTORS = "vectors"  # key of a picture's features
PIXELS = "pixel_values"  # key of what takes the room in a picture that has none: every family calls it so
_PREFIX = "picture."


def one_by_one(pictures: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The entries of a batch for these pictures; `apart` takes them out again."""
    return {f"{_PREFIX}{number}.{name}": tensor for number, picture in enumerate(pictures) for name, tensor in picture.items()}


def apart(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A batch without its pictures, and those that it holds one by one, in order."""
    pictures: dict[str, dict[str, Tensor]] = {}
    rest = {name: tensor for name, tensor in batch.items() if not name.startswith(_PREFIX)}
    for key in (key for key in batch if key.startswith(_PREFIX)):
        number, _, name = key.removeprefix(_PREFIX).partition(".")
        pictures.setdefault(number, {})[name] = batch[key]
    return rest, list(pictures.values())
