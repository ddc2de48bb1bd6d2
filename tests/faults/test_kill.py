"""kill -9 at random moments, run the same command again until it ends: the weights and the log must be those of an undisturbed run, bit for
bit.

Children are forked from this process after the imports, so that a trial costs a second. Replay one trial with `--kill-seed N`.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.runs import final_bytes, fork_run, tiny_recipe

MAX_KILLS = 5


def train_with_kills(run_dir: Path, seed: int, seconds: float) -> int:
    """Start the run up to MAX_KILLS times with a kill at a random moment of an undisturbed run's `seconds`, then let it finish; the number
    of kills that hit.
    """
    moments = random.Random(seed)
    hits = 0
    for _ in range(MAX_KILLS):
        child = fork_run(tiny_recipe(run_dir))
        time.sleep(moments.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            return hits
        hits += 1
    child = fork_run(tiny_recipe(run_dir))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return hits


def undisturbed(run_dir: Path) -> float:
    started = time.perf_counter()
    _, status = os.waitpid(fork_run(tiny_recipe(run_dir)), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return time.perf_counter() - started


def check_kills(tmp_path: Path, trials: int) -> None:
    seconds = undisturbed(tmp_path / "whole")
    expected = final_bytes(tmp_path / "whole")
    hits = 0
    for seed in range(trials):
        hits += train_with_kills(tmp_path / f"killed-{seed}", seed, seconds)
        assert final_bytes(tmp_path / f"killed-{seed}") == expected, f"seed {seed} ended with other bytes"
    assert hits >= trials, "the kills came too late to test anything"


def test_three_killed_runs_end_bitwise_equal(tmp_path: Path) -> None:
    check_kills(tmp_path, trials=3)


@pytest.mark.faults
def test_twenty_killed_runs_end_bitwise_equal(tmp_path: Path) -> None:
    check_kills(tmp_path, trials=20)
