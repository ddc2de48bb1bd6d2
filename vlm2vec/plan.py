"""`--dry-run`: what a recipe would do, from its arithmetic alone and before a single step.

Neither weights nor pictures are read: sizes and memory come from the model's configuration, as in `vlm2vec estimate`, which also says what
depends on a device. Without the data, items are assumed, and the plan says so.
"""

from __future__ import annotations

from typing import Any

from vlm2vec import estimate
from vlm2vec.composition import compose
from vlm2vec.config import Recipe
from vlm2vec.data.mixture import Mixture
from vlm2vec.devices import find
from vlm2vec.inventory import Inventory
from vlm2vec.workload import mixture_at_hand

GIB = 1024**3
SAMPLED = 8  # global batches whose texts are looked at


def parameters_by_part(inventory: Inventory) -> dict[str, tuple[int, int]]:
    """Part -> (trainable, total) parameter counts of the parts that there are; adapters count with the part they sit in."""
    table = {part: (count.trained + count.adapter, count.total + count.adapter) for part, count in inventory.parameters.items()}
    return {part: counts for part, counts in table.items() if counts[1]}


def memory(made: estimate.Plan) -> dict[str, float]:
    """GiB per device by purpose, as `vlm2vec estimate` counts them, for the items of some batches. No device is asked for its size."""
    return {name: value / GIB for name, value in estimate.memory(made).items()}


def dry_run(recipe: Recipe, world_size: int = 1) -> str:
    """The plan as text: data mix, batch, chunks, negatives per query, what some batches hold, trainable parameters by part, memory.

    Raises ModelError for a model that is nowhere known, DataError for data that are there and cannot be used.
    """
    mixture = mixture_at_hand(recipe)
    device, _ = find("h200")  # which one does not matter for bytes
    made = estimate.plan(recipe, device, world_size, mixture=mixture)
    model = [("model", recipe.model.path), ("sizes from", made.model_source)]
    parts = sorted(parameters_by_part(made.inventory).items())
    sections = [
        ("recipe", [("digest", recipe.digest[:12]), ("run folder", recipe.run.dir), *model]),
        ("data", _data_rows(recipe, mixture, made)),
        ("batch", _batch_rows(recipe, mixture, made.work.steps, world_size)),
        *(_batches(recipe, mixture, made.work.steps * recipe.train.accumulate) if mixture else []),
        ("trainable parameters", [(part, f"{trained:,} of {total:,}") for part, (trained, total) in parts]),
        ("memory per device, estimated", _memory_rows(memory(made))),
    ]
    return "\n".join(_section(title, rows) for title, rows in sections)


def _data_rows(recipe: Recipe, mixture: Mixture | None, made: estimate.Plan) -> list[tuple[str, str]]:
    if mixture is None:
        return [("missing", f"data folder {recipe.data.root} does not exist: training will refuse to start"), ("items", made.work.basis)]
    return [(row["name"], _source_line(row)) for row in mixture.table()]


def _batch_rows(recipe: Recipe, mixture: Mixture | None, steps: int, world_size: int) -> list[tuple[str, str]]:
    batch, block = recipe.train.global_batch, recipe.data.block
    pairs = steps * batch * recipe.train.accumulate
    epochs = f" = {pairs / len(mixture):.2f} epochs of {len(mixture)}" if mixture else ""
    return [
        ("global batch", f"{batch} pairs on {world_size} process(es), {recipe.train.accumulate} batch(es) per step"),
        ("blocks", f"{batch // block} of {block} pairs of one source" if block else "none: mixed"),
        ("negatives per query", f"{batch - 1} in the batch, and explicit ones" if recipe.loss.explicit_negatives else f"{batch - 1}"),
        ("chunks", _chunks_line(recipe)),
        ("steps", f"{steps} = {pairs} pairs{epochs}"),
    ]


def _batches(recipe: Recipe, mixture: Mixture, count: int) -> list[tuple[str, list[tuple[str, str]]]]:
    """The section on what batches hold: a few of them, evenly over the run."""
    indices = sorted({index * (count - 1) // max(1, SAMPLED - 1) for index in range(SAMPLED)})
    found = compose((mixture.pairs(index) for index in indices), recipe.loss)
    fewest, most = found.sources
    title = f"what a batch holds, over {found.batches} of {count} (floors and start are losses; naive: equal positives as negatives)"
    return [(title, [("sources per batch", f"{fewest} to {most}"), *found.lines()])]


def _chunks_line(recipe: Recipe) -> str:
    size, kept = recipe.train.chunk_tokens, recipe.train.keep_tokens
    sizes = "as large as runs fastest, tried out before the first step" if size is None else f"at most {size} tokens each, padding included"
    return f"{sizes}; {'as many as fit' if kept is None else f'{kept} tokens of a batch'} keep their graph"


def _source_line(row: dict[str, Any]) -> str:
    cap = f", capped at {row['cap']}" if row["cap"] else ""
    return f"{row['rows']:>9,} pairs{cap}, {100 * row['share']:.1f} % of the draws"


def _memory_rows(table: dict[str, float]) -> list[tuple[str, str]]:
    return [(name, f"{value:8.2f} GiB") for name, value in [*table.items(), ("sum", sum(table.values()))]]


def _section(title: str, rows: list[tuple[str, str]]) -> str:
    return "\n".join([title, *(f"  {name:<24} {value}" for name, value in rows)])
