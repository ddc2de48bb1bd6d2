"""`vlm2vec keys`: the reference of recipes."""

from __future__ import annotations

import argparse

from vlm2vec.commands import say

HELP = "Every key of a recipe with its type, default and meaning."


def arguments(command: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(given: argparse.Namespace) -> None:
    """List the keys."""
    from vlm2vec.config import reference

    for key, kind, default, meaning in reference():
        say(f"{key:<32} {kind:<28} {default!s:<12} {meaning}")
