"""`vlm2vec compare`: results files in, differences and how sure they are out."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlm2vec.commands import say
from vlm2vec.errors import DataError

HELP = """Hold evaluations against the first, query by query: which differences are more than noise, and which queries flipped.

  vlm2vec compare results/one@1a2b3c4d5e6f.json results/two@0f9e8d7c6b5a.json
  vlm2vec compare A.json B.json C.json --to runs/compare --html"""


def arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    command.add_argument(
        "results", nargs="+", help="results files <model>@<digest>.json, or the folders beside them; the first is the baseline"
    )
    command.add_argument("--to", help="folder for comparison.md and comparison.json (default with --html: runs/compare)")
    command.add_argument("--html", action="store_true", help="write comparison.html too, with queries that flipped and what was retrieved")
    command.add_argument("--root", help="folder of the suite's data, for the pictures (default: what the suite names)")
    command.add_argument("--force", action="store_true", help="compare what was not measured alike, on the queries that both have")


def run(given: argparse.Namespace) -> None:
    """Compare, and write what was asked for."""
    from vlm2vec import results
    from vlm2vec.compare import compare
    from vlm2vec.report import comparison_table, write_comparison

    measured = [results.read(path) for path in given.results]
    comparison = compare(measured, force=given.force)
    say(comparison_table(comparison).rstrip("\n"))
    if given.to or given.html:
        folder = Path(given.to or "runs/compare")
        paths = write_comparison(folder, comparison, measured, given.html, _pictures(comparison.suite, given.root))
        say(f"wrote {', '.join(map(str, paths.values()))}")


def _pictures(suite: str, root: str | None) -> Path | None:
    """The folder that pictures lie in: as given, or the one the suite names; None, hence no pictures, where the suite is not found."""
    from vlm2vec.suite import load_suite

    if root:
        return Path(root)
    try:
        return load_suite(suite).root
    except DataError:
        return None
