"""A save that is killed or refused at any point: the newest whole checkpoint is found, always, and the next save succeeds."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.common import Saver, at_save, points
from vlm2vec import checkpoint

SAVES = {"first": 1, "later": 3}
KINDS = ("eio", "enospc", "eacces", "efbig")


def check_after(saver: Saver, run_dir: Path, count: int) -> None:
    """Either the new checkpoint or the one before is found; the next save succeeds and clears away what the cut one left."""
    target = f"step-{2 * count:06d}"
    found = checkpoint.latest(run_dir)
    before = saver.before.name if saver.before else None
    assert (found.name if found else None) in (before, target)
    assert saver.attempt(run_dir) == 0, saver.said(run_dir)
    again = checkpoint.latest(run_dir)
    assert again is not None and again.name == target
    assert not [path.name for path in run_dir.iterdir() if path.name.startswith(".step")]


def some(numbers: range, few: bool) -> list[int]:
    return list(numbers)[:: 6 if few else 1]


def both_sizes(*values: object) -> list[object]:
    """Every third value as a small part of the trials that always runs, and each as all of them."""
    return [pytest.param(value, True, id=f"{value}-few") for value in values[::3]] + [
        pytest.param(value, False, id=f"{value}-all", marks=pytest.mark.faults) for value in values
    ]


@pytest.mark.parametrize(("save", "few"), both_sizes(*SAVES))
def test_killed_at_every_point_of_a_save(save: str, few: bool, tmp_path: Path, tally: Callable[..., None]) -> None:
    def kill_all(saver: Saver) -> None:
        passed = points(saver)
        assert len(passed) >= 25 and len({point.split()[0] for point in passed}) >= 6
        numbers = some(range(1, len(passed) + 1), few)
        for number in numbers:
            run_dir = saver.copy()
            assert saver.attempt(run_dir, f"*:{number}:kill") == -signal.SIGKILL, f"at {passed[number - 1]}: {saver.said(run_dir)}"
            check_after(saver, run_dir, SAVES[save])
        tally(
            "F2",
            f"kill -9 at every named point of a {save} save",
            "the newest whole checkpoint found; the next save succeeds",
            0 if few else len(numbers),
        )

    at_save(tmp_path / "run", SAVES[save], kill_all)


@pytest.mark.parametrize(("kind", "few"), both_sizes(*KINDS))
def test_refused_at_every_point_of_a_save(kind: str, few: bool, tmp_path: Path, tally: Callable[..., None]) -> None:
    def refuse_all(saver: Saver) -> None:
        numbers = some(range(1, len(points(saver)) + 1), few)
        for number in numbers:
            run_dir = saver.copy()
            code = saver.attempt(run_dir, f"*:{number}:{kind}")
            if code == 0:  # the new checkpoint is there, an old one could not be removed
                assert checkpoint.steps(run_dir)[-1].name == "step-000006"
            else:
                assert code == 4 and "EnvError: cannot write" in saver.said(run_dir), (number, code, saver.said(run_dir))
            assert not list(run_dir.glob(".step-*")), "a save that could clean up did not"
            check_after(saver, run_dir, 3)
        tally(
            "F3",
            f"{kind.upper()} at every named point of a save",
            "exit code 4 naming file and space, or a warning while pruning; the run goes on from it",
            0 if few else len(numbers),
        )

    at_save(tmp_path / "run", 3, refuse_all)


@pytest.mark.parametrize("parts", [4, pytest.param(32, marks=pytest.mark.faults)])
def test_a_file_that_cannot_grow_beyond_any_size(parts: int, tmp_path: Path, tally: Callable[..., None]) -> None:
    """The kernel refuses the write itself, also those of safetensors and tokenizers."""

    def sweep(saver: Saver) -> None:
        sizes = [path.stat().st_size for path in saver.before.rglob("*")]  # type: ignore[union-attr]
        for part in range(parts):
            limit = max(sizes) * part // parts
            run_dir = saver.copy()

            def refuse(limit: int = limit) -> None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - a file of messages would meet the limit first
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

            assert saver.attempt(run_dir, prepare=refuse) == 4, f"limit {limit}"
            check_after(saver, run_dir, 3)
        tally(
            "F3",
            "no file may grow beyond a size (32 sizes up to the largest)",
            "exit code 4; the newest whole checkpoint found",
            parts if parts == 32 else 0,
        )

    at_save(tmp_path / "run", 3, sweep)
