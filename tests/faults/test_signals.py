"""SIGTERM, SIGINT and SIGUSR1 in every phase of a run: an exit code that no scheduler takes for success, and a checkpoint to go on from."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import start
from tests.faults.common import STEPS, changed, exit_code, leave_as_the_command_line, light_recipe, logged, whole_run
from vlm2vec import batch, checkpoint, pipeline, trainer
from vlm2vec.config import Recipe
from vlm2vec.data.tiny import TINY_ROOT, tiny_root
from vlm2vec.encoder import Encoder
from vlm2vec.trainer import LOG

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PHASES = ("load", "wait", "forward", "save", "evaluate before", "evaluate after")
OFTEN = ("load", "forward", "evaluate after")  # what every run of the tests tries
SLOW = 20.0  # seconds that a phase takes if nothing cuts it


def recipe_for(run_dir: Path, phase: str, **data: Any) -> Recipe:
    recipe = light_recipe(run_dir, **data)
    if not phase.startswith("evaluate"):
        return recipe
    suite = str(tiny_root([source.name for source in recipe.data.sources]).parent)
    assert recipe.data.root == TINY_ROOT
    return changed(recipe, "evaluate", suite=suite, before=phase.endswith("before"), after=phase.endswith("after"), limit=8)


def interrupt_in(phase: str, number: int) -> None:
    """Send this process a signal the third time that it is in a phase (the first time that it loads)."""
    places = {
        "load": (trainer, "load_encoder", 1),
        "wait": (batch, "load_image", 30),
        "forward": (Encoder, "embed", 10),
        "save": (Encoder, "save_pretrained", 2),
        "evaluate before": (Encoder, "stream", 1),
        "evaluate after": (Encoder, "stream", 1),
    }
    owner, name, due = places[phase]
    original, count = getattr(owner, name), 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == due:
            os.kill(os.getpid(), number)
            if phase.startswith("evaluate"):
                time.sleep(SLOW)
        return original(*arguments, **options)

    setattr(owner, name, interrupted)


def run_child(recipe: Recipe, prepare: Callable[[], object] = lambda: None) -> int:
    def child() -> None:
        prepare()
        leave_as_the_command_line(lambda: pipeline.run(recipe))

    return start(child)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return whole_run(tmp_path_factory.mktemp("whole") / "run")[LOG]


@pytest.mark.parametrize(
    ("number", "phase"),
    [
        pytest.param(number, phase, marks=[] if number == NUMBERS[0] and phase in OFTEN else pytest.mark.faults)
        for number in NUMBERS
        for phase in PHASES
    ],
)
def test_a_signal_in_any_phase(phase: str, number: signal.Signals, expected: bytes, tmp_path: Path, tally: Callable[..., None]) -> None:
    recipe = recipe_for(tmp_path / "run", phase)
    began = time.monotonic()
    assert exit_code(run_child(recipe, lambda: interrupt_in(phase, number))) == 128 + number
    assert time.monotonic() - began < SLOW
    newest = checkpoint.latest(tmp_path / "run")
    done = {"load": 0, "evaluate before": None, "evaluate after": STEPS}.get(phase, logged(tmp_path / "run"))
    assert (int(newest.name[5:]) if newest else None) == done, "the checkpoint is not of the last step"
    assert exit_code(run_child(recipe)) == 0
    assert (tmp_path / "run" / LOG).read_bytes() == expected
    tally(
        "F6",
        f"SIGTERM, SIGINT or SIGUSR1 in phase {phase}",
        "exit code 143, 130 or 138; checkpoint of the last step; resumed to the same log",
        1,
    )


@pytest.mark.parametrize("number", [NUMBERS[0], *(pytest.param(number, marks=pytest.mark.faults) for number in NUMBERS[1:])])
def test_a_signal_to_the_whole_group_with_workers(
    number: signal.Signals, expected: bytes, tmp_path: Path, tally: Callable[..., None]
) -> None:
    """As a terminal or a scheduler sends it: the loader workers get it too."""
    recipe = recipe_for(tmp_path / "run", "wait", workers=2)
    child = run_child(recipe, lambda: os.setpgid(0, 0))
    while logged(tmp_path / "run") < 3:
        time.sleep(0.01)
    os.killpg(child, number)
    assert exit_code(child) == 128 + number
    newest = checkpoint.latest(tmp_path / "run")
    assert newest is not None and int(newest.name[5:]) == logged(tmp_path / "run")
    assert exit_code(run_child(recipe)) == 0
    assert (tmp_path / "run" / LOG).read_bytes() == expected
    tally("F6", "a signal to the whole process group, with loader workers", "the same; workers let the first one pass", 1)


def test_the_second_signal_ends_at_once(tmp_path: Path, tally: Callable[..., None]) -> None:
    def twice() -> None:
        original = Encoder.embed

        def stuck(self: Encoder, inputs: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(SLOW)
            return original(self, inputs)

        Encoder.embed = stuck  # type: ignore[method-assign]

    began = time.monotonic()
    assert exit_code(run_child(recipe_for(tmp_path / "run", "forward"), twice)) == 128 + signal.SIGTERM
    assert time.monotonic() - began < SLOW
    tally("F6", "a second signal", "the process ends at once", 1)
