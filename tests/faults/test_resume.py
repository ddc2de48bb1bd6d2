"""Determinism and resuming: from every step the same bits, and from step 1,000,000 as fast as from step 1."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.faults.common import exit_code, forked_run, light_recipe, reseal, whole_run
from tests.runs import final_bytes, start_run
from vlm2vec import batch, checkpoint
from vlm2vec.data.mmeb import TrainRows
from vlm2vec.io import read_jsonl
from vlm2vec.trainer import LOG

STEPS = 24
FAR = 1_000_000
EVERY_STEP = {"steps": STEPS, "every": 1, "keep": 99}


@pytest.mark.slow
def test_the_same_recipe_gives_the_same_bits(tmp_path: Path, tally: Callable[..., None]) -> None:
    expected = whole_run(tmp_path / "a")
    assert whole_run(tmp_path / "b") == expected
    assert whole_run(tmp_path / "c", workers=2)[LOG] == expected[LOG]  # the recipe's digest differs, and with it other files
    tally("F0", "the same run again, and with two workers", "the same bits", 2)


@pytest.mark.faults
def test_another_number_of_threads_changes_last_digits_only(tmp_path: Path, tally: Callable[..., None]) -> None:
    """Torch adds in another order then."""
    whole_run(tmp_path / "one")
    assert exit_code(forked_run(light_recipe(tmp_path / "two"), lambda: torch.set_num_threads(2))) == 0
    one, two = (read_jsonl(tmp_path / name / LOG) for name in ("one", "two"))
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-4)
    tally("F0", "the same run with two threads instead of one", "losses equal to 1e-4; not bit for bit", 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint after every step."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    whole_run(run_dir, **EVERY_STEP)
    return run_dir


@pytest.mark.faults
@pytest.mark.parametrize("cut", range(STEPS))
def test_resumed_at_every_step(cut: int, whole: Path, tmp_path: Path, tally: Callable[..., None]) -> None:
    later = (f"step-{step:06d}" for step in range(cut + 1, STEPS + 1))
    shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns(*later))
    assert len(checkpoint.steps(tmp_path / "run")) == cut
    assert exit_code(forked_run(light_recipe(tmp_path / "run", **EVERY_STEP))) == 0
    assert final_bytes(tmp_path / "run") == final_bytes(whole)
    tally("F5", f"resumed after each of {STEPS} steps", "the same bits, no step of the log lost or doubled", 1)


def test_a_million_steps_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Callable[..., None]) -> None:
    recipe = light_recipe(tmp_path, steps=FAR + 2)
    pretend_to_be_far(tmp_path)
    rows, pictures = [], []
    row, load = TrainRows.__getitem__, batch.load_image
    monkeypatch.setattr(TrainRows, "__getitem__", lambda self, index: rows.append(index) or row(self, index))
    monkeypatch.setattr(batch, "load_image", lambda image, **options: pictures.append(image) or load(image, **options))
    began = time.process_time()
    start_run(recipe)
    seconds = time.process_time() - began
    assert [entry["step"] for entry in read_jsonl(tmp_path / LOG)] == [FAR + 1, FAR + 2]
    assert len(rows) == 2 * recipe.train.global_batch and len(pictures) <= 4 * len(rows)
    assert seconds < 10
    tally("F5", "resumed at step 1,000,000", "the pairs of the next step read, none before", 1)


def pretend_to_be_far(run_dir: Path) -> None:
    """A checkpoint of two steps that says it is of a million."""
    made = run_dir.with_name(f"{run_dir.name}-made")
    recipe = light_recipe(made, steps=FAR + 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlm2vec.trainer.total_steps", lambda recipe, mixture: 2)
        start_run(recipe)
    folder = run_dir / f"step-{FAR:06d}"
    shutil.copytree(checkpoint.latest(made), folder)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"step": FAR}))
    moments = load_file(folder / "optimizer.safetensors")
    counts = {name: torch.tensor(float(FAR)) for name in moments if name.endswith("/step")}
    save_file(moments | counts, folder / "optimizer.safetensors")
    reseal(folder)
    (run_dir / LOG).write_text("")
