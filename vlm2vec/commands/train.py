"""`vlm2vec train`: a recipe in, a model and a report out."""

from __future__ import annotations

import argparse

from vlm2vec.commands import say

HELP = """Train a recipe from its newest checkpoint, or from the start; evaluate and report if the recipe says so.

  vlm2vec train recipes/quickstart.yaml                        the embedded demo
  vlm2vec train recipes/quickstart.yaml --dry-run              what it would do: data mix, batch, parameters, memory
  vlm2vec train recipes/quickstart.yaml --tiny                 every code path in seconds on a CPU
  vlm2vec train recipes/quickstart.yaml train.lr=1e-4 run.dir=runs/lr1e-4
  accelerate launch train.py recipes/quickstart.yaml           the same on several processes"""


def arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    command.add_argument("recipe", help="a YAML file, see recipes/")
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys of the recipe to change, e.g. train.lr=1e-4 (all keys: vlm2vec keys)"
    )
    command.add_argument("--tiny", action="store_true", help="shrink every size: seconds on a CPU, the same code paths")
    command.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    command.add_argument("--fresh", action="store_true", help="forget an earlier run in the same folder")


def run(given: argparse.Namespace) -> None:
    """Run the recipe, or say what it would do."""
    from vlm2vec.config import load_recipe

    recipe = load_recipe(given.recipe, given.overrides, tiny=given.tiny)
    if given.dry_run:
        from vlm2vec.plan import dry_run

        say(dry_run(recipe))
        return
    from vlm2vec import dist, pipeline

    done = pipeline.run(recipe, fresh=given.fresh)
    if dist.is_main():
        say(done.summary())
