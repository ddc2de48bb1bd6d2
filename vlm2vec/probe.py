"""Try out how large chunks should be, before the first step: the smallest that run about as fast as any, as many graphs as memory holds.

A chunk of one size is embedded and taken back through the model, then one of twice the size, until a batch in such chunks, with all their
padding, would take no less time, or memory is full. Smaller chunks leave room for graphs, and a kept graph saves a second forward pass.
Recomputing activations takes part where the recipe leaves it open: it costs a forward pass, and is worth that only where it buys a chunk
that runs so much faster.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from vlm2vec import log, memory
from vlm2vec.batch import Batch
from vlm2vec.budget import Budget
from vlm2vec.chunks import plan_chunks, tokens_laid_out
from vlm2vec.config import TrainConfig
from vlm2vec.engines import Engine
from vlm2vec.errors import EnvError
from vlm2vec.gradcache import seeded

SMALLEST = 512  # padded tokens of the first chunk tried
UNTRIED = 4096  # padded tokens of a chunk where none is tried
ALIKE = 0.03  # speeds that differ by less are the same
SPARE = 0.2  # share of the memory that kept graphs leave alone: items differ from batch to batch
CPU_SHARE = 0.5  # of a machine's free memory that a step may take; the rest is for loader workers and the page cache

_logger = log.get_logger(__name__)


@dataclass(frozen=True)
class Trial:
    """What a chunk took: padded `tokens`, `seconds` forward and backward, bytes of its `graph`, and bytes at the `peak`, graph included.

    `batch` is how many padded tokens a whole batch has in chunks of that size.
    """

    tokens: int
    seconds: float
    graph: int
    peak: int
    batch: int = 0

    @property
    def cost(self) -> float:
        """Seconds of a batch."""
        return self.seconds / self.tokens * self.batch


class Attempt(Protocol):
    """What the chunk of some rows of a batch takes, with activations recomputed or not. Raises torch.OutOfMemoryError."""

    def __call__(self, rows: Sequence[int], recomputed: bool) -> Trial: ...


def settle(options: TrainConfig, lengths: Sequence[int], attempt: Attempt, room: int, packed: bool = False) -> Budget:
    """Fill in what `options` leaves open, for batches like the one of `lengths`, with `room` bytes to spare.

    Raises EnvError when not even the longest item fits alone.
    """
    modes = (False, True) if options.activation_checkpointing is None else (options.activation_checkpointing,)
    found = {mode: _climb(options.chunk_tokens, lengths, partial(attempt, recomputed=mode), packed) for mode in modes}
    fastest = min((trial.cost for trials in found.values() for trial in trials.values()), default=None)
    if fastest is None:
        raise EnvError(too_long(max(lengths)))
    size, mode = next((size, mode) for mode in modes for size, trial in found[mode].items() if trial.cost <= fastest * (1 + ALIKE))
    size, hungriest = _first_that_fits(size, lengths, partial(attempt, recomputed=mode), packed)
    if options.keep_tokens is not None:
        return Budget(size, options.keep_tokens, mode)
    each = max(found[mode][size].graph / found[mode][size].tokens if size in found[mode] else 0, hungriest.graph / hungriest.tokens)
    return Budget(size, max(0, int(((1 - SPARE) * room - hungriest.peak) / max(each, 1))), mode)


def too_long(longest: int) -> str:
    """What to say when one item is too much."""
    return (
        f"out of memory with one item of {longest} tokens at a time; lower model.max_pixels or model.max_tokens, "
        "set train.activation_checkpointing, or take train.engine: fsdp2"
    )


def _climb(given: int | None, lengths: Sequence[int], attempt: Callable[[Sequence[int]], Trial], packed: bool) -> dict[int, Trial]:
    """Trials by size of chunk: the given one, or sizes from SMALLEST on, doubled until that brings nothing."""
    trials: dict[int, Trial] = {}
    size = given or SMALLEST
    while True:
        rows, batch = typical(lengths, size, packed)
        if trials and batch < size:
            return trials
        best = min((trial.cost for trial in trials.values()), default=math.inf)
        try:
            trials[size] = replace(attempt(rows), batch=batch)
        except torch.OutOfMemoryError:
            return trials
        if given or trials[size].cost > best * (1 - ALIKE):
            return trials
        size *= 2


def typical(lengths: Sequence[int], size: int, packed: bool = False) -> tuple[list[int], int]:
    """The rows of the chunk that holds the middle token of a batch in chunks of a size, and the padded tokens of them all."""
    chunks = plan_chunks(lengths, size, packed)
    done = list(accumulate(tokens_laid_out([lengths[row] for row in chunk], packed) for chunk in chunks))
    return next(chunk for chunk, upto in zip(chunks, done, strict=True) if 2 * upto >= done[-1]), done[-1]


def _first_that_fits(size: int, lengths: Sequence[int], attempt: Callable[[Sequence[int]], Trial], packed: bool) -> tuple[int, Trial]:
    """The size, halved until the chunks that need most fit, and what the hungrier one took.

    The longest items need the most memory a token, the fullest chunk has the most tokens.
    """
    while True:
        chunks = plan_chunks(lengths, size, packed)
        fullest = max(chunks, key=lambda chunk: tokens_laid_out([lengths[row] for row in chunk], packed))
        trials = []
        try:
            for rows in [chunks[0]] if fullest is chunks[0] else [chunks[0], fullest]:
                trials.append(attempt(rows))  # an error belongs to the last `rows`
            return size, max(trials, key=lambda trial: trial.peak)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise EnvError(too_long(max(lengths))) from None
            size //= 2


# -- on a real engine


def try_out(engine: Engine, batch: Batch) -> Budget:
    """`settle` for the model and items at hand.

    Nothing is tried where ranks meet in every chunk, since one whose memory is full would leave the others waiting: chunks have UNTRIED
    tokens there, and no graph is kept, unless the recipe says so.
    """
    options, encoder, started = engine.options, engine.encoder, time.perf_counter()
    if engine.meets:
        return Budget(options.chunk_tokens or UNTRIED, options.keep_tokens or 0, bool(options.activation_checkpointing))
    weights, trained = list(encoder.model.parameters()), list(engine.parameters.values())

    def attempt(rows: Sequence[int], recomputed: bool) -> Trial:
        encoder.recompute_activations(recomputed)
        inputs = encoder.processor.collate([batch.features[row] for row in rows])
        with seeded(0):
            return measure(lambda: engine.embed(inputs), trained, weights, inputs["input_ids"].numel())

    lengths = [len(features) for features in batch.features]
    found = settle(options, lengths, attempt, _room(encoder.device, trained), encoder.processor.packed)
    _logger.info("%s, tried out in %.1f s", found, time.perf_counter() - started)
    return found


def _room(device: torch.device, trained: Sequence[Tensor]) -> int:
    """Bytes for graphs: what is free, less gradients and the optimizer's two moments, which come with the first step."""
    share = 1.0 if device.type == "cuda" else CPU_SHARE
    return int(share * memory.available(device)) - 3 * sum(parameter.nbytes for parameter in trained)


# -- measuring


def measure(embed: Callable[[], Tensor], trained: Sequence[Tensor], weights: Sequence[Tensor], tokens: int) -> Trial:
    """Embed a chunk of so many padded tokens and take it back to `trained`, whose gradients stay as they are; the faster of two times."""
    return min((_once(embed, trained, weights, tokens) for _ in range(2)), key=lambda trial: trial.seconds)


def _once(embed: Callable[[], Tensor], trained: Sequence[Tensor], weights: Sequence[Tensor], tokens: int) -> Trial:
    device = weights[0].device
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    before, started = _allocated(device), _now(device)
    with nullcontext() if on_cuda else _Saved(weights) as saved:
        rows_CD = embed()
    graph = saved.nbytes if saved else _allocated(device) - before
    if rows_CD.requires_grad:  # not where a chunk of text meets no trained weight
        torch.autograd.grad(rows_CD.sum(), trained, allow_unused=True)
    seconds = _now(device) - started
    return Trial(tokens, seconds, graph, torch.cuda.max_memory_allocated(device) - before if on_cuda else graph)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Saved:
    """Counts the bytes that autograd saves inside, each storage once and none of the weights: a CPU's allocator keeps no count."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.known = {weight.untyped_storage().data_ptr() for weight in weights}
        self.nbytes = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.known.add(storage.data_ptr())
            self.nbytes += storage.nbytes()
        return tensor

    def __enter__(self) -> _Saved:
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)
