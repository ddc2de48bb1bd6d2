"""The embedded benchmark: MMEB's protocol and layout on openly licensed pictures, made on this machine from installed packages.

`build` is all there is to call. `table` says what the sets are, `packages` where the data come from; `sources` and `world` read and divide
them, `tasks` makes rows, `draw` pictures and `write` files; `checks` compares what came out with `benchmarks/mini/checksums.json`.
"""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Any

from vlm2vec import io
from vlm2vec.errors import DataError, EnvError, InputError
from vlm2vec.log import get_logger

SUITE = "mini"
RECORD = "built.json"
FOLDER = Path(__file__).resolve().parents[3] / "benchmarks" / SUITE
CHECKSUMS = FOLDER / "checksums.json"

_logger = get_logger(__name__)


def build(to: Path | str, workers: int | None = None) -> Path:
    """Make the benchmark in the folder `to` and return it; a folder that already holds it is checked and left alone.

    The same packages give the same rows and pixels on any machine, with any number of `workers` (None: two). Raises DataError when a
    package is missing, when what came out differs from the recorded checksums, and when `to` holds something else; EnvError when it cannot
    be written.
    """
    to = Path(to)
    expected = io.read_json(CHECKSUMS)["sets"]
    if _is_built(to, expected, workers):
        _logger.info("%s holds the benchmark already; checked", to)
        return to
    make(to, expected, workers)
    return to


def make(to: Path, expected: dict[str, str] | None, workers: int | None = None) -> dict[str, Any]:
    """Make the benchmark in `to`, whatever is there, and return its record. With None for `expected` it is compared with nothing."""
    to = to.resolve()  # what a link points to is replaced, not the link
    staging = to.with_name(f".{to.name}.{os.getpid()}")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        record = _fill(staging, expected, workers)
        io.write_json(staging / RECORD, record)
        _put_in_place(staging, to)
    except OSError as error:
        raise EnvError(f"could not write the benchmark to {to}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return record


def _is_built(to: Path, expected: dict[str, str], workers: int | None) -> bool:
    """Whether the folder holds what it should. Raises DataError when it holds something that this module did not put there."""
    from vlm2vec.data.mini import checks, pool, table

    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return False
    if not (to / RECORD).is_file():
        raise DataError(f"{to} is not empty and holds no {RECORD}: choose another folder, or remove it")
    try:
        with pool.mapper(workers) as mapped:
            checks.compare(checks.contents(to, table.SETS, mapped), expected)
    except InputError as error:
        _logger.warning("%s is built again: %s", to, error)
        return False
    return True


def _fill(root: Path, expected: dict[str, str] | None, workers: int | None) -> dict[str, Any]:
    """Write everything but the record into an empty folder, and return the record."""
    from vlm2vec.data.mini import checks, packages, pool, table, world, write

    packages.check_installed()
    with pool.mapper(workers) as mapped:
        _logger.info("reading the packages")
        sources = world.survey(mapped)
        made = [(spec, spec.make(sources, spec)) for spec in table.SETS]
        counts = {spec.name: {"train": len(rows.train), "queries": len(rows.questions)} for spec, rows in made}
        totals = [sum(count[part] for count in counts.values()) for part in ("train", "queries")]
        _logger.info("writing %d training rows and %d queries", *totals)
        write.write(root, made, mapped)
        found = checks.contents(root, table.SETS, mapped)
    if expected is not None:
        checks.compare(found, expected)
    (root / "ATTRIBUTION.md").write_text(packages.attribution(), encoding="utf-8")
    versions = packages.versions() | {"python": platform.python_version()}
    return {"format": 1, "suite": SUITE, "versions": versions, "counts": counts, "sets": found, "total": io.digest(found)}


def _put_in_place(staging: Path, to: Path) -> None:
    """Rename, so that the folder is either complete or as it was."""
    if not to.exists():
        staging.rename(to)
        return
    previous = to.with_name(f".{to.name}.{os.getpid()}.previous")
    to.rename(previous)
    staging.rename(to)
    shutil.rmtree(previous)
