"""Values on their way from loader workers: all tensors of a value in one piece of shared memory.

torch sends every tensor by a file descriptor of its own, and a batch has thousands of tensors. Here a value travels as one flat buffer and
a small description of what lies where; what arrives are views into the buffer, which is freed when the last of them goes. The memory has no
name: however a process ends, nothing of it stays behind, and it does not count against the size of /dev/shm, which containers keep small.
"""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from vlm2vec.signals import HANDLED

ALIGN = 64  # bytes; each tensor starts at a multiple, which suits every dtype and a line of the processor's cache


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the buffer, contiguous from byte `start` on."""

    start: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, flat: Tensor) -> Tensor:
        """The tensor, a view into the buffer `flat`."""
        end = self.start + self.shape.numel() * self.dtype.itemsize
        return flat[self.start : end].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Packed:
    """A value as one buffer, uint8, and the value itself with a `Place` instead of every tensor."""

    flat: Tensor
    outline: Any


def pack(value: Any) -> Packed:
    """`value` ready for another process: a copy of every tensor in it, through lists, dicts and dataclasses."""
    tensors: list[tuple[Place, Tensor]] = []
    size = 0

    def place(tensor: Tensor) -> Place:
        nonlocal size
        tensors.append((Place(size, tensor.dtype, tensor.shape), tensor))
        size += -(-tensor.nbytes // ALIGN) * ALIGN
        return tensors[-1][0]

    outline = _changed(value, Tensor, place)
    flat = _shared(size) if size else torch.empty(0, dtype=torch.uint8)
    for where, tensor in tensors:
        where.of(flat).copy_(tensor)
    return Packed(flat, outline)


def unpack(packed: Packed) -> Any:
    """The value that was packed, its tensors views into the one buffer."""
    return _changed(packed.outline, Place, lambda place: place.of(packed.flat))


def read_ahead(dataset: Dataset[Any], order: Iterable[Any], workers: int, **options: Any) -> Iterator[Any]:
    """What `dataset` gives for the indices of `order`, made ahead by `workers` processes, which start at once; by this process if 0.

    `options` are those of torch's DataLoader.
    """
    fixed: dict[str, Any] = {"batch_size": None, "collate_fn": _sent, "worker_init_fn": _patient}
    made = iter(DataLoader(dataset, sampler=order, num_workers=workers, **fixed, **options))
    received = (_received(value) for value in made)
    # An error that is raised and also held by a frame in its own traceback is garbage in a circle, with all that the frame holds. Collected
    # with it, torch's iterator finds its queues closed already, cannot tell its workers and waits for them for ten seconds.
    weakref.finalize(received, _let_go, made).atexit = False
    return received


def _let_go(made: Iterator[Any]) -> None:
    """Do nothing: until this call its finalizer kept `made` out of all garbage, and now nobody holds it."""


def _patient(worker: int) -> None:
    """Let the first signal pass: terminals and schedulers send it to all processes, and the work needs its workers to stop in order."""
    for number in HANDLED:
        signal.signal(number, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def _sent(value: Any) -> Any:
    return value if get_worker_info() is None else pack(value)


def _received(value: Any) -> Any:
    return unpack(value) if isinstance(value, Packed) else value


def _changed(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """`value` with everything of `kind` in it changed."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, list):
        return [_changed(each, kind, change) for each in value]
    if isinstance(value, dict):
        return {key: _changed(each, kind, change) for key, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{entry.name: _changed(getattr(value, entry.name), kind, change) for entry in fields(value)})
    return value


def _shared(size: int) -> Tensor:
    """(size,) uint8 in memory that torch can hand to another process by a file descriptor."""
    if not hasattr(os, "memfd_create"):  # Linux only
        return torch.empty(size, dtype=torch.uint8).share_memory_()
    descriptor = os.memfd_create("vlm2vec")
    try:
        os.ftruncate(descriptor, size)
        storage = torch.UntypedStorage._new_shared_fd_cpu(descriptor, size)  # type: ignore[attr-defined]
    finally:
        os.close(descriptor)
    return torch.empty(0, dtype=torch.uint8).set_(storage)
