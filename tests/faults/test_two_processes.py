"""Two processes: killed at random moments they resume to the same bits; a death of one ends the other."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.conftest import start
from tests.faults.common import STEPS, exit_code, leave_as_the_command_line, light_recipe, logged
from tests.runs import final_bytes
from vlm2vec import pipeline

RANKS = 2


def launch(run_dir: Path) -> list[int]:
    """The processes of one run, as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def member(rank: int) -> None:
        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)  # a run in the process that forked this one had no ranks
        group = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": RANKS,
            "LOCAL_WORLD_SIZE": RANKS,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(value) for name, value in group.items()}, GLOO_SOCKET_IFNAME="lo", ACCELERATE_USE_CPU="true")
        leave_as_the_command_line(lambda: pipeline.run(light_recipe(run_dir)))

    return [start(member, rank) for rank in range(RANKS)]


def finish(run_dir: Path) -> dict[str, bytes]:
    assert [exit_code(child) for child in launch(run_dir)] == [0] * RANKS
    return final_bytes(run_dir)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return finish(tmp_path_factory.mktemp("ranks") / "run")


@pytest.mark.parametrize("group", [0, *(pytest.param(group, marks=pytest.mark.faults) for group in range(1, 5))])
def test_killed_pairs_end_bitwise_equal(
    group: int, expected: dict[str, bytes], tmp_path: Path, trials: Callable, tally: Callable[..., None]
) -> None:
    """All processes are killed at once, as when a machine goes down."""

    def trial(chance: random.Random) -> None:
        run_dir = tmp_path / f"run-{chance.random()}"
        chance.seed(f"{group} {chance.random()}")
        children = launch(run_dir)
        rows = chance.randrange(STEPS - 1)
        while logged(run_dir) < rows:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.3))
        for child in children:
            os.kill(child, signal.SIGKILL)
        assert [exit_code(child) for child in children] == [-signal.SIGKILL] * RANKS
        assert finish(run_dir) == expected

    count = 1 if group == 0 else 5
    trials(count, trial)
    tally("F7", "kill -9 of both of two processes at a random moment", "resumed; weights, optimizer and log the same bit for bit", count)


@pytest.mark.parametrize("victim", range(RANKS))
def test_the_death_of_one_ends_the_other(victim: int, expected: dict[str, bytes], tmp_path: Path, tally: Callable[..., None]) -> None:
    children = launch(tmp_path / "run")
    while logged(tmp_path / "run") < 3:
        time.sleep(0.002)
    os.kill(children[victim], signal.SIGKILL)
    began = time.monotonic()
    assert exit_code(children[1 - victim], within=30) not in (0, None)
    assert time.monotonic() - began < 10
    exit_code(children[victim])
    assert finish(tmp_path / "run") == expected
    tally("F7", "kill -9 of one of two processes", "the other ends within 10 seconds; resumed to the same bits", 1)
