"""What `make demo` promises, on the real benchmark and the real recipe: minutes a trial, so `make test-slow` runs it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.runs import final_bytes, fork_run
from vlm2vec.cli import main
from vlm2vec.config import Recipe, load_recipe
from vlm2vec.io import read_json
from vlm2vec.trainer import LOG

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "quickstart.yaml"
META_TASKS = ("classification", "vqa", "retrieval", "grounding")
pytestmark = pytest.mark.slow


def kill_after(child: int, log: Path, rows: int, delay: float) -> bool:
    """SIGKILL `child` some time after it logged `rows` steps; whether it was still running then."""
    while (log.read_bytes().count(b"\n") if log.exists() else 0) < rows:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.005)
    time.sleep(delay)
    if os.waitpid(child, os.WNOHANG)[0]:
        return False
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded benchmark, built once."""
    folder = tmp_path_factory.mktemp("data") / "mini"
    assert main(["data", "get", "mini", "--to", str(folder)]) == 0
    return folder


def demo(mini: Path, run_dir: Path, *overrides: str) -> list[str]:
    """Overrides that put the run into `run_dir`."""
    return [f"run.dir={run_dir}", f"data.root={mini}/train", f"evaluate.root={mini}", *overrides]


def chance(results: dict, meta_task: str) -> float:
    members = [entry["chance"] for entry in results["sets"].values() if entry["meta_task"] == meta_task]
    return sum(members) / len(members)


@pytest.mark.parametrize("seed", [17, 18, 19])
def test_the_demo_learns_every_meta_task(seed: int, mini: Path, tmp_path: Path) -> None:
    assert main(["train", str(RECIPE), *demo(mini, tmp_path / "run", f"run.seed={seed}")]) == 0
    before, after = (read_json(tmp_path / "run" / name) for name in ("results-before.json", "results.json"))
    assert after["means"]["macro"]["score"] >= before["means"]["macro"]["score"] + 0.25
    assert after["means"]["macro"]["interval"][0] > before["means"]["macro"]["interval"][1]
    for meta_task in META_TASKS:
        assert after["means"][meta_task]["interval"][0] > chance(after, meta_task), meta_task


def test_twenty_kills_of_the_demo_leave_no_trace(mini: Path, tmp_path: Path) -> None:
    """Killed at 20 moments spread over 50 steps of the real model on the real data: loading, steps and saving are all hit."""

    def recipe(name: str) -> Recipe:
        short = ["train.steps=50", "train.warmup=5", "checkpoint.every=2", "evaluate.before=false", "evaluate.suite=null"]
        return load_recipe(RECIPE, demo(mini, tmp_path / name, *short))

    def finish(name: str) -> dict[str, bytes]:
        assert os.waitstatus_to_exitcode(os.waitpid(fork_run(recipe(name)), 0)[1]) == 0
        return final_bytes(tmp_path / name)

    expected = finish("whole")
    for kill in range(20):
        assert kill_after(fork_run(recipe("killed")), tmp_path / "killed" / LOG, rows=2 * kill + 1, delay=0.13 * kill), f"kill {kill}"
    assert finish("killed") == expected
