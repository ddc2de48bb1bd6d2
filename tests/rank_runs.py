"""`vlm2vec train` as several forked ranks, and how to disturb one of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.ranks import fork_ranks
from tests.runs import tiny_recipe
from vlm2vec import dist
from vlm2vec.config import Recipe
from vlm2vec.engines import launch
from vlm2vec.engines.together import ending_together
from vlm2vec.errors import Vlm2VecError
from vlm2vec.signals import StopSignal
from vlm2vec.step import Step
from vlm2vec.trainer import prepare_run_dir, train

LORA = "{rank: 4, dropout: 0.1}"
FULL = {"lora": "null", "parts": "[language, projector, vision]"}


def recipe_of(run_dir: Path, engine: str | None = None, steps: int = 5, lora: str = LORA, **keys: Any) -> Recipe:
    recipe = tiny_recipe(run_dir, lora=lora, steps=steps, **keys)
    return replace(
        recipe, train=replace(recipe.train, engine=engine, warmup=0, weight_decay=0.1), checkpoint=replace(recipe.checkpoint, every=2)
    )


def run(recipe: Recipe, prepare: Callable[[], None] = lambda: None, rank: int = 0) -> None:
    """One rank of `vlm2vec train`, less evaluation: ends with the exit code of the command line."""
    try:
        recipe = launch.start(recipe)
        with ending_together(), StopSignal() as stop:
            if dist.is_main():
                prepare_run_dir(recipe)
            dist.barrier()
            prepare()
            train(recipe, stop)
    except Vlm2VecError as error:
        os.write(2, f"error: {error}\n".encode())
        os._exit(error.exit_code)


def run_on_ranks(recipe: Recipe, prepare: Callable[[], None] = lambda: None, world: int = 2) -> list[int]:
    return fork_ranks(partial(run, recipe, prepare), world)


def stop_at(step: int, on_rank: int = 1, number: int = signal.SIGTERM) -> Callable[[], None]:
    """A signal to one rank while it takes `step` (counted from 0)."""

    def prepare() -> None:
        real = Step.__call__

        def call(self: Step, current: int, *rest: Any) -> Any:
            if current == step and dist.rank() == on_rank:
                os.kill(os.getpid(), number)
            return real(self, current, *rest)

        Step.__call__ = call  # type: ignore[method-assign]

    return prepare
