"""How a step is cut into chunks. None of it changes the gradient: it is what fits into memory and runs fastest.

A run that leaves it open settles it once, before its first step, and writes it into its folder, so that a run that goes on has the same
chunks and with them the same bits. When memory turns out to be full later, less is kept, then chunks are halved, and that is written too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from vlm2vec import io
from vlm2vec.config import TrainConfig
from vlm2vec.errors import CheckpointError

CHUNKS = "chunks.jsonl"  # in the run folder: a row whenever the chunks were settled anew; the last one holds


@dataclass(frozen=True)
class Budget:
    """Tokens of a chunk, tokens of a batch whose graphs are kept, padding included in both, and whether activations are recomputed."""

    chunk_tokens: int
    keep_tokens: int
    activation_checkpointing: bool

    @classmethod
    def given(cls, options: TrainConfig) -> Budget | None:
        """What a recipe says, or None where it leaves something open."""
        keys = {entry.name: getattr(options, entry.name) for entry in fields(cls)}
        return None if None in keys.values() else cls(**keys)

    def smaller(self) -> Budget:
        """For a memory that was full: half as many kept graphs, none when they are less than a chunk; then chunks of half the size."""
        if self.keep_tokens:
            half = self.keep_tokens // 2
            return replace(self, keep_tokens=half if half >= self.chunk_tokens else 0)
        return replace(self, chunk_tokens=self.chunk_tokens // 2)

    def write(self, run_dir: Path, step: int, why: str) -> None:
        """Add a row: from 1-based `step` on, these chunks."""
        io.append_jsonl(run_dir / CHUNKS, {"step": step, "why": why, **asdict(self)})


def read(run_dir: Path) -> Budget | None:
    """What an earlier part of the run settled, or None. Raises CheckpointError for a row that says something else."""
    file = run_dir / CHUNKS
    rows: list[dict[str, Any]] = io.read_jsonl(file) if file.exists() else []
    if not rows:
        return None
    found = {entry.name: rows[-1].get(entry.name) for entry in fields(Budget)}
    if [type(value) for value in found.values()] != [int, int, bool]:
        raise CheckpointError(f"{file}: its last row must hold {', '.join(found)}, got {rows[-1]}; remove the file to settle them anew")
    return Budget(**found)  # type: ignore[arg-type]  # checked above
