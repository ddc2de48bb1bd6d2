"""From the features of single items to the tensors of a chunk, padded or packed into one row; padding happens here and only here.

Shape letters: C items in a chunk, L tokens, T tokens of all items of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Features:
    """What a processor makes of one item, unpadded: `input_ids` (L,) int64 with image tokens expanded, and per picture its model inputs."""

    input_ids: Tensor
    images: list[dict[str, Tensor]] = field(default_factory=list)
    truncated: int = 0  # text tokens that `max_tokens` cut off

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def nbytes(self) -> int:
        return self.input_ids.nbytes + sum(tensor.nbytes for image in self.images for tensor in image.values())


def moved(inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors on `device`; those for a GPU through pinned memory, so that the next chunk is made while this one travels."""
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in inputs.items()}
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in inputs.items()}


def pad_tokens(rows: Sequence[Tensor], pad_id: int, side: str) -> tuple[Tensor, Tensor]:
    """Stack token rows (L_i,) into `input_ids` (C, L) and `attention_mask` (C, L), padded on `side` ("left" or "right")."""
    longest = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        columns = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        input_ids[index, columns] = row
        attention_mask[index, columns] = 1
    return input_ids, attention_mask


def join_tokens(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Put token rows (L_i,) one behind the other into `input_ids` (1, T); `attention_mask` (C, L) tells their lengths, as if padded.

    Both shapes and their number can be read off it on a device without waiting for the device.
    """
    length_C = torch.tensor([len(row) for row in rows])
    return torch.cat(list(rows))[None], (torch.arange(int(length_C.max())) < length_C[:, None]).long()
