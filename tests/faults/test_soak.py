"""Five hundred steps: memory grows by less than 20 MB and no file stays open."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.common import changed, exit_code, forked_run, light_recipe, logged

WARM = 100  # steps after which allocators have seen every shape


def resident(process: int) -> int:
    """Bytes of memory in use by a process."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


@pytest.mark.faults
@pytest.mark.parametrize("workers", [0, 2])
def test_five_hundred_steps(workers: int, tmp_path: Path, tally: Callable[..., None]) -> None:
    recipe = changed(light_recipe(tmp_path / "run", steps=500, every=50, workers=workers), "train", global_batch=4, chunk_tokens=160)
    child = forked_run(recipe)
    seen: dict[int, tuple[int, int]] = {}
    while (done := logged(tmp_path / "run")) < 490:
        seen.setdefault(done, (resident(child), open_files(child)))
        time.sleep(0.02)
    last = (resident(child), open_files(child))
    warm = min(step for step in seen if step >= WARM)
    assert exit_code(child) == 0
    # A save opens files for a moment, and loader workers send their batches as files: the fewest of the last tenth count.
    files = [min(count for step, (_, count) in seen.items() if first <= step < first + 50) for first in (WARM, 440)]
    assert files[0] == files[1]
    assert last[0] - seen[warm][0] < 20e6, f"{(last[0] - seen[warm][0]) / 1e6:.1f} MB between steps {warm} and 490"
    tally("F15", "500 steps with a save every 50, with and without workers", "memory grew by less than 20 MB; open files constant", 1)
