"""Ranks and the few collectives we need. Without a process group this is rank 0 of 1 and every collective returns what it was given.

Torch is imported only once a process group can exist, so that asking for the rank stays cheap. Shape letters: n local rows, N all rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vlm2vec import errors
from vlm2vec.errors import Vlm2VecError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BUCKET_BYTES = 64 << 20  # gradients travel in buckets of this size: few messages, little extra memory


def _grouped() -> bool:
    """Whether torch.distributed has a process group here; does not import torch to find out."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Index of this process, 0 without a process group."""
    return sys.modules["torch.distributed"].get_rank() if _grouped() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return sys.modules["torch.distributed"].get_world_size() if _grouped() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files and log lines."""
    return rank() == 0


def barrier() -> None:
    """Wait until every rank has come here."""
    if _grouped():
        sys.modules["torch.distributed"].barrier()


def gather_rows(tensor_nd: Tensor) -> tuple[Tensor, int]:
    """All ranks' rows in rank order, (N, ...), and the index of this rank's first row among them.

    Ranks may hold different numbers of rows, also none. This rank's own rows stay in the autograd graph, the others are constants: when
    every rank computes the same global loss from all rows, the sum of the parameter gradients over ranks is its exact gradient.
    """
    if world_size() == 1:
        return tensor_nd, 0
    import torch

    counts = _gather_equal(torch.tensor([len(tensor_nd)], device=tensor_nd.device))
    sizes = [int(count) for count in counts]
    padded = tensor_nd.new_zeros((max(sizes), *tensor_nd.shape[1:]))
    padded[: len(tensor_nd)] = tensor_nd.detach()
    rows = [part[:size] for part, size in zip(_gather_equal(padded), sizes, strict=True)]
    rows[rank()] = tensor_nd
    return torch.cat(rows), sum(sizes[: rank()])


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Sum each tensor over ranks, in place. Every rank passes the same shapes in the same order."""
    if world_size() == 1:
        return
    import torch

    with torch.no_grad():
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            torch.distributed.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))


def gather_objects(obj: Any) -> list[Any]:
    """One object per rank, in rank order, on every rank. Objects travel as JSON: tuples come back as lists, keys as strings."""
    if world_size() == 1:
        return [obj]
    import torch

    encoded = json.dumps(obj).encode("ascii")
    rows_N, _ = gather_rows(torch.frombuffer(bytearray(encoded + b"\n"), dtype=torch.uint8).to(_device()))
    return [json.loads(line) for line in bytes(rows_N.tolist()).splitlines()]


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on at least one rank; the same answer on all."""
    return highest(int(flag)) > 0


def highest(number: int) -> int:
    """The largest `number` of all ranks."""
    if world_size() == 1:
        return number
    import torch

    found = torch.tensor([number], device=_device())
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return int(found.item())


def lowest(number: int) -> int:
    """The smallest `number` of all ranks."""
    return -highest(-number)


@contextmanager
def agreeing() -> Iterator[None]:
    """The body ends on every rank as it ends on the lowest rank where it raises one of our errors. No collective may stand in the body."""
    caught = None
    try:
        yield
    except Vlm2VecError as error:
        caught = error
    raise_first(caught)


def raise_first(error: Vlm2VecError | None) -> None:
    """Every rank calls with its error or None; all raise the error of the lowest rank that has one, or none does."""
    if world_size() == 1:
        if error is not None:
            raise error
        return
    told = gather_objects(None if error is None else [type(error).__name__, str(error)])
    for index, found in enumerate(told):
        if found is not None:
            if error is not None and index == rank():
                raise error
            raise getattr(errors, found[0])(f"rank {index}: {found[1]}")


def _gather_equal(tensor: Tensor) -> list[Tensor]:
    """Every rank's tensor of one common shape."""
    import torch

    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return parts


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive runs of one dtype and device, each up to BUCKET_BYTES (a larger tensor travels alone)."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        joins = not bucket or (tensor.dtype == bucket[0].dtype and tensor.device == bucket[0].device)
        if bucket and (not joins or size + tensor.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def _device() -> torch.device:
    """Where small messages live: NCCL takes CUDA tensors only. A group may have two backends, "cpu:gloo,cuda:nccl"."""
    import torch

    backend = torch.distributed.get_backend()
    on_cuda = "nccl" in backend and "gloo" not in backend
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
