"""Trials that can be replayed one by one, and the table of what was injected and what came out: docs/reliability.md.

`make test-faults` sets VLM2VEC_RELIABILITY to the file that the table goes to; nothing is written unless every test passed.
"""

from __future__ import annotations

import os
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TITLE = """# What was injected, and what came out

Written by `make test-faults`: {tests} tests passed and none failed{owed}, in {minutes:.1f} minutes on
{cores} cores ({system}, Python {python}, torch {torch}). The trials are in `tests/faults`; their seeds are fixed, and one that fails prints
the line that replays it. Where the moment of a kill is random, how many fall into a save differs a little from run to run.

| | injected | trials | came out |
|---|---|---:|---|
"""
PHASES = {"S17": "inputs"}  # those without a number of their own
# Tests that stand with their module and run along; a passed test is a trial.
ELSEWHERE = {
    "tests/io/test_paths.py": ("F9", "hostile picture paths", "refused; nothing outside the root was opened"),
    "tests/data/test_images.py": (
        "F9",
        "modes, orientations, bombs, other formats, 1,000 more mutations",
        "the pixels of the table, or named",
    ),
    "tests/data/test_sampler.py": ("F10", "orders: sizes, weights, caps, blocks, world sizes", "as planned, nothing lost or doubled"),
    "tests/data/test_mixture.py": ("F10", "mixtures over ranks and batches", "the same global sequence"),
    "tests/test_feed.py": ("F12", "loader workers and ranks, dead workers", "the same batches; the death names its sample"),
    "tests/test_cache.py": ("F13", "embedding cache: perturbed keys, damaged shards, four writers", "missed, named or shared"),
    "tests/test_evaluate.py": ("F13", "evaluation: kill -9, ties, NaN, shuffles, ranks, four at once", "the same bytes, or named"),
    "tests/test_eval_mmeb.py": ("F13", "36 sets: other batches, two processes, shuffled rows, kill -9", "the same scores"),
    "tests/data/test_fetch_failures.py": (
        "F14",
        "a server that fails: status codes, cuts, wrong bytes",
        "tried again or named, never half written",
    ),
    "tests/io/test_lock.py": ("F15", "locks: a second process, dead and foreign holders, forks", "held, taken over or refused"),
}
_began = time.monotonic()


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Callable[[str, str, str, int], None]:
    """Put a row into the table: phase, what was injected, what came out, number of trials; equal rows add up.

    A small part of trials that all run elsewhere counts as none.
    """
    return lambda phase, injected, outcome, trials: record_property("tally", [phase, injected, outcome, trials])


@pytest.fixture
def trials(request: pytest.FixtureRequest) -> Callable[[int, Callable[[random.Random], Any]], list[Any]]:
    """Call a trial with the random numbers of seed 0, 1, ...; VLM2VEC_TRIAL=n runs only that one."""

    def run(count: int, trial: Callable[[random.Random], Any]) -> list[Any]:
        only = os.environ.get("VLM2VEC_TRIAL")
        results = []
        for seed in [int(only)] if only else range(count):
            try:
                results.append(trial(random.Random(seed)))
            except BaseException:
                sys.stderr.write(f"\nreplay: VLM2VEC_TRIAL={seed} python -m pytest '{request.node.nodeid}'\n")
                raise
        return results

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Runs in the process that was started, whatever the number of workers."""
    file, found = os.environ.get("VLM2VEC_RELIABILITY"), terminalreporter.stats
    if file and found.get("passed") and not found.get("failed") and not found.get("error"):
        Path(file).write_text(_table(found["passed"], found.get("xfailed", [])), encoding="utf-8")


def _table(passed: list[pytest.TestReport], owed: list[pytest.TestReport]) -> str:
    import torch

    counts: Counter[tuple[str, str, str]] = Counter()
    for report in passed:
        for row in (value for name, value in report.user_properties if name == "tally"):
            counts[tuple(row[:3])] += row[3]  # type: ignore[index]
        if row := ELSEWHERE.get(report.nodeid.partition("::")[0]):
            counts[row] += 1
    title = TITLE.format(
        tests=len(passed), owed=f" but {len(owed)} listed below" * bool(owed), minutes=(time.monotonic() - _began) / 60,
        cores=os.cpu_count(), system=platform.system(), python=platform.python_version(), torch=torch.__version__.partition("+")[0],
    )  # fmt: skip
    rows = sorted((phase[0], int(phase[1:]), injected, outcome, count) for (phase, injected, outcome), count in counts.items())
    lines = [
        f"| {PHASES.get(f'{kind}{number}', f'{kind}{number}')} | {injected} | {count:,} | {outcome} |"
        for kind, number, injected, outcome, count in rows
        if count
    ]
    lines.append(f"| | **all** | **{sum(counts.values()):,}** | |")
    gaps = [f"- {report.nodeid.rpartition('::')[2]}: {report.wasxfail}" for report in owed]  # type: ignore[attr-defined]
    return title + "\n".join(lines + (["", "Not as it should be yet:", "", *sorted(gaps)] if gaps else [])) + "\n"
