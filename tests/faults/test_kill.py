"""kill -9 at random moments, run the same command again until it ends: weights and log must be those of an undisturbed run, bit for bit.

Children are forked from this process after the imports, so that a start costs half a second. A kill waits for a random number of logged
steps and then for a random part of a second, so that it hits loading, steps and saving whatever the speed of the machine.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.common import STEPS, exit_code, forked_run, light_recipe, logged, saving, whole_run
from tests.runs import final_bytes

KILLS = 4  # of one run


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return whole_run(tmp_path_factory.mktemp("whole") / "run")


def killed(run_dir: Path, rows: int, delay: float) -> bool:
    """Start the run and kill it some time after it logged `rows` steps; False if it ended before."""
    child = forked_run(light_recipe(run_dir))
    while logged(run_dir) < rows:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return exit_code(child) == -signal.SIGKILL


def train_with_kills(run_dir: Path, chance: random.Random) -> list[bool]:
    """Kill the run KILLS times, then let it finish; for each kill that hit, whether it cut a save."""
    cut = []
    for _ in range(KILLS):
        if not killed(run_dir, chance.randrange(STEPS - 1), chance.uniform(0, 0.25)):
            break
        cut.append(saving(run_dir))
    assert exit_code(forked_run(light_recipe(run_dir))) == 0
    return cut


@pytest.mark.parametrize("group", [0, *(pytest.param(group, marks=pytest.mark.faults) for group in range(1, 9))])
def test_killed_runs_end_bitwise_equal(
    group: int, expected: dict[str, bytes], tmp_path: Path, trials: Callable, tally: Callable[..., None]
) -> None:
    def trial(chance: random.Random) -> list[bool]:
        run_dir = tmp_path / f"run-{chance.random()}"
        hits = train_with_kills(run_dir, random.Random(f"{group} {chance.random()}"))
        assert final_bytes(run_dir) == expected
        return hits

    hits = [hit for run in trials(1 if group == 0 else 3, trial) for hit in run]
    assert hits, "no kill hit anything"
    same = "resumed; weights, optimizer and log the same bit for bit"
    tally("F1", "kill -9 at a random moment", same, hits.count(False))
    tally("F1", "kill -9 at a random moment that fell into a save", same, hits.count(True))
