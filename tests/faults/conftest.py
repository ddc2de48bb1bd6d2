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

Written by `make test-faults`: {tests} tests, all passed, in {minutes:.1f} minutes on {cores} cores ({system}, Python {python}, torch {torch}).
The trials are in `tests/faults`; seeds are fixed, and a trial that fails prints the line that replays it. Where the moment of a kill is
random, the number of those that hit a save differs from run to run by a few.

| | injected | trials | came out |
|---|---|---:|---|
"""
# Tests that stand with their module and run along; a passed test is a trial.
ELSEWHERE = {
    "tests/data/test_sampler.py": ("F10", "order of the data: sizes, weights, caps, blocks, world sizes", "as drawn, nothing lost or doubled"),
    "tests/data/test_mixture.py": ("F10", "mixtures over ranks and batches", "the same global sequence"),
    "tests/test_cache.py": ("F13", "embedding cache: perturbed keys, damaged and vanished shards, four writers", "missed, named or shared"),
    "tests/test_evaluate.py": ("F13", "evaluation: kill -9, ties, NaN, shuffles, ranks, four at once", "the same bytes, or a named error"),
    "tests/test_eval_mmeb.py": ("F13", "36 sets: other batches, two processes, shuffled rows, kill -9", "the same scores"),
    "tests/data/test_fetch_failures.py": ("F14", "a server that fails: status codes, cuts, wrong bytes", "tried again or named; nothing half written"),
    "tests/io/test_lock.py": ("F15", "locks: a second process, dead and foreign holders, forks", "held, taken over or refused with the holder"),
    "tests/io/test_paths.py": ("F9", "hostile picture paths", "refused; nothing outside the root was opened"),
}
_began = time.monotonic()
_counts: Counter[tuple[str, str, str]] = Counter()
_outcomes: Counter[str] = Counter()


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Callable[[str, str, str, int], None]:
    """Put a row into the table: phase, what was injected, what came out, number of trials; equal rows add up."""
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


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Runs where the reports arrive: in the process that was started, whatever the number of workers."""
    _outcomes[report.outcome] += report.when == "call" or report.outcome != "passed"
    if report.when != "call" or report.outcome != "passed":
        return
    for name, value in report.user_properties:
        if name == "tally":
            _counts[tuple(value[:3])] += value[3]  # type: ignore[index]
    if row := ELSEWHERE.get(report.nodeid.partition("::")[0]):
        _counts[row] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = os.environ.get("VLM2VEC_RELIABILITY")
    if file and not hasattr(session.config, "workerinput") and not _outcomes["failed"] and _counts:
        Path(file).write_text(_table(), encoding="utf-8")


def _table() -> str:
    import torch

    title = TITLE.format(
        tests=_outcomes["passed"], minutes=(time.monotonic() - _began) / 60, cores=os.cpu_count(), system=platform.system(),
        python=platform.python_version(), torch=torch.__version__.partition("+")[0],
    )  # fmt: skip
    rows = sorted((int(phase.strip("F") or 99), phase, injected, outcome, count) for (phase, injected, outcome), count in _counts.items())
    lines = [f"| {phase} | {injected} | {count:,} | {outcome} |" for _, phase, injected, outcome, count in rows]
    return title + "\n".join([*lines, f"| | **all** | **{sum(_counts.values()):,}** | |"]) + "\n"
