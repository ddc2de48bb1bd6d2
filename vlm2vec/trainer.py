"""The training loop: exact contrastive steps, published checkpoints, a log that a resumed run continues byte for byte.

Order and random numbers are pure functions of (seed, step), so a run that was killed at any moment and started again ends with the same
bits.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator

from vlm2vec import checkpoint, dist, io, log
from vlm2vec.config import Recipe, TrainConfig, differences, dump, load_recipe
from vlm2vec.data.mixture import mixture_of, total_steps
from vlm2vec.encoder import TRAINED_PARTS, Encoder
from vlm2vec.engines import prepare
from vlm2vec.engines.compiled import compiled
from vlm2vec.errors import CheckpointError, EnvError, RecipeError
from vlm2vec.feed import read_steps
from vlm2vec.losses import InfoNCE
from vlm2vec.precompute import precompute
from vlm2vec.signals import StopSignal
from vlm2vec.step import Step

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
    total = total_steps(recipe, mixture)
    cutting = "stopped while encoding pictures; run the same command to go on"
    with stop.cutting(cutting) if stop and recipe.data.feature_cache else nullcontext():  # else the signal waits for the first save
        features = precompute(recipe, encoder, mixture, total * recipe.train.accumulate)
    engine = prepare(recipe.train, encoder, InfoNCE(recipe.loss).to(accelerator.device))
    start = checkpoint.restore(resumed, engine) if resumed else 0
    if start > total:
        raise CheckpointError(f"{resumed}: beyond the last step of this recipe, {total}; choose another run.dir or pass --fresh")
    step_function = Step(recipe, engine)
    journal = Journal(run_dir, start, accelerator)

    def save(step: int) -> None:
        checkpoint.save(run_dir, step, engine, recipe.digest, recipe.checkpoint.keep)

    with compiled(encoder, recipe.train), log.progress(total, "training", "step", initial=start) as bar:
        for step, batches in read_steps(recipe, mixture, encoder.processor, start, total, features):
            if stop is not None and (number := dist.highest(stop.number if stop.requested else 0)):
                save(step)
                raise stop.interrupted(f"stopped before step {step + 1} of {total}; saved {run_dir}, run the same command to go on", number)
            row, perf = step_function(step, batches, learning_rate(recipe.train, step, total))
            journal.write(row, perf)
            bar.set_postfix(loss=f"{row['loss']:.3f}", acc=f"{row['accuracy']:.2f}", refresh=False)
            bar.update()
            if (step + 1) % recipe.checkpoint.every == 0 or step + 1 == total:
                save(step + 1)
    for tracker in accelerator.trackers:  # not `end_training`, which ends the process group too: ranks evaluate together afterwards
        tracker.finish()
    return engine.trained(lambda: load_encoder(recipe, checkpoint.latest(run_dir)))


# -- building ----------------------------------------------------------------------------------------------------------------------------


def _accelerator(recipe: Recipe, run_dir: Path) -> Accelerator:
    """Device, process group and trackers. Mixed precision is the encoder's own autocast, so that evaluation computes the same."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with=list(recipe.run.trackers) or None, project_dir=str(run_dir))
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
        same = {key: getattr(recipe.model, key) for key in ("dtype", "attention", "kernels", "trust_remote_code")}
        encoder = Encoder.from_pretrained(resumed, device="cpu", **same)
    found = encoder.trained_parts
    encoder.precision = recipe.train.precision
    encoder.train_only(recipe.model.train)
    if resumed and encoder.adapter is not None:
        _check_parts(found, encoder.trained_parts, resumed / TRAINED_PARTS)
    return encoder


def _check_parts(found: Sequence[str], trained: Sequence[str], file: Path) -> None:
    """Raise CheckpointError unless what lies beside an adapter are all weights that the recipe trains in full, and no others."""
    for name in sorted({*found} ^ {*trained}):
        fault = "unexpected" if name in found else "missing"
        raise CheckpointError(f"{file}: tensor {name} is {fault}; go on with the recipe that wrote it")


def learning_rate(options: TrainConfig, step: int, total: int) -> float:
    """Learning rate of 0-based `step`: linear warm-up over `warmup` steps, then constant, linear to 0 or half a cosine to 0."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    done = (step - options.warmup) / max(1, total - options.warmup)
    shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return options.lr * shape[options.schedule]


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
