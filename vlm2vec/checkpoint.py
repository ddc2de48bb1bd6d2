"""Publish and resume: a checkpoint is a folder `step-000500` that appears whole or not at all.

It is an encoder folder (`Encoder.from_pretrained` reads it) plus `loss.safetensors`, `optimizer.safetensors`, `state.json` and, written
last, `manifest.json`. The order of the data and the random numbers are pure functions of the step, so the step is all the state there is
beside tensors.

The manifest finds accidents. Against a folder that somebody put together, the state is held against the engine tensor by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlm2vec import dist, io, log
from vlm2vec.backbones.weights import misfit, read_safetensors
from vlm2vec.engines import Engine, trainable
from vlm2vec.errors import CheckpointError, EnvError, InputError, NonFiniteError
from vlm2vec.strict_yaml import shorten

FORMAT = 1
STATE, LOSS, OPTIMIZER = "state.json", "loss.safetensors", "optimizer.safetensors"
KEYS = {"format": int, "step": int, "recipe_digest": str}  # of the state
COUNTED = 1 << 24  # AdamW counts its steps in float32, which goes no further
_NAME = re.compile(r"step-\d{6,}")
_logger = log.get_logger(__name__)


def save(run_dir: Path, step: int, engine: Engine, recipe_digest: str, keep: int) -> Path:
    """Publish `step-<step>` atomically from rank 0, then delete all but the `keep` newest. Every rank calls, and ends as rank 0 does.

    Raises NonFiniteError rather than save a NaN, EnvError if the disk refuses.
    """
    target = run_dir / _name(step)
    optimizer = engine.optimizer_tensors()
    with engine.whole(), dist.agreeing():
        if dist.is_main():
            _check_finite(trainable(engine.encoder, engine.loss) | optimizer, step)
            with io.publishing(target, replace=True) as staging:
                engine.encoder.save_pretrained(staging, recipe_digest=recipe_digest)
                _save_tensors(engine.loss.state_dict(), staging / LOSS)
                _save_tensors(optimizer, staging / OPTIMIZER)
                io.write_json(staging / STATE, {"format": FORMAT, "step": step, "recipe_digest": recipe_digest})
            prune(run_dir, keep)
    return target


def _check_finite(tensors: Mapping[str, Tensor], step: int) -> None:
    """Raise NonFiniteError for what `restore` would refuse."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(f"step {step}: {name} holds non-finite values; nothing was saved")


def steps(run_dir: Path) -> list[Path]:
    """Published checkpoint folders, oldest first; nothing is verified here."""
    found = [path for path in run_dir.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
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
    """Fill the loss and the optimizer from a verified checkpoint and return its step; the encoder was loaded from the same folder.

    Every rank calls. Raises CheckpointError on all of them, before anything is changed, unless the state is whole and fits this engine:
    exactly the keys and tensors that `save` writes, in their shapes and number formats, finite, and of one step.
    """
    with dist.agreeing(), _with_a_way_out(directory):
        step = _read_step(directory)
        loss = _read_tensors(directory / LOSS, engine.loss.state_dict())
        moments = _read_tensors(directory / OPTIMIZER, engine.optimizer_layout() if step else {})
        _check_moments(moments, step, directory / OPTIMIZER)
    engine.loss.load_state_dict(loss)
    engine.load_optimizer(moments)
    return step


@contextmanager
def _with_a_way_out(directory: Path) -> Iterator[None]:
    """Whatever cannot be used inside ends as a CheckpointError that says how to go on without it."""
    try:
        yield
    except InputError as error:
        raise CheckpointError(
            f"{error}. Go on with the recipe that wrote {directory.name}, or remove that folder: the run then goes on from the one before"
        ) from error


def _read_step(directory: Path) -> int:
    """The step that the state names, which the name of the folder must repeat. Raises InputError."""
    file = directory / STATE
    state = io.read_json(file)
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: holds a {type(state).__name__}, not an object with {', '.join(KEYS)}")
    written = state.get("format", FORMAT)
    if type(written) is not int or written != FORMAT:  # True and 1.0 equal 1 too
        raise CheckpointError(f"{file}: written in format {_show(written)}; this version reads format {FORMAT}, upgrade vlm2vec")
    for key in sorted(KEYS.keys() ^ state.keys()):
        raise CheckpointError(f"{file}: key {shorten(key)} is {'missing' if key in KEYS else 'unexpected'}; it needs {', '.join(KEYS)}")
    for key, kind in KEYS.items():
        if type(state[key]) is not kind:
            raise CheckpointError(f"{file}: {key} is {_show(state[key])}, not {'an integer' if kind is int else 'a string'}")
    step: int = state["step"]
    if step < 0 or directory.name != _name(step):
        raise CheckpointError(f"{file}: step is {_show(step)} but the folder is called {directory.name}; if you renamed it, rename it back")
    return step


def _read_tensors(file: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, which must be like those `expected`. Raises InputError."""
    found = read_safetensors(file)
    if problem := misfit(expected, found, exact=True):
        raise CheckpointError(f"{file}: {problem}")
    return found


def _check_moments(tensors: Mapping[str, Tensor], step: int, file: Path) -> None:
    """Raise CheckpointError for a mean of squares below zero, or a parameter that took another number of steps than the run."""
    for name, tensor in tensors.items():
        if name.endswith("/exp_avg_sq") and (tensor < 0).any():
            raise CheckpointError(f"{file}: tensor {name} holds {tensor.min().item():.3g}, and is a mean of squares; the file is damaged")
        if name.endswith("/step") and tensor.item() != min(step, COUNTED):
            raise CheckpointError(f"{file}: tensor {name} is {tensor.item():.9g}, but {STATE} is of step {step}")


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _show(value: object) -> str:
    return shorten(repr(value), quote=False)


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints. One that the disk will not let go is left, and tried again after the next save."""
    for path in steps(run_dir)[:-keep]:
        try:
            io.unpublish(path)
        except EnvError as error:
            _logger.warning("%s; it stays for now", error)


def _save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
