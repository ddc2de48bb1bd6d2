"""`--dry-run`: what a recipe would do, from its arithmetic alone and before a single step.

Memory is that of `vlm2vec estimate`; time and what else depends on a device is to be had there.
"""

from __future__ import annotations

from typing import Any

from vlm2vec import estimate
from vlm2vec.backbones.shapes import shape_like
from vlm2vec.composition import compose
from vlm2vec.config import Recipe
from vlm2vec.data.mixture import Mixture
from vlm2vec.devices import find
from vlm2vec.encoder import Encoder
from vlm2vec.trainer import total_steps

GIB = 1024**3
SAMPLED = 8  # global batches whose texts are looked at


def parameters_by_part(encoder: Encoder) -> dict[str, tuple[int, int]]:
    """Part -> (trainable, total) parameter counts; adapters count with the part they sit in."""
    table: dict[str, tuple[int, int]] = {}
    for name, parameter in encoder.model.named_parameters():
        part = encoder.backbone.part_of(name)
        trained, total = table.get(part, (0, 0))
        table[part] = (trained + parameter.numel() * parameter.requires_grad, total + parameter.numel())
    return table


def memory(recipe: Recipe, encoder: Encoder, mixture: Mixture, world_size: int = 1) -> dict[str, float]:
    """GiB per device by purpose, as `vlm2vec estimate` counts them, for the items of some batches. No device is asked for its size."""
    device, _ = find("h200")  # which one does not matter for bytes
    held = estimate.memory(estimate.plan(recipe, device, world_size, shape=shape_like(encoder.backbone), mixture=mixture))
    return {name: value / GIB for name, value in held.items()}


def dry_run(recipe: Recipe, encoder: Encoder, mixture: Mixture, world_size: int = 1) -> str:
    """The plan as text: data mix, batch, chunks, negatives per query, what some batches hold, trainable parameters by part, memory."""
    steps, batch = total_steps(recipe, mixture), recipe.train.global_batch
    pairs = steps * batch * recipe.train.accumulate
    sections = [
        ("recipe", [("digest", recipe.digest[:12]), ("run folder", recipe.run.dir), ("model", recipe.model.path)]),
        ("data", [(row["name"], _source_line(row)) for row in mixture.table()]),
        (
            "batch",
            [
                ("global batch", f"{batch} pairs on {world_size} process(es), {recipe.train.accumulate} batch(es) per step"),
                (
                    "blocks",
                    f"{batch // recipe.data.block} of {recipe.data.block} pairs of one source" if recipe.data.block else "none: mixed",
                ),
                (
                    "negatives per query",
                    f"{batch - 1} in the batch, and explicit ones" if recipe.loss.explicit_negatives else f"{batch - 1}",
                ),
                ("chunks", _chunks_line(recipe)),
                ("steps", f"{steps} = {pairs} pairs = {pairs / len(mixture):.2f} epochs of {len(mixture)}"),
            ],
        ),
        *_batches(recipe, mixture, steps * recipe.train.accumulate),
        (
            "trainable parameters",
            [(part, f"{trained:,} of {total:,}") for part, (trained, total) in sorted(parameters_by_part(encoder).items())],
        ),
        ("memory per device, estimated", _memory_rows(memory(recipe, encoder, mixture, world_size))),
    ]
    return "\n".join(_section(title, rows) for title, rows in sections)


def _batches(recipe: Recipe, mixture: Mixture, count: int) -> list[tuple[str, list[tuple[str, str]]]]:
    """The section on what batches hold: a few of them, evenly over the run."""
    indices = sorted({index * (count - 1) // max(1, SAMPLED - 1) for index in range(SAMPLED)})
    found = compose((mixture.pairs(index) for index in indices), recipe.loss)
    fewest, most = found.sources
    title = f"what a batch holds, over {found.batches} of {count} (floors and start are losses; naive: equal positives as negatives)"
    return [(title, [("sources per batch", f"{fewest} to {most}"), *found.lines()])]


def _chunks_line(recipe: Recipe) -> str:
    size, kept = (recipe.train.chunk_tokens, recipe.train.keep_tokens)
    sizes = "as large as runs fastest, tried out before the first step" if size is None else f"at most {size} padded tokens each"
    return f"{sizes}; {'as many as fit' if kept is None else f'{kept} tokens of a batch'} keep their graph"


def _source_line(row: dict[str, Any]) -> str:
    cap = f", capped at {row['cap']}" if row["cap"] else ""
    return f"{row['rows']:>9,} pairs{cap}, {100 * row['share']:.1f} % of the draws"


def _memory_rows(table: dict[str, float]) -> list[tuple[str, str]]:
    return [(name, f"{value:8.2f} GiB") for name, value in [*table.items(), ("sum", sum(table.values()))]]


def _section(title: str, rows: list[tuple[str, str]]) -> str:
    return "\n".join([title, *(f"  {name:<24} {value}" for name, value in rows)])
