"""The training loop: exact contrastive steps, published checkpoints, a log that a resumed run continues byte for byte.

Order and random numbers are pure functions of (seed, step), so a run that was killed at any moment and started again ends with the same
bits.

Shape letters: B queries, N targets, I distinct items, D embedding; after the gather they count all ranks.
"""

from __future__ import annotations

import hashlib
import math
import resource
import shutil
import time
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vlm2vec import checkpoint, dist, io, log
from vlm2vec.batch import Batch, BatchDataset
from vlm2vec.collate import plan_chunks
from vlm2vec.config import Recipe, TrainConfig, differences, dump, load_recipe
from vlm2vec.data.mixture import Mixture, build_mixture
from vlm2vec.encoder import Encoder
from vlm2vec.engines import Engine, prepare
from vlm2vec.errors import EnvError, NonFiniteError, RecipeError
from vlm2vec.gradcache import cached_backward
from vlm2vec.losses import InfoNCE
from vlm2vec.replay import Replay, leading_frozen
from vlm2vec.signals import StopSignal

LOG, PERF, RECIPE = "log.jsonl", "perf.jsonl", "recipe.yaml"


def train(recipe: Recipe, stop: StopSignal | None = None) -> Encoder:
    """Run `recipe` to its last step, from its newest valid checkpoint if there is one, and return the trained encoder.

    Raises Interrupted after saving when `stop` was signalled, NonFiniteError before any update that would spread a NaN.
    """
    run_dir = Path(recipe.run.dir)
    accelerator = _accelerator(recipe, run_dir)
    resumed = checkpoint.latest(run_dir)
    encoder = load_encoder(recipe, resumed).to(accelerator.device)
    mixture = mixture_of(recipe)
    engine = prepare(recipe.train, encoder, InfoNCE(recipe.loss).to(accelerator.device))
    start = checkpoint.restore(resumed, engine) if resumed else 0
    total = total_steps(recipe, mixture)
    step_function = Step(recipe, engine)
    journal = Journal(run_dir, start, accelerator)

    def save(step: int) -> None:
        checkpoint.save(run_dir, step, engine, recipe.digest, recipe.checkpoint.keep)

    with log.progress(total, "training", "step", initial=start) as bar:
        for step, batches in _batches(recipe, mixture, encoder, start, total):
            if stop is not None and (number := dist.highest(stop.number if stop.requested else 0)):
                save(step)
                raise stop.interrupted(f"stopped before step {step + 1} of {total}; saved {run_dir}, run the same command to go on", number)
            row, perf = step_function(step, batches, learning_rate(recipe.train, step, total))
            journal.write(row, perf)
            bar.set_postfix(loss=f"{row['loss']:.3f}", acc=f"{row['accuracy']:.2f}", refresh=False)
            bar.update()
            if (step + 1) % recipe.checkpoint.every == 0 or step + 1 == total:
                save(step + 1)
    accelerator.end_training()
    return engine.trained(lambda: load_encoder(recipe, checkpoint.latest(run_dir)))


# -- building ----------------------------------------------------------------------------------------------------------------------------


def _accelerator(recipe: Recipe, run_dir: Path) -> Accelerator:
    """Device, process group and trackers. Mixed precision is the encoder's own autocast, so that evaluation computes the same."""
    accelerator = Accelerator(log_with=list(recipe.run.trackers) or None, project_dir=str(run_dir))
    if recipe.run.trackers:
        accelerator.init_trackers("vlm2vec", config={"recipe": dump(recipe), "digest": recipe.digest})
    return accelerator


def load_encoder(recipe: Recipe, resumed: Path | None) -> Encoder:
    """The recipe's base model with a fresh adapter drawn from `run.seed`, or the encoder of a checkpoint; only what the recipe trains is
    trainable.
    """
    torch.manual_seed(recipe.run.seed)
    if resumed is None:
        encoder = Encoder.build(recipe.model, recipe.lora)
    else:
        same = {key: getattr(recipe.model, key) for key in ("dtype", "attention", "trust_remote_code")}
        encoder = Encoder.from_pretrained(resumed, device="cpu", **same)
    encoder.precision = recipe.train.precision
    encoder.train_only(recipe.model.train)
    if recipe.train.activation_checkpointing:
        encoder.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return encoder


def mixture_of(recipe: Recipe) -> Mixture:
    """The pairs of the recipe, in the order that its seed, blocks and global batch fix."""
    return build_mixture(recipe.data, recipe.loss.explicit_negatives, recipe.train.global_batch, recipe.run.seed)


def total_steps(recipe: Recipe, mixture: Mixture) -> int:
    """Optimizer steps of the whole run."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    per_epoch = len(mixture) / (recipe.train.global_batch * recipe.train.accumulate)
    return max(1, math.floor(per_epoch * (recipe.train.epochs or 0)))


def learning_rate(options: TrainConfig, step: int, total: int) -> float:
    """Learning rate of 0-based `step`: linear warm-up over `warmup` steps, then constant, linear to 0 or half a cosine to 0."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    done = (step - options.warmup) / max(1, total - options.warmup)
    shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return options.lr * shape[options.schedule]


def _batches(recipe: Recipe, mixture: Mixture, encoder: Encoder, start: int, total: int) -> Iterator[tuple[int, list[Batch]]]:
    """(step, its `accumulate` micro-batches) from `start` on; workers read ahead, the order does not depend on them."""
    per_step = recipe.train.accumulate
    dataset = BatchDataset(mixture, encoder.processor, recipe.loss.explicit_negatives, dist.rank(), dist.world_size())
    indices = range(start * per_step, total * per_step)
    loader = DataLoader(dataset, sampler=indices, batch_size=None, num_workers=recipe.data.workers)
    batches = iter(loader)
    for step in range(start, total):
        yield step, [next(batches) for _ in range(per_step)]


# -- one step ----------------------------------------------------------------------------------------------------------------------------


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
    """One optimizer step on `accumulate` contrastive batches; returns the row of the log and the figures of speed."""

    recipe: Recipe
    engine: Engine

    def __post_init__(self) -> None:
        self.encoder, self.loss = self.engine.encoder, self.engine.loss
        set_training_mode(self.encoder.model)

    def __call__(self, step: int, batches: list[Batch], lr: float) -> tuple[dict[str, float], dict[str, float]]:
        started = time.perf_counter()
        try:
            stats = [self._backward(step, index, batch, last=index == len(batches) - 1) for index, batch in enumerate(batches)]
            self.engine.reduce()
            grad_norm = self.engine.clip(self.recipe.train.clip)
        except NonFiniteError as error:
            self.engine.forget()
            raise self._report(step, batches, error) from error
        self.engine.step(lr)
        row = {key: sum(entry[key] for entry in stats) / len(stats) for key in stats[0]}
        return {"step": step + 1, **row, "grad_norm": grad_norm, "lr": lr}, _speed(batches, time.perf_counter() - started)

    def _backward(self, step: int, micro: int, batch: Batch, last: bool = True) -> dict[str, float]:
        lengths = [len(features) for features in batch.features]
        chunks = plan_chunks(lengths, self.recipe.train.chunk_tokens)
        layout = Layout.gather(batch, chunks, self.encoder.device)
        padded = list(accumulate(len(chunk) * lengths[chunk[0]] for chunk in chunks))
        idle, keep = self._company(len(chunks), bisect_right(padded, self.recipe.train.keep_tokens))
        with Replay(leading_frozen(self.encoder.backbone.towers())) as replay:
            result = cached_backward(
                chunks,
                encode=lambda chunk: self._embed(batch, chunk, replay),
                objective=lambda embedding_ID: layout.contrast(self.loss, embedding_ID),
                seeds=[step_seed(self.recipe.run.seed, step, micro, dist.rank(), index) for index in range(len(chunks))],
                weight=1.0 / self.recipe.train.accumulate,
                gather=dist.gather_rows,
                keep=keep,
                idle=idle,
                backward=lambda rows_CD, gradient_CD, final: self.engine.backward(rows_CD, gradient_CD, last and final),
            )
        if not torch.isfinite(result.loss):
            raise NonFiniteError(f"loss={result.loss.item()}")
        return {
            "loss": result.loss.item(),
            **{name: float(value) for name, value in result.stats.items()},
            "padding_share": 1 - sum(lengths) / padded[-1],
        }

    def _company(self, chunks: int, keep: int) -> tuple[int, int]:
        """How many chunks to add and how many graphs to keep, so that ranks which meet in every chunk make the same passes."""
        if not self.engine.meets:
            return 0, keep
        return dist.highest(chunks) - chunks, dist.lowest(keep)

    def _embed(self, batch: Batch, chunk: list[int], replay: Replay) -> Tensor:
        inputs = self.encoder.processor.collate([batch.features[row] for row in chunk])
        with replay.chunk(chunk[0]):
            return self.engine.embed(inputs)

    def _report(self, step: int, batches: list[Batch], error: NonFiniteError) -> NonFiniteError:
        file = Path(self.recipe.run.dir) / f"nonfinite-{step + 1}.json"
        ids = [batch.pair_ids for batch in batches]
        io.write_json(file, {"step": step + 1, "rank": dist.rank(), "reason": str(error), "pair_ids": ids})
        return NonFiniteError(
            f"step {step + 1}, rank {dist.rank()}: {error}; batch ids dumped to {file}. Weights are those of step {step}: "
            "look at these pairs, or lower train.lr, or use train.precision=fp32"
        )


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


# -- the run folder ----------------------------------------------------------------------------------------------------------------------


class Journal:
    """`log.jsonl` holds what the run computed and is the same bytes however often it was killed; `perf.jsonl` holds how fast it went."""

    def __init__(self, run_dir: Path, start: int, accelerator: Accelerator) -> None:
        self.run_dir, self.accelerator = run_dir, accelerator
        if dist.is_main():
            for name in (LOG, PERF):
                file = run_dir / name
                rows = io.read_jsonl(file) if file.exists() else []
                io.rewrite_jsonl(file, [row for row in rows if row["step"] <= start])

    def write(self, row: dict[str, float], perf: dict[str, float]) -> None:
        if dist.is_main():
            io.append_jsonl(self.run_dir / LOG, row)
            io.append_jsonl(self.run_dir / PERF, {"step": row["step"], **perf})
        self.accelerator.log({**row, **perf}, step=int(row["step"]))


def prepare_run_dir(recipe: Recipe, fresh: bool = False) -> Path:
    """Make the run folder and pin its recipe. Raises RecipeError, naming the keys that differ, if another recipe's run lies there."""
    run_dir = Path(recipe.run.dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvError(f"cannot write {run_dir}: {error.strerror or error}; choose another run.dir") from error
    pinned = run_dir / RECIPE
    if fresh:
        _forget(run_dir)
    elif pinned.exists():
        differing = differences(load_recipe(pinned), recipe)
        if differing:
            raise RecipeError(
                f"{run_dir} holds a run of another recipe; differing: {', '.join(differing)}. Choose another run.dir or pass --fresh"
            )
    io.write_atomic(pinned, dump(recipe))
    return run_dir


def _forget(run_dir: Path) -> None:
    """Remove what an earlier run wrote here, and nothing else."""
    for pattern in ("step-*", "*.jsonl", "nonfinite-*.json", "results*.json", "report.*", "model", RECIPE):
        for path in run_dir.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
