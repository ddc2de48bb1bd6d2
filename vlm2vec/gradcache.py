"""Exact gradients of a loss over more items than memory holds: two passes over chunks, one definition of the loss.

Source: GradCache (Gao et al. 2021, arXiv 2101.06983, section 3.2). Pass 1 embeds every chunk without a graph; the objective is
differentiated with respect to all embeddings; pass 2 embeds each chunk again with a graph and continues backward from the cached gradient.
The result is that of the full batch, because each chunk is run under its own seed: both passes draw the same dropout masks, on the CPU and
on the current CUDA device. Chunks whose graphs fit in memory keep them and are not embedded again: the first always, since pass 2 holds
one graph at a time anyway.

A step is a pure function of weights, chunks and seeds, and the caller's random stream is left as it was found.

Distribution: `gather` (dist.gather_rows) turns the local embeddings into those of all ranks. Every rank then computes the whole objective,
and gets
    * for the encoder, its own items' part of the gradient: the SUM over ranks is the gradient of the global loss;
    * for parameters of the objective (a learnable temperature), the whole gradient, equal on every rank: it must NOT be summed.
No collective is called here inside a backward pass, so ranks may hold different numbers of chunks and mix text-only chunks with pictures.
An encoder whose weights are spread over ranks does call some, in each pass over a chunk: then `idle` makes up the number of chunks.

Shape letters: I local items in chunk order, C items in a chunk, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm2vec.errors import Vlm2VecError

Encode = Callable[[Any], Tensor]  # chunk -> (C, D)
Objective = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]  # (I, D), or the gathered rows, -> scalar loss and statistics
Backward = Callable[[Tensor, Tensor, bool], None]  # rows (C, D), their gradient, whether this is the last chunk of this call
Gather = Callable[[Tensor], tuple[Tensor, int]]  # (I, D) -> rows of all ranks and the index of the first own one, as dist.gather_rows


@dataclass(frozen=True)
class StepResult:
    """What one backward pass computed, detached: the loss without its weight, and the local embeddings, for the caller to check."""

    loss: Tensor
    stats: dict[str, Tensor]
    embedding_ID: Tensor


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch on the CPU, and on the current CUDA device if CUDA is in use, and put both streams back afterwards.

    Other devices, `random` and numpy are neither seeded nor touched: an encoder must not draw from them.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed(seed)
        yield


def _plain_backward(rows_CD: Tensor, gradient_CD: Tensor, last: bool) -> None:
    rows_CD.backward(gradient_CD)


def cached_backward(
    chunks: Sequence[Any],
    encode: Encode,
    objective: Objective,
    seeds: Sequence[int],
    weight: float = 1.0,
    gather: Gather | None = None,
    keep: int = 1,
    idle: int = 0,
    backward: Backward = _plain_backward,
) -> StepResult:
    """Add the gradient of `weight * objective(embeddings)` to `.grad`.

    The first `keep` chunks, at least one, hold their graph from the first pass and are encoded once; all others are encoded twice, and one
    graph at a time is held. Memory is the price of `keep`, the gradient does not depend on it.

    `encode(chunk)` -> (C, D) must be a pure function of chunk, weights and torch's random state; there is one seed per chunk. The objective
    gets the embeddings in chunk order. `weight` is 1/accumulate when several batches make one step. After the chunks, `idle` times the last
    of them goes through both passes once more with gradient zero, to keep ranks company that have more chunks.
    """
    jobs = list(zip(chunks, seeds, strict=True))
    company = [jobs[-1]] * idle
    keep = max(keep, 1)
    kept = [_encode_seeded(encode, chunk, seed) for chunk, seed in jobs[:keep]]
    with torch.no_grad():
        cached = [_encode_seeded(encode, chunk, seed) for chunk, seed in jobs[keep:]]
        for chunk, seed in company:
            _encode_seeded(encode, chunk, seed)
    result, gradient_ID = _objective_backward(torch.cat([*(rows.detach() for rows in kept), *cached]), objective, weight, gather)
    gradients = list(gradient_ID.split([len(rows) for rows in (*kept, *cached)]))
    gradients += [torch.zeros_like(gradients[-1])] * idle
    for index in range(len(kept)):
        backward(kept[index], gradients[index], index == len(gradients) - 1)
    for index, (chunk, seed) in enumerate([*jobs, *company][keep:], start=keep):
        with seeded(seed):  # covers the backward too: activation checkpointing runs the encoder in it
            backward(encode(chunk), gradients[index], index == len(gradients) - 1)
    return result


def _encode_seeded(encode: Encode, chunk: Any, seed: int) -> Tensor:
    with seeded(seed):
        return encode(chunk)


def _objective_backward(local_ID: Tensor, objective: Objective, weight: float, gather: Gather | None) -> tuple[StepResult, Tensor]:
    """Differentiate the objective as far as the embeddings: its result, and the weighted gradient (I, D) of the local ones."""
    gathered, offset = gather(local_ID) if gather else (local_ID, 0)
    leaf = gathered.detach().requires_grad_()
    loss, stats = objective(leaf)
    (loss * weight).backward()
    if leaf.grad is None:
        raise Vlm2VecError("the objective does not depend on the embeddings it was given")
    return StepResult(loss.detach(), stats, local_ID), leaf.grad[offset : offset + len(local_ID)]
