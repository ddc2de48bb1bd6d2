"""From the features of single items to chunks, padded or packed into one row; padding happens here and only here.

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


def tokens_laid_out(lengths: Sequence[int], packed: bool = False) -> int:
    """Tokens that a chunk of items of these `lengths` takes: with padding (longest x count), or their own where it is packed."""
    return sum(lengths) if packed else max(lengths) * len(lengths)


def plan_chunks(lengths: Sequence[int], budget: int, packed: bool = False) -> list[list[int]]:
    """Group item indices so that each group takes at most `budget` tokens, as `tokens_laid_out` counts them.

    Longest first, so that the first chunk shows whether memory suffices; sorted by length, so that little is padded, and that items of one
    length are neighbours. An item longer than the budget gets a chunk of its own. Ties keep the input order: the plan is a pure function of
    its arguments.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    chunks: list[list[int]] = []
    room = 0
    for index in order:
        added = lengths[chunks[-1][0]] if chunks and not packed else lengths[index]
        if chunks and added <= room:
            chunks[-1].append(index)
        else:
            chunks.append([index])
            room, added = budget, lengths[index]
        room -= added
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


def join_tokens(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Put token rows (L_i,) one behind the other into `input_ids` (1, T); `attention_mask` (C, L) tells their lengths, as if padded.

    Both shapes and their number can be read off it on a device without waiting for the device.
    """
    length_C = torch.tensor([len(row) for row in rows])
    return torch.cat(list(rows))[None], (torch.arange(int(length_C.max())) < length_C[:, None]).long()
