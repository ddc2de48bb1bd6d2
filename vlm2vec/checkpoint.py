"""Publish and resume: a checkpoint is a folder `step-000500` that appears whole or not at all.

It is an encoder folder (`Encoder.from_pretrained` reads it) plus `loss.safetensors`, `optimizer.safetensors`, `state.json` and, written
last, `manifest.json`. The order of the data and the random numbers are pure functions of the step, so the step is all the state there is
beside tensors.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm2vec import dist, io, log
from vlm2vec.engines import Engine, trainable
from vlm2vec.errors import CheckpointError, EnvError, NonFiniteError

FORMAT = 1
_NAME = re.compile(r"step-(\d{6,})$")
_logger = log.get_logger(__name__)


def save(run_dir: Path, step: int, engine: Engine, recipe_digest: str, keep: int) -> Path:
    """Publish `step-<step>` atomically from rank 0, then delete all but the `keep` newest. Every rank calls, and ends as rank 0 does.

    Raises NonFiniteError rather than save a NaN, EnvError if the disk refuses.
    """
    target = run_dir / f"step-{step:06d}"
    optimizer = engine.optimizer_tensors()
    with engine.whole(), dist.agreeing():
        if dist.is_main():
            _check_finite(engine, step)
            with io.publishing(target, replace=True) as staging:
                engine.encoder.save_pretrained(staging, recipe_digest=recipe_digest)
                _save_tensors(engine.loss.state_dict(), staging / "loss.safetensors")
                _save_tensors(optimizer, staging / "optimizer.safetensors")
                io.write_json(staging / "state.json", {"format": FORMAT, "step": step, "recipe_digest": recipe_digest})
            prune(run_dir, keep)
    return target


def _check_finite(engine: Engine, step: int) -> None:
    for name, parameter in trainable(engine.encoder, engine.loss).items():
        if not torch.isfinite(parameter).all():
            raise NonFiniteError(f"step {step}: {name} holds non-finite values; nothing was saved")


def steps(run_dir: Path) -> list[Path]:
    """Published checkpoint folders, oldest first; nothing is verified here."""
    found = [path for path in run_dir.glob("step-*") if _NAME.search(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def latest(run_dir: Path) -> Path | None:
    """The newest checkpoint that matches its manifest; None if none was ever published. Rank 0 looks, every rank gets its answer.

    A damaged one is named in a warning and passed over; CheckpointError if all are damaged, because starting afresh would hide that.
    """
    name = ""
    with dist.agreeing():
        if dist.is_main() and (newest := _newest_intact(run_dir)):
            name = newest.name
    name = dist.gather_objects(name)[0]
    with dist.agreeing():
        if name and not (run_dir / name).is_dir():
            raise EnvError(f"{run_dir / name} is not visible from this machine; put run.dir on a file system that all nodes share")
    return run_dir / name if name else None


def _newest_intact(run_dir: Path) -> Path | None:
    reasons = []
    for path in reversed(steps(run_dir)):
        try:
            io.verify_manifest(path)
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            _logger.warning("%s; resuming %s", reason, path.name)
        return path
    if reasons:
        raise CheckpointError(
            f"{run_dir}: no checkpoint is intact:\n  " + "\n  ".join(reasons) + "\nchoose another run.dir or pass --fresh"
        )
    return None


def restore(directory: Path, engine: Engine) -> int:
    """Fill the loss and the optimizer from a verified checkpoint and return its step; the encoder was loaded from the same folder."""
    state = io.read_json(directory / "state.json")
    if state["format"] > FORMAT:
        raise CheckpointError(f"{directory}: written in format {state['format']}; this version reads format {FORMAT}, upgrade vlm2vec")
    engine.loss.load_state_dict(load_file(directory / "loss.safetensors"))
    engine.load_optimizer(load_file(directory / "optimizer.safetensors"), directory)
    return int(state["step"])


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints. One that the disk will not let go is left, and tried again after the next save."""
    for path in steps(run_dir)[:-keep]:
        try:
            io.unpublish(path)
        except EnvError as error:
            _logger.warning("%s; it stays for now", error)


def _save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
