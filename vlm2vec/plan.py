"""`--dry-run`: what a recipe would do, from its arithmetic alone and before a single step.

Memory is an estimate of what must be resident at once: weights, gradients, optimizer state, activations of one chunk, embeddings of the
batch.
"""

from __future__ import annotations

from typing import Any

from vlm2vec.composition import compose
from vlm2vec.config import Recipe
from vlm2vec.data.mixture import Mixture
from vlm2vec.encoder import Encoder
from vlm2vec.trainer import total_steps

GIB = 1024**3
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SAMPLED = 8  # global batches whose texts are looked at


def parameters_by_part(encoder: Encoder) -> dict[str, tuple[int, int]]:
    """Part -> (trainable, total) parameter counts; adapters count with the part they sit in."""
    table: dict[str, tuple[int, int]] = {}
    for name, parameter in encoder.model.named_parameters():
        part = encoder.backbone.part_of(name)
        trained, total = table.get(part, (0, 0))
        table[part] = (trained + parameter.numel() * parameter.requires_grad, total + parameter.numel())
    return table


def activation_bytes(encoder: Encoder, recipe: Recipe) -> int:
    """Activations of one chunk in the second pass: about 34 x hidden bytes of 16-bit values per token and layer (Korthikanti et al. 2022,
    arXiv 2205.05198, eq. 1 without the attention matrix, which fused kernels do not store); one layer's worth plus inputs with
    checkpointing.
    """
    config = encoder.model.config.get_text_config()
    width = 2 if recipe.train.precision == "bf16" else 4
    per_layer = 17 * width * config.hidden_size * recipe.train.chunk_tokens
    if not recipe.train.activation_checkpointing:
        return per_layer * config.num_hidden_layers
    return per_layer + width * config.hidden_size * recipe.train.chunk_tokens * config.num_hidden_layers


def memory(encoder: Encoder, recipe: Recipe, world_size: int) -> dict[str, float]:
    """GiB per device by purpose."""
    counts = parameters_by_part(encoder).values()
    trained, total = sum(count[0] for count in counts), sum(count[1] for count in counts)
    per_rank = recipe.train.global_batch / world_size
    return {
        "weights": total * BYTES[recipe.model.dtype] / GIB,
        "gradients": trained * 4 / GIB,
        "optimizer": trained * 8 / GIB,
        "activations of a chunk": activation_bytes(encoder, recipe) / GIB,
        "embeddings and scores": (
            4 * recipe.train.global_batch * encoder.backbone.hidden_size * 4 + 8 * per_rank * recipe.train.global_batch
        )
        / GIB,
    }


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
                (
                    "chunks",
                    f"at most {recipe.train.chunk_tokens} padded tokens each; {recipe.train.keep_tokens} of a batch keep their graph",
                ),
                ("steps", f"{steps} = {pairs} pairs = {pairs / len(mixture):.2f} epochs of {len(mixture)}"),
            ],
        ),
        *_batches(recipe, mixture, steps * recipe.train.accumulate),
        (
            "trainable parameters",
            [(part, f"{trained:,} of {total:,}") for part, (trained, total) in sorted(parameters_by_part(encoder).items())],
        ),
        ("memory per device, estimated", _memory_rows(memory(encoder, recipe, world_size))),
    ]
    return "\n".join(_section(title, rows) for title, rows in sections)


def _batches(recipe: Recipe, mixture: Mixture, count: int) -> list[tuple[str, list[tuple[str, str]]]]:
    """The section on what batches hold: a few of them, evenly over the run."""
    indices = sorted({index * (count - 1) // max(1, SAMPLED - 1) for index in range(SAMPLED)})
    found = compose((mixture.pairs(index) for index in indices), recipe.loss)
    fewest, most = found.sources
    title = f"what a batch holds, over {found.batches} of {count} (floors and start are losses; naive: equal positives as negatives)"
    return [(title, [("sources per batch", f"{fewest} to {most}"), *found.lines()])]


def _source_line(row: dict[str, Any]) -> str:
    cap = f", capped at {row['cap']}" if row["cap"] else ""
    return f"{row['rows']:>9,} pairs{cap}, {100 * row['share']:.1f} % of the draws"


def _memory_rows(table: dict[str, float]) -> list[tuple[str, str]]:
    return [(name, f"{value:8.2f} GiB") for name, value in [*table.items(), ("sum", sum(table.values()))]]


def _section(title: str, rows: list[tuple[str, str]]) -> str:
    return "\n".join([title, *(f"  {name:<24} {value}" for name, value in rows)])
