"""kill -9 at random moments, run the same command again until it ends: weights and log must be those of an undisturbed run.

Bit for bit. Children are forked from this process after the imports, so that a trial costs a second. A kill waits for a random number of
logged steps and then for a random part of a second, so that it hits loading, steps and saving whatever the speed of the machine.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.runs import final_bytes, fork_run, tiny_recipe
from vlm2vec.trainer import LOG

MAX_KILLS, STEPS = 5, 12


def ended(child: int) -> int | None:
    """The exit code of a child that is over, None while it runs."""
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def kill_after(child: int, log: Path, rows: int, delay: float) -> bool:
    """SIGKILL `child` some time after it logged `rows` steps; whether it was still running then."""
    while (log.read_bytes().count(b"\n") if log.exists() else 0) < rows:
        if ended(child) is not None:
            return False
        time.sleep(0.005)
    time.sleep(delay)
    if ended(child) is not None:
        return False
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def train_with_kills(run_dir: Path, seed: int) -> int:
    """Start the run and kill it up to MAX_KILLS times, then let it finish; returns how many kills hit."""
    chance = random.Random(seed)
    hits = 0
    for _ in range(MAX_KILLS):
        child = fork_run(tiny_recipe(run_dir, steps=STEPS))
        if not kill_after(child, run_dir / LOG, chance.randrange(STEPS - 1), chance.uniform(0, 0.3)):
            break
        hits += 1
    assert os.waitstatus_to_exitcode(os.waitpid(fork_run(tiny_recipe(run_dir, steps=STEPS)), 0)[1]) == 0
    return hits


def check_kills(tmp_path: Path, trials: int) -> None:
    assert os.waitstatus_to_exitcode(os.waitpid(fork_run(tiny_recipe(tmp_path / "whole", steps=STEPS)), 0)[1]) == 0
    expected = final_bytes(tmp_path / "whole")
    hits = 0
    for seed in range(trials):
        hits += train_with_kills(tmp_path / f"killed-{seed}", seed)
        assert final_bytes(tmp_path / f"killed-{seed}") == expected, f"seed {seed} ended with other bytes"
    assert hits >= trials, "too few kills hit to test anything"


def test_three_killed_runs_end_bitwise_equal(tmp_path: Path) -> None:
    check_kills(tmp_path, trials=3)


@pytest.mark.faults
def test_twenty_killed_runs_end_bitwise_equal(tmp_path: Path) -> None:
    check_kills(tmp_path, trials=20)
