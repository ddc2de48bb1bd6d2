"""The batches of a run, step by step, in the main process of each rank: read ahead by workers, with every error explained.

Workers change nothing but the time: which pairs a step has, and what stands in for a pair that cannot be read, are functions of the step
and the files.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlm2vec import dist, errors
from vlm2vec.backbones.base import Processor
from vlm2vec.batch import Batch, BatchDataset, Whereabouts, items_of
from vlm2vec.config import Recipe
from vlm2vec.data.bad import BadPair, BadPairs
from vlm2vec.data.mixture import Mixture
from vlm2vec.errors import EnvError, ImageError, Vlm2VecError
from vlm2vec.feature_cache import FeatureCache
from vlm2vec.transport import read_ahead

_GRACE = 2.0  # seconds from the end of a worker's connections to its own


def read_steps(
    recipe: Recipe, mixture: Mixture, processor: Processor, start: int, total: int, features: FeatureCache | None = None
) -> Iterator[tuple[int, list[Batch]]]:
    """(step, its `accumulate` micro-batches of this rank) from step `start` on. Pictures that `features` holds are not decoded.

    Pairs with pictures that cannot be read stop the run with an ImageError, or are replaced and listed, as data.bad_pictures says;
    DataError when they are more than data.max_bad_fraction of the mixture. EnvError says on which sample a worker died.
    """
    per_step, skips = recipe.train.accumulate, recipe.data.bad_pictures == "skip"
    allowed = math.floor(recipe.data.max_bad_fraction * len(mixture))
    whereabouts = Whereabouts(recipe.data.workers) if recipe.data.workers else None
    options = (recipe.loss.explicit_negatives, dist.rank(), dist.world_size(), allowed if skips else None, whereabouts, features)
    dataset = BatchDataset(mixture, processor, *options)
    batches = _in_order(dataset, range(start * per_step, total * per_step), recipe.data.workers)
    bad = BadPairs(Path(recipe.run.dir), allowed, start) if skips else None
    for step in range(start, total):
        found = [next(batches) for _ in range(per_step)]
        if bad is not None:
            _agree(step, found, bad)
        yield step, [_sound(batch) for batch in found]


def _agree(step: int, found: list[Batch | Vlm2VecError], bad: BadPairs) -> None:
    """Every rank notes what all ranks met, in the order of the global batch, and ends as the first that cannot go on."""
    told = dist.gather_objects([_told(batch) for batch in found])
    for micro in range(len(found)):
        for name, content in (batches[micro] for batches in told):
            if name:
                raise getattr(errors, name)(content)
            bad.add(step + 1, (BadPair(**pair) for pair in content))


def _told(batch: Batch | Vlm2VecError) -> list[Any]:
    """What other ranks need to know, as JSON: the class of an error and its message, or "" and the bad pairs."""
    return [type(batch).__name__, str(batch)] if isinstance(batch, Vlm2VecError) else ["", [asdict(pair) for pair in batch.bad]]


def _sound(batch: Batch | Vlm2VecError) -> Batch:
    if isinstance(batch, Vlm2VecError):
        raise batch
    return batch


def _in_order(dataset: BatchDataset, indices: range, workers: int) -> Iterator[Batch | Vlm2VecError]:
    """What the dataset gives for `indices`. EnvError when a worker dies: when its batch is due, and not in the middle of a save.

    Torch would raise from a handler of SIGCHLD, wherever the main process is just then; without the handler it looks whenever a batch is
    late.
    """
    before = signal.getsignal(signal.SIGCHLD)
    if getattr(before, "__module__", "").startswith("torch."):  # left behind by an earlier loader of this process
        before = signal.SIG_DFL
    batches = read_ahead(dataset, indices, workers)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    for _ in indices:
        try:
            batch = next(batches)
        except (RuntimeError, OSError, EOFError) as error:  # the last two: what a dead worker still owed cannot be fetched from it
            raise _explained(error, dataset) from error
        yield batch


def _explained(error: Exception, dataset: BatchDataset) -> Exception:
    """The death of a worker with the sample that it was at; any other error as it is."""
    died = "exited unexpectedly" in str(error)
    places = dataset.whereabouts.of_the_dead(0 if died else _GRACE) if dataset.whereabouts else []
    if not died and not places:
        return error
    samples = " and ".join(_sample(dataset, *place) for place in places) or "its first sample"
    return EnvError(
        f"a loader worker died while it was at {samples}: the system may have killed it for its memory (then lower data.workers), or a "
        "library may have crashed on that picture (then remove it)"
    )


def _sample(dataset: BatchDataset, source: int, row: int, number: int) -> str:
    rows = dataset.mixture.sources[source]
    try:
        item = list(items_of(rows[row], dataset.explicit_negatives))[number]
    except ImageError as error:
        return str(error)
    return ", ".join([rows.id(row), *(image.label for image in item.images)])
