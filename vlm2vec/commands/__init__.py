"""The commands of `vlm2vec`, a module each: HELP, `arguments(command)` that declares them, `run(given)` that does the work and says what
came of it. The modules are imported for `--help` already, so whatever is slow to import is imported where it is used.
"""

from __future__ import annotations

import argparse
import os
import sys


def say(text: str) -> None:
    """A line for the person at the terminal."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # who read it, such as `head`, has seen enough: the work goes on without
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def positive(text: str) -> int:
    """An argument that must be a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def column(text: str) -> tuple[str, str]:
    """An argument KEY=NAME: what a column of the input is called there."""
    key, equals, name = text.partition("=")
    if key not in ("id", "text", "image", "instruction") or not equals or not name:
        raise argparse.ArgumentTypeError(f"must look like KEY=NAME with a KEY of id, text, image, instruction; got {text!r}")
    return key, name


def corpus_arguments(command: argparse.ArgumentParser) -> None:
    """Which items, and how they are read and kept: shared by the commands that embed a corpus."""
    command.add_argument("items", help="a folder of pictures, a .jsonl or .parquet file, or a folder of such files")
    command.add_argument("--columns", nargs="+", type=column, default=[], metavar="KEY=NAME", help="names in the files, as text=caption")
    command.add_argument("--images", help="folder below which the paths of pictures lie (default: the folder of the file)")
    command.add_argument("--dims", type=positive, help="keep the first numbers only, at unit length (Matryoshka)")
    command.add_argument("--skip-bad", action="store_true", help="leave out items that cannot be read and list them in skipped.jsonl")
