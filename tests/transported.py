"""What the workers of the transport tests make; a spawned one imports this and little else."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.utils.data import Dataset

from vlm2vec.collate import Features
from vlm2vec.errors import ImageError

ITEMS = 400


def item(index: int, number: int) -> Features:
    """Number `number` of the value at `index`: it says where it is from."""
    pixels = torch.full((number % 7, 3), float(index))
    return Features(torch.arange(number), [{"pixels": pixels, "grid": torch.tensor([[index, number]])}], truncated=number)


class Made(Dataset[Any]):
    """The process that made them and ITEMS items for an index, but an error for index 2 if wanted."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def __getitem__(self, index: int) -> Any:
        if self.fails and index == 2:
            return ImageError("row 2: image 'x.png': not an image")
        return [torch.tensor(os.getpid()), [item(index, number) for number in range(ITEMS)]]


class Large(Dataset[Any]):
    """How many files the worker has open, and 2 MB in 1,200 tensors, for every index."""

    def __init__(self) -> None:
        self.made = [Features(torch.arange(4), [{"pixels": torch.ones(1250), "grid": torch.ones(1)}]) for _ in range(ITEMS)]

    def __getitem__(self, index: int) -> Any:
        return [torch.tensor(open_files()), self.made]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
