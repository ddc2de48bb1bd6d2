"""One optimizer step: embed the items of all ranks chunk by chunk, contrast them, go back through the chunks, update.

Ranks may fail alone, and must stop together: what a rank meets in its first pass (a NaN, a full memory) is told to all before the second
pass, what it meets in the second before the gradients are summed.

Shape letters: B queries, N targets, I distinct items, D embedding, C items of a chunk; after the gather I counts all ranks.
"""

from __future__ import annotations

import hashlib
import math
import resource
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from vlm2vec import budget, dist, io, log, probe
from vlm2vec.batch import Batch
from vlm2vec.budget import CHUNKS, Budget
from vlm2vec.chunks import plan_chunks, tokens_laid_out
from vlm2vec.config import Recipe
from vlm2vec.engines import Engine
from vlm2vec.errors import EnvError, NonFiniteError
from vlm2vec.gradcache import StepResult, cached_backward
from vlm2vec.losses import InfoNCE
from vlm2vec.pooling import check_rows
from vlm2vec.replay import Replay, leading_frozen

_logger = log.get_logger(__name__)


class _MemoryFull(Exception):
    """Some rank's memory was full; all ranks raise it at the same place."""


class _NotFinite(Exception):
    """Some rank met a NaN or infinity; all ranks raise it at the same place, with that rank and what it said."""


class _Trouble:
    """What this rank met since the ranks last told each other.

    An engine that meets in every chunk cannot go on after a full memory: its ranks would wait for one another. There the error stays.
    """

    def __init__(self, meets: bool) -> None:
        self.meets, self.told = meets, False
        self.full, self.reason = False, ""

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep what goes wrong inside until `tell`."""
        try:
            yield
        except NonFiniteError as error:
            self.reason = self.reason or str(error)
        except torch.OutOfMemoryError:
            if self.meets:
                raise
            self.full = True

    def tell(self) -> None:
        """Every rank calls. Raises _MemoryFull or _NotFinite on all of them if any has something to tell."""
        self.told = True
        told = dist.gather_objects([self.full, self.reason])
        if any(full for full, _ in told):
            raise _MemoryFull
        for rank, (_, reason) in enumerate(told):
            if reason:
                raise _NotFinite(rank, reason)


@dataclass(frozen=True)
class Layout:
    """Who is whose among the items of all ranks: row numbers into the gathered embeddings."""

    item_id_I: Tensor
    query_B: Tensor
    positive_B: Tensor
    negative_K: Tensor

    @classmethod
    def gather(cls, batch: Batch, chunks: list[list[int]], device: torch.device) -> Layout:
        """Renumber the items of this rank in the order in which their chunks are embedded, and shift them behind those of lower ranks."""
        order = torch.tensor([row for chunk in chunks for row in chunk])
        item_id_I, offset = dist.gather_rows(batch.item_id_I[order].to(device))
        position = torch.argsort(order) + offset
        rows = [dist.gather_rows(position[index].to(device))[0] for index in (batch.query_B, batch.positive_B, batch.negative_K)]
        return cls(item_id_I, *rows)

    def contrast(self, loss: InfoNCE, embedding_ID: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the global batch: every positive and every explicit negative is a target, each row once."""
        target_N, inverse = torch.unique(torch.cat([self.positive_B, self.negative_K]), return_inverse=True)
        return loss(
            embedding_ID[self.query_B],
            embedding_ID[target_N],
            positive_B=inverse[: len(self.positive_B)],
            target_id_N=self.item_id_I[target_N],
            query_id_B=self.item_id_I[self.query_B],
        )


@dataclass
class Step:
    """One optimizer step on `accumulate` contrastive batches; returns the row of the log and the figures of speed.

    When memory is full on any rank, the whole step is tried again with chunks of half the size: the global batch, and with it the gradient,
    stays what the recipe says (Gao et al. 2021, arXiv 2101.06983: the gradient does not depend on the chunks).
    """

    recipe: Recipe
    engine: Engine
    budget: Budget | None = field(default=None, init=False)  # None until it is settled, with the first batch at hand

    def __post_init__(self) -> None:
        self.encoder, self.loss = self.engine.encoder, self.engine.loss
        self.run_dir = Path(self.recipe.run.dir)
        set_training_mode(self.encoder.model)
        if settled := budget.read(self.run_dir) or Budget.given(self.recipe.train):
            self._cut(settled)

    def _cut(self, settled: Budget) -> None:
        self.budget = settled
        self.encoder.recompute_activations(settled.activation_checkpointing)

    def __call__(self, step: int, batches: list[Batch], lr: float) -> tuple[dict[str, float], dict[str, float]]:
        if self.budget is None:
            self._cut(self._settle(step, batches[0]))
        started = time.perf_counter()
        stats, grad_norm = self._gradients(step, batches)
        self.engine.step(lr)
        row = {key: sum(entry[key] for entry in stats) / len(stats) for key in stats[0]}
        return {"step": step + 1, **row, "grad_norm": grad_norm, "lr": lr}, _speed(batches, time.perf_counter() - started)

    def _gradients(self, step: int, batches: list[Batch]) -> tuple[list[dict[str, float]], float]:
        """Statistics of each batch, and the norm of the gradient of all, which is then clipped."""
        try:
            stats = [self._backward(step, index, batch, last=index == len(batches) - 1) for index, batch in enumerate(batches)]
            self.engine.reduce()
            return stats, self.engine.clip(self.recipe.train.clip)
        except _NotFinite as error:
            raise self._report(step, batches, *error.args) from error
        except NonFiniteError as error:  # of the whole gradient, the same on all ranks
            raise self._report(step, batches, 0, str(error)) from error
        except torch.OutOfMemoryError as error:
            self._shrink(step, batches)
            raise EnvError(
                f"step {step + 1}, rank {dist.rank()}: out of memory. Under {self.engine.name} ranks meet in every chunk, so the step "
                f"cannot be tried again here; smaller chunks are written down in {self.run_dir / CHUNKS}: run the same command to go on"
            ) from error
        except _MemoryFull:
            self.engine.forget()
            self._shrink(step, batches)
        return self._gradients(step, batches)

    def _backward(self, step: int, micro: int, batch: Batch, last: bool = True) -> dict[str, float]:
        assert self.budget is not None, "settled before the first step"
        lengths = [len(features) for features in batch.features]
        packed = self.encoder.processor.packed
        chunks = plan_chunks(lengths, self.budget.chunk_tokens, packed)
        layout = Layout.gather(batch, chunks, self.encoder.device)
        padded = list(accumulate(tokens_laid_out([lengths[row] for row in chunk], packed) for chunk in chunks))
        idle, keep = self._company(len(chunks), bisect_right(padded, self.budget.keep_tokens))
        trouble = _Trouble(self.engine.meets)
        with self._replay() as replay, trouble.kept():
            result = cached_backward(
                chunks,
                encode=lambda chunk: self._guarded(chunk, lambda: self._embed(batch, chunk, replay), trouble),
                objective=lambda embedding_ID: layout.contrast(self.loss, embedding_ID),
                seeds=[step_seed(self.recipe.run.seed, step, micro, dist.rank(), index) for index in range(len(chunks))],
                weight=1.0 / self.recipe.train.accumulate,
                gather=lambda local_ID: _tell_and_gather(trouble, local_ID),
                keep=keep,
                idle=idle,
                backward=lambda rows_CD, gradient_CD, final: self.engine.backward(rows_CD, gradient_CD, last and final),
            )
            stats = _numbers(result)
        trouble.tell()
        return {**stats, "padding_share": 1 - sum(lengths) / padded[-1]}

    def _replay(self) -> Replay:
        return Replay(leading_frozen(self.encoder.backbone.towers()), limit=int(self.recipe.train.replay_gib * 2**30))

    def _embed(self, batch: Batch, chunk: list[int], replay: Replay) -> Tensor:
        inputs = self.encoder.processor.collate([batch.features[row] for row in chunk])
        with replay.chunk(chunk[0]):
            return self.engine.embed(inputs)

    def _guarded(self, chunk: list[int], embed: Callable[[], Tensor], trouble: _Trouble) -> Tensor:
        """Rows (C, D) of a chunk; in the first pass trouble waits until all ranks meet, and NaN stands for the rows."""
        if trouble.told:
            return embed()
        if not trouble.full:
            with trouble.kept():
                return embed()
        return torch.full((len(chunk), self.encoder.backbone.hidden_size), math.nan, device=self.encoder.device)

    def _company(self, chunks: int, keep: int) -> tuple[int, int]:
        """How many chunks to add and how many graphs to keep, so that ranks which meet in every chunk make the same passes."""
        if not self.engine.meets:
            return 0, keep
        return dist.highest(chunks) - chunks, dist.lowest(keep)

    def _settle(self, step: int, batch: Batch) -> Budget:
        """What the recipe leaves open, tried out on the first batch and written down; the same on every rank."""
        found = probe.try_out(self.engine, batch)
        found = Budget(dist.lowest(found.chunk_tokens), dist.lowest(found.keep_tokens), dist.any_rank(found.activation_checkpointing))
        if dist.is_main():
            found.write(self.run_dir, step + 1, "tried out")
        return found

    def _shrink(self, step: int, batches: list[Batch]) -> None:
        """Keep fewer graphs or halve the chunks, say so and write it down. Raises EnvError when every chunk is one item already."""
        assert self.budget is not None, "settled before the first step"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        longest = max(len(features) for batch in batches for features in batch.features)
        if not self.engine.meets:
            longest = dist.highest(longest)
        if not self.budget.keep_tokens and self.budget.chunk_tokens <= longest:
            raise EnvError(f"step {step + 1}: {probe.too_long(longest)}")
        self._cut(self.budget.smaller())
        if dist.is_main() or self.engine.meets:
            _logger.warning("step %d: out of memory; now %s, the batch stays", step + 1, self.budget)
            self.budget.write(self.run_dir, step + 1, "memory was full")

    def _report(self, step: int, batches: list[Batch], rank: int, reason: str) -> NonFiniteError:
        """Write down the pairs of all ranks, in the order of the global batch."""
        self.engine.forget()
        file = self.run_dir / f"nonfinite-{step + 1}.json"
        by_rank = dist.gather_objects([batch.pair_ids for batch in batches])
        pair_ids = [[id for ids in of_ranks for id in ids] for of_ranks in zip(*by_rank, strict=True)]
        if dist.is_main():
            io.write_json(file, {"step": step + 1, "rank": rank, "reason": reason, "pair_ids": pair_ids})
        return NonFiniteError(
            f"step {step + 1}, rank {rank}: {reason}; batch ids dumped to {file}. Weights are those of step {step}: "
            "look at these pairs, or lower train.lr, or use train.precision=fp32"
        )


def _tell_and_gather(trouble: _Trouble, local_ID: Tensor) -> tuple[Tensor, int]:
    if not trouble.full:
        with trouble.kept():
            check_rows(local_ID)
    trouble.tell()
    return dist.gather_rows(local_ID)


def _numbers(result: StepResult) -> dict[str, float]:
    """Loss and statistics as numbers, fetched from the device at once and only when all passes were started. Raises NonFiniteError."""
    tensors = {"loss": result.loss, **result.stats}
    found = dict(zip(tensors, torch.stack([tensor.double() for tensor in tensors.values()]).tolist(), strict=True))
    if not math.isfinite(found["loss"]):
        raise NonFiniteError(f"loss={found['loss']}")
    return found


def step_seed(*parts: int) -> int:
    """A random seed that is a pure function of (run seed, step, micro-batch, rank, chunk): no random state needs saving."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def set_training_mode(model: nn.Module) -> None:
    """Training mode where something is trained, evaluation mode in modules without a trainable parameter: a frozen tower draws no random
    number.
    """
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def _speed(batches: list[Batch], seconds: float) -> dict[str, float]:
    items = sum(len(batch.features) for batch in batches)
    tokens = sum(len(features) for batch in batches for features in batch.features)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "items_per_s": items / seconds, "tokens_per_s": tokens / seconds, "peak_bytes": peak}
