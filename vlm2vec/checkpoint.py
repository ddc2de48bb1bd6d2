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
from torch import Tensor, nn

from vlm2vec import io, log
from vlm2vec.encoder import Encoder
from vlm2vec.errors import CheckpointError, EnvError, NonFiniteError

FORMAT = 1
_NAME = re.compile(r"step-(\d{6,})$")
_logger = log.get_logger(__name__)


def trainable(encoder: Encoder, loss: nn.Module) -> dict[str, nn.Parameter]:
    """Every trained parameter by a stable name: the encoder's, then the loss's own (a learnable temperature)."""
    named = {f"encoder.{name}": parameter for name, parameter in encoder.model.named_parameters() if parameter.requires_grad}
    return named | {f"loss.{name}": parameter for name, parameter in loss.named_parameters() if parameter.requires_grad}


def save(run_dir: Path, step: int, encoder: Encoder, loss: nn.Module, optimizer: torch.optim.Optimizer, recipe_digest: str) -> Path:
    """Publish `step-<step>` atomically. Raises NonFiniteError rather than save a NaN, EnvError if the disk refuses."""
    parameters = trainable(encoder, loss)
    for name, parameter in parameters.items():
        if not torch.isfinite(parameter).all():
            raise NonFiniteError(f"step {step}: {name} holds non-finite values; nothing was saved")
    target = run_dir / f"step-{step:06d}"
    with io.publishing(target, replace=True) as staging:
        encoder.save_pretrained(staging, recipe_digest=recipe_digest)
        _save_tensors(loss.state_dict(), staging / "loss.safetensors")
        _save_tensors(_optimizer_tensors(optimizer, parameters), staging / "optimizer.safetensors")
        io.write_json(staging / "state.json", {"format": FORMAT, "step": step, "recipe_digest": recipe_digest})
    return target


def steps(run_dir: Path) -> list[Path]:
    """Published checkpoint folders, oldest first; nothing is verified here."""
    found = [path for path in run_dir.glob("step-*") if _NAME.search(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def latest(run_dir: Path) -> Path | None:
    """The newest checkpoint that matches its manifest; None if none was ever published.

    A damaged one is named in a warning and passed over; CheckpointError if all are damaged, because starting afresh would hide that.
    """
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


def restore(directory: Path, encoder: Encoder, loss: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Fill `loss` and `optimizer` from a verified checkpoint and return its step; `encoder` was loaded from the same folder."""
    state = io.read_json(directory / "state.json")
    if state["format"] > FORMAT:
        raise CheckpointError(f"{directory}: written in format {state['format']}; this version reads format {FORMAT}, upgrade vlm2vec")
    loss.load_state_dict(load_file(directory / "loss.safetensors"))
    _load_optimizer(load_file(directory / "optimizer.safetensors"), optimizer, trainable(encoder, loss), directory)
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


def _optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """AdamW's moments and step counts as `<parameter>/<moment>`."""
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer(
    tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], directory: Path
) -> None:
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition("/")
        if owner not in parameters:
            raise CheckpointError(
                f"{directory}: optimizer state of {owner}, which this recipe does not train; use the recipe that wrote it"
            )
        parameter = parameters[owner]
        # AdamW keeps its step count on the CPU and in float32 whatever the parameter is.
        optimizer.state[parameter][key] = tensor if key == "step" else tensor.to(parameter.device)
