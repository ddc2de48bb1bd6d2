"""From the features of single items to padded chunks; padding happens here and only here.

Shape letters: C items in a chunk, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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

    def as_arrays(self) -> Features:
        """The same in numpy arrays, to send to another process: each tensor would hold a file descriptor there until it is used."""
        return self._each(torch.Tensor.numpy)

    def as_tensors(self) -> Features:
        """What `as_arrays` was made of; tensors stay as they are."""
        return self._each(torch.as_tensor)

    def _each(self, change: Callable[[Any], Any]) -> Features:
        images = [{name: change(value) for name, value in image.items()} for image in self.images]
        return Features(change(self.input_ids), images, self.truncated)


def plan_chunks(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group item indices so that each group costs at most `budget` padded tokens (longest x count).

    Longest first, so that the first chunk shows whether memory suffices; sorted by length, so that little is padded. An item longer than
    the budget gets a chunk of its own. Ties keep the input order: the plan is a pure function of its arguments.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    chunks: list[list[int]] = []
    for index in order:
        if chunks and (len(chunks[-1]) + 1) * lengths[chunks[-1][0]] <= budget:
            chunks[-1].append(index)
        else:
            chunks.append([index])
    return chunks


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
