"""What there is to say about one set of the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from vlm2vec.data.mini.rows import TaskRows
from vlm2vec.data.mini.world import World

Negatives = Literal["empty", "one", "bare", "many", "absent"]


@dataclass(frozen=True, kw_only=True)
class SetSpec:
    """One set: its texts, its sizes and where it comes from. `make` turns the sources into rows and reads all else from here.

    `instruction` begins every query and `target` every target that is a picture. `train`, `queries` and `candidates` are the most that are
    used, and `pool` is how many the candidates of all queries are drawn from; an OOD set has no training rows. `negatives` says what the
    columns of negatives hold: "", one negative, a picture bare of words, lists; or that there are no such columns.
    """

    name: str
    meta_task: Literal["classification", "vqa", "retrieval", "grounding"]
    split: Literal["IND", "OOD"]
    make: Callable[[World, SetSpec], TaskRows]
    instruction: str
    target: str = ""
    train: int = 0
    queries: int
    candidates: int = 1000
    pool: int | None = None
    negatives: Negatives = "empty"
    query_modality: str
    target_modality: str
    packages: tuple[str, ...]
    note: str
    seed: int = 17
