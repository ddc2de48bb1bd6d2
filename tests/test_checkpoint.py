"""Publishing and resuming: whole or not at all, newest intact first, never a NaN, never a fresh start that hides damage."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from tests.runs import start_run, tiny_recipe
from vlm2vec import checkpoint, io
from vlm2vec.encoder import Encoder
from vlm2vec.engines import prepare, trainable
from vlm2vec.errors import CheckpointError, NonFiniteError
from vlm2vec.losses import InfoNCE
from vlm2vec.trainer import load_encoder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with two checkpoints; tests copy what they change."""
    folder = tmp_path_factory.mktemp("run")
    start_run(tiny_recipe(folder, steps=6))
    return folder


@pytest.fixture
def copied(run_dir: Path, tmp_path: Path) -> Path:
    for step in checkpoint.steps(run_dir):
        (tmp_path / step.name).mkdir()
        for file in step.iterdir():
            (tmp_path / step.name / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_checkpoint_is_an_encoder_folder(run_dir: Path) -> None:
    newest = checkpoint.latest(run_dir)
    assert newest is not None and newest.name == "step-000006"
    assert Encoder.from_pretrained(newest).encode(["a"]).shape[0] == 1
    assert io.read_json(newest / "vlm2vec.json")["recipe_digest"] == tiny_recipe(run_dir, steps=6).digest


def test_restoring_gives_back_every_moment_and_the_temperature(run_dir: Path) -> None:
    recipe, newest = tiny_recipe(run_dir, steps=6), run_dir / "step-000006"
    encoder, loss = load_encoder(recipe, newest), InfoNCE(recipe.loss)
    engine = prepare(recipe.train, encoder, loss)
    assert checkpoint.restore(newest, engine) == 6
    for parameter in engine.parameters.values():
        state = engine.optimizer.state[parameter]
        assert state["step"] == 6 and state["exp_avg"].shape == parameter.shape and state["exp_avg_sq"].abs().sum() > 0
    assert loss.log_temperature is not None and loss.log_temperature.item() != InfoNCE(recipe.loss).log_temperature.item()


def test_a_damaged_newest_is_named_and_the_one_before_it_is_used(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    damaged = copied / "step-000006" / "adapter_model.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    with caplog.at_level(logging.WARNING, "vlm2vec"):
        assert checkpoint.latest(copied) == copied / "step-000003"
    assert "step-000006" in caplog.text and "resuming step-000003" in caplog.text


def test_an_incomplete_newest_is_passed_over(copied: Path) -> None:
    (copied / "step-000006" / "manifest.json").unlink()
    assert checkpoint.latest(copied) == copied / "step-000003"


def test_a_run_goes_on_over_a_damaged_checkpoint(copied: Path) -> None:
    (copied / "step-000006" / "manifest.json").unlink()
    start_run(tiny_recipe(copied, steps=6))
    assert checkpoint.latest(copied) == copied / "step-000006"


def test_nothing_intact_is_an_error_and_nothing_at_all_is_a_start(copied: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for step in checkpoint.steps(copied):
        (step / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no checkpoint is intact(.|\n)*step-000006(.|\n)*step-000003(.|\n)*--fresh"):
        checkpoint.latest(copied)
    assert checkpoint.latest(tmp_path_factory.mktemp("empty")) is None


def test_pruning_keeps_the_newest(copied: Path) -> None:
    checkpoint.prune(copied, keep=1)
    assert [path.name for path in checkpoint.steps(copied)] == ["step-000006"]


def test_a_nan_is_never_saved(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    encoder, loss = load_encoder(recipe, None), InfoNCE(recipe.loss)
    name, parameter = next(iter(trainable(encoder, loss).items()))
    parameter.data.view(-1)[0] = float("inf")
    with pytest.raises(NonFiniteError, match=name):
        checkpoint.save(tmp_path, 1, prepare(recipe.train, encoder, loss), recipe.digest, keep=2)
    assert checkpoint.steps(tmp_path) == []


def test_a_newer_format_and_a_foreign_optimizer_are_refused(copied: Path) -> None:
    newest = copied / "step-000006"
    recipe = tiny_recipe(copied)
    encoder, loss = load_encoder(recipe, newest), InfoNCE(recipe.loss)
    encoder.model.requires_grad_(False)
    engine = prepare(recipe.train, encoder, loss)
    with pytest.raises(CheckpointError, match="does not train"):
        checkpoint.restore(newest, engine)
    io.write_json(newest / "state.json", {**io.read_json(newest / "state.json"), "format": 2})
    with pytest.raises(CheckpointError, match="format 2"):
        checkpoint.restore(newest, engine)


def test_trained_names_are_stable(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    names = [list(trainable(load_encoder(recipe, None), InfoNCE(recipe.loss))) for _ in range(2)]
    assert names[0] == names[1] and names[0][-1] == "loss.log_temperature" and torch.is_grad_enabled()
