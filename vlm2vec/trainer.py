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
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vlm2vec import checkpoint, dist, io, log
from vlm2vec.batch import Batch
from vlm2vec.collate import plan_chunks
from vlm2vec.config import Recipe, TrainConfig, differences, dump, load_recipe
from vlm2vec.data.mixture import Mixture, build_mixture
from vlm2vec.encoder import Encoder
from vlm2vec.errors import EnvError, NonFiniteError, RecipeError
from vlm2vec.feed import read_steps
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
    loss = InfoNCE(recipe.loss).to(accelerator.device)
    optimizer = build_optimizer(recipe.train, encoder, loss)
    start = checkpoint.restore(resumed, encoder, loss, optimizer) if resumed else 0
    total = total_steps(recipe, mixture)
    step_function = Step(recipe, encoder, loss, optimizer)
    journal = Journal(run_dir, start, accelerator)
    with log.progress(total, "training", "step", initial=start) as bar:
        for step, batches in read_steps(recipe, mixture, encoder.processor, start, total):
            if stop is not None and dist.any_rank(stop.requested):
                _save(recipe, run_dir, step, encoder, loss, optimizer)
                raise stop.interrupted(f"stopped before step {step + 1} of {total}; saved {run_dir}, run the same command to go on")
            row, perf = step_function(step, batches, learning_rate(recipe.train, step, total))
            journal.write(row, perf)
            bar.set_postfix(loss=f"{row['loss']:.3f}", acc=f"{row['accuracy']:.2f}", refresh=False)
            bar.update()
            if (step + 1) % recipe.checkpoint.every == 0 or step + 1 == total:
                _save(recipe, run_dir, step + 1, encoder, loss, optimizer)
    accelerator.end_training()
    return encoder


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


def build_optimizer(options: TrainConfig, encoder: Encoder, loss: nn.Module) -> torch.optim.AdamW:
    """AdamW with the projector on its own learning rate and no decay on biases, norms and the temperature."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in checkpoint.trainable(encoder, loss).items():
        projector = name.startswith("encoder.") and encoder.backbone.part_of(name.removeprefix("encoder.")) == "projector"
        ratio = options.projector_lr / options.lr if projector and options.projector_lr else 1.0
        decay = options.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((ratio, decay), []).append(parameter)
    tables = [{"params": members, "lr_ratio": ratio, "weight_decay": decay} for (ratio, decay), members in groups.items()]
    return torch.optim.AdamW(tables, lr=options.lr, betas=options.betas)


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
    encoder: Encoder
    loss: InfoNCE
    optimizer: torch.optim.Optimizer
    parameters: dict[str, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = checkpoint.trainable(self.encoder, self.loss)
        set_training_mode(self.encoder.model)

    def __call__(self, step: int, batches: list[Batch], lr: float) -> tuple[dict[str, float], dict[str, float]]:
        started = time.perf_counter()
        try:
            stats = [self._backward(step, index, batch) for index, batch in enumerate(batches)]
            self._reduce()
            grad_norm = self._clip(step)
        except NonFiniteError as error:
            self.optimizer.zero_grad()
            raise self._report(step, batches, error) from error
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        row = {key: sum(entry[key] for entry in stats) / len(stats) for key in stats[0]}
        return {"step": step + 1, **row, "grad_norm": grad_norm, "lr": lr}, _speed(batches, time.perf_counter() - started)

    def _backward(self, step: int, micro: int, batch: Batch) -> dict[str, float]:
        lengths = [len(features) for features in batch.features]
        chunks = plan_chunks(lengths, self.recipe.train.chunk_tokens)
        layout = Layout.gather(batch, chunks, self.encoder.device)
        padded = list(accumulate(len(chunk) * lengths[chunk[0]] for chunk in chunks))
        with Replay(leading_frozen(self.encoder.backbone.towers())) as replay:
            result = cached_backward(
                chunks,
                encode=lambda chunk: self._embed(batch, chunk, replay),
                objective=lambda embedding_ID: layout.contrast(self.loss, embedding_ID),
                seeds=[step_seed(self.recipe.run.seed, step, micro, dist.rank(), index) for index in range(len(chunks))],
                weight=1.0 / self.recipe.train.accumulate,
                gather=dist.gather_rows,
                keep=bisect_right(padded, self.recipe.train.keep_tokens),
            )
        if not torch.isfinite(result.loss):
            raise NonFiniteError(f"loss={result.loss.item()}")
        return {
            "loss": result.loss.item(),
            **{name: float(value) for name, value in result.stats.items()},
            "padding_share": 1 - sum(lengths) / padded[-1],
        }

    def _embed(self, batch: Batch, chunk: list[int], replay: Replay) -> Tensor:
        inputs = self.encoder.processor.collate([batch.features[row] for row in chunk])
        with replay.chunk(chunk[0]):
            return self.encoder.embed({name: tensor.to(self.encoder.device) for name, tensor in inputs.items()})

    def _reduce(self) -> None:
        """Sum the encoder's gradients over ranks: each rank holds its own items' share of the gradient of one global loss.

        The loss's own parameters saw the whole batch on every rank, so their gradients are equal already.
        """
        if dist.world_size() > 1:
            for name, parameter in self.parameters.items():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                if name.startswith("encoder."):
                    dist.all_reduce_sum([parameter.grad])

    def _clip(self, step: int) -> float:
        options = self.recipe.train
        grads = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if not torch.isfinite(norm):
            raise NonFiniteError(f"gradient norm={norm.item()}")
        if options.clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), options.clip, norm)
        return norm.item()

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


def _save(recipe: Recipe, run_dir: Path, step: int, encoder: Encoder, loss: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if dist.is_main():
        checkpoint.save(run_dir, step, encoder, loss, optimizer, recipe.digest)
        checkpoint.prune(run_dir, recipe.checkpoint.keep)
    dist.barrier()
