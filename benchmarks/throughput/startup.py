"""How long a user waits before anything happens: python -m benchmarks.throughput.startup [RECIPE ...].

Each command runs in a fresh process, the interpreter's own start included; the median of the runs stands against its bar. Seconds of the
processor are given too: where they are well below the clock, the machine was busy with something else.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
BARS = {"import vlm2vec": 0.3, "--help": 0.5, "--dry-run": 5.0}  # seconds


def main() -> None:
    """Print a line for each command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=["recipes/quickstart.yaml"], help="recipes to plan (default %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="of each command (default %(default)s)")
    given = parser.parse_args()
    os.chdir(ROOT)
    print(f"{'command':<52}{'clock':>9}{'cpu':>9}{'bar':>8}   (load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores)")
    report("import vlm2vec", ["-c", "import vlm2vec"], BARS["import vlm2vec"], given.runs)
    report("vlm2vec --help", ["-m", "vlm2vec", "--help"], BARS["--help"], given.runs)
    for recipe in given.recipes:
        report(f"vlm2vec train {recipe} --dry-run", ["-m", "vlm2vec", "train", recipe, "--dry-run"], BARS["--dry-run"], given.runs)


def report(name: str, arguments: Sequence[str], bar: float, runs: int) -> None:
    """Measure one command and print its line."""
    spent(arguments)  # what is compiled or made on first use
    clock, cpu = (statistics.median(column) for column in zip(*(spent(arguments) for _ in range(runs)), strict=True))
    verdict = "held" if clock < bar else "MISSED"
    print(f"{name:<52}{clock:>7.2f} s{cpu:>7.2f} s{bar:>6.1f} s   {verdict}", flush=True)


def spent(arguments: Sequence[str]) -> tuple[float, float]:
    """Seconds on the clock and of the processor of a Python process with these arguments."""
    began = time.perf_counter()
    silent = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_WRONLY, 0) for stream in (1, 2)]
    process = os.posix_spawn(sys.executable, [sys.executable, *arguments], os.environ, file_actions=silent)
    _, status, used = os.wait4(process, 0)
    if status:
        raise SystemExit(f"python {' '.join(arguments)} failed with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - began, used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
