"""Publishing and resuming: whole or not at all, newest intact first, never a NaN, never a fresh start that hides damage."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.runs import start_run, tiny_recipe
from vlm2vec import checkpoint, io
from vlm2vec.encoder import Encoder
from vlm2vec.engines import Engine, prepare, trainable
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


def test_a_moment_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    """The weights may be well: what squares overflow in divides by infinity."""
    recipe = tiny_recipe(tmp_path)
    engine = prepare(recipe.train, load_encoder(recipe, None), InfoNCE(recipe.loss))
    engine.reduce()
    engine.step(0.0)
    parameter = engine.parameters["loss.log_temperature"]
    engine.optimizer.state[parameter]["exp_avg_sq"].fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="step 1: loss.log_temperature/exp_avg_sq holds non-finite values; nothing was saved"):
        checkpoint.save(tmp_path, 1, engine, recipe.digest, keep=2)
    assert checkpoint.steps(tmp_path) == []


@pytest.fixture(scope="module")
def engine(run_dir: Path) -> Engine:
    """Around the encoder of the last checkpoint, its loss and optimizer as they start."""
    recipe = tiny_recipe(run_dir, steps=6)
    return prepare(recipe.train, load_encoder(recipe, run_dir / "step-000006"), InfoNCE(recipe.loss))


def edit_json(folder: Path, **keys: object) -> None:
    io.write_json(folder / "state.json", {**io.read_json(folder / "state.json"), **keys})


def edit(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "format": (lambda folder: edit_json(folder, format=2), "state.json: written in format 2; this version reads format 1, upgrade"),
    "key": (lambda folder: edit_json(folder, epoch=1), "state.json: key 'epoch' is unexpected"),
    "step": (lambda folder: edit_json(folder, step=True), "state.json: step is True, not an integer"),
    "other step": (lambda folder: edit_json(folder, step=3), "state.json: step is 3 but the folder is called step-000006"),
    "loss": (lambda folder: edit(folder, "loss.safetensors", dict.clear), "loss.safetensors: tensor log_temperature is missing"),
    "optimizer": (lambda folder: (folder / "optimizer.safetensors").write_bytes(b"<html>"), "optimizer.safetensors: file is an HTML page"),
    "moments": (
        lambda folder: edit(folder, "optimizer.safetensors", lambda table: table["loss.log_temperature/exp_avg_sq"].fill_(-1)),
        "optimizer.safetensors: tensor loss.log_temperature/exp_avg_sq holds -1, and is a mean of squares",
    ),
    "count": (
        lambda folder: edit(folder, "optimizer.safetensors", lambda table: table["loss.log_temperature/step"].fill_(7)),
        "optimizer.safetensors: tensor loss.log_temperature/step is 7, but state.json is of step 6",
    ),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_state_that_does_not_fit_is_refused_before_anything_changes(kind: str, copied: Path, engine: Engine) -> None:
    """Whatever a manifest says: none is looked at here."""
    spoil, words = SPOILED[kind]
    spoil(copied / "step-000006")
    before = {name: tensor.clone() for name, tensor in engine.loss.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"{words}(.|\n)*recipe that wrote step-000006, or remove that folder") as caught:
        checkpoint.restore(copied / "step-000006", engine)
    assert caught.value.exit_code == 2 and not engine.optimizer.state
    assert all(torch.equal(before[name], tensor) for name, tensor in engine.loss.state_dict().items())


def test_an_optimizer_of_other_parameters_is_refused(run_dir: Path) -> None:
    recipe = tiny_recipe(run_dir)
    encoder, loss = load_encoder(recipe, run_dir / "step-000006"), InfoNCE(recipe.loss)
    encoder.model.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"lora_A\S+/exp_avg is unexpected; the file was made for another model"):
        checkpoint.restore(run_dir / "step-000006", prepare(recipe.train, encoder, loss))


def test_a_renamed_folder_is_told_its_name(copied: Path, engine: Engine) -> None:
    (copied / "step-000006").rename(copied / "step-000600")
    newest = checkpoint.latest(copied)
    assert newest == copied / "step-000600"
    with pytest.raises(CheckpointError, match="step is 6 but the folder is called step-000600; if you renamed it, rename it back"):
        checkpoint.restore(newest, engine)


def test_a_step_below_zero_is_none_even_if_the_folder_agrees(copied: Path, engine: Engine) -> None:
    folder = (copied / "step-000006").rename(copied / "step--00006")
    edit_json(folder, step=-6)
    with pytest.raises(CheckpointError, match="state.json: step is -6"):
        checkpoint.restore(folder, engine)


def test_other_folders_are_no_checkpoints(copied: Path) -> None:
    for name in ("step-6", "step-000006-copy", "my-step-000006", "step-a-step-000007", "step-000008\n"):
        (copied / name).mkdir()
    assert [path.name for path in checkpoint.steps(copied)] == ["step-000003", "step-000006"]


def test_before_the_first_step_there_are_no_moments(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    engine = prepare(recipe.train, load_encoder(recipe, None), InfoNCE(recipe.loss))
    folder = checkpoint.save(tmp_path, 0, engine, recipe.digest, keep=2)
    assert load_file(folder / "optimizer.safetensors") == {} and checkpoint.restore(folder, engine) == 0


def test_the_count_of_adamw_ends_where_float32_does(tmp_path: Path) -> None:
    """Torch goes on adding 1 to 2^24, which stays what it is."""
    recipe, step = tiny_recipe(tmp_path), 2**24 + 5
    engine = prepare(recipe.train, load_encoder(recipe, None), InfoNCE(recipe.loss))
    for count in (1.0, 2.0**24 - 1, 2.0**24, 2.0**24):
        engine.reduce()
        engine.step(0.0)
        for state in engine.optimizer.state.values():
            assert state["step"].dtype == torch.float32 and state["step"] == count
            state["step"].fill_(max(count, 2.0**24 - 2))
    folder = checkpoint.save(tmp_path, step, engine, recipe.digest, keep=2)
    assert checkpoint.restore(folder, engine) == step


def test_trained_names_are_stable(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    names = [list(trainable(load_encoder(recipe, None), InfoNCE(recipe.loss))) for _ in range(2)]
    assert names[0] == names[1] and names[0][-1] == "loss.log_temperature" and torch.is_grad_enabled()
