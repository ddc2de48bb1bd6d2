"""Results of evaluations made by hand: scores chosen query by query, written as an evaluation would leave them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SETS = {  # name: (meta-task, split)
    "Groceries": ("classification", "IND"),
    "Icons": ("classification", "OOD"),
    "Questions": ("vqa", "IND"),
    "Names": ("retrieval", "OOD"),
}
PROTOCOL = {
    "suite": "mini",
    "suite_digest": "d1" * 32,
    "ties": "pessimistic",
    "limit": None,
    "subsets": None,
    "pooling": "last",
    "bootstrap": 0,
}


def candidate(number: int, score: float, gold: bool) -> dict[str, Any]:
    return {"text": f"candidate {number}", "image": None, "score": score, "gold": gold}


def prediction(name: str, row: int, value: float, rank: int | None = None) -> dict[str, Any]:
    """One line of predictions.jsonl: a query of words whose gold is candidate 0, found at `rank` (1 if the value is 1, else 3)."""
    rank = rank or (1 if value == 1 else 3)
    order = [number for number in range(1, 6) if number != rank]
    found = [candidate(0 if place == rank else order.pop(0), round(1 - place / 10, 3), place == rank) for place in range(1, 6)]
    return {
        "set": name,
        "query_id": f"{name[:4].lower()}{row:012d}",
        "row": row,
        "value": float(value),
        "rank": rank,
        "ties": 0,
        "hit": rank == 1,
        "gold_rank": rank,
        "query": {"text": f"query {row} of {name}", "image": None},
        "gold": {"text": "candidate 0", "image": None},
        "retrieved": found,
    }


def means(scores: Mapping[str, float], kinds: Mapping[str, tuple[str, str]]) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[float]] = {}
    for name, score in scores.items():
        for key in (*kinds[name], "overall"):
            groups.setdefault(key, []).append(score)
    found = {key: float(np.mean(values)) for key, values in groups.items()}
    tasks = {kinds[name][0] for name in scores}
    return {
        key: {"score": value, "interval": None}
        for key, value in (found | {"macro": float(np.mean([found[task] for task in tasks]))}).items()
    }


def results(values: Mapping[str, Sequence[float]], kinds: Mapping[str, tuple[str, str]] = SETS, **changes: Any) -> dict[str, Any]:
    """Results of format 2; `changes` replace whole keys, and `protocol` adds to the protocol."""
    scores = {name: float(np.mean(row)) for name, row in values.items()}
    sets = {}
    for name, row in values.items():
        sets[name] = {
            "meta_task": kinds[name][0],
            "split": kinds[name][1],
            "metric": "precision@1",
            "score": scores[name],
            "interval": None,
        }
        sets[name] |= {"n": len(row), "candidates": 5, "chance": 0.2, "ties": 0, "metrics": {"hit@1": scores[name], "mrr@10": scores[name]}}
    made = {
        "format": 2,
        "suite": "mini",
        "description": "made up",
        "protocol": PROTOCOL | changes.pop("protocol", {}),
        "protocol_digest": "cafe" * 16,
        "model": {"path": "runs/one/model", "fingerprint": "feed" * 16, "recipe_digest": None, "dims": 512},
        "versions": {"python": "3.11.9"},
        "sets": sets,
        "means": means(scores, kinds),
        "grid": [],
        "missing": [],
        "warnings": [],
        "examples": {},
        "timing": {"items": 1, "sets": dict.fromkeys(values, 0.5)},
    }
    return made | changes


def write(
    folder: Path, name: str, values: Mapping[str, Sequence[float]], kinds: Mapping[str, tuple[str, str]] = SETS, **changes: Any
) -> Path:
    """Write results and predictions under `folder`; returns the results file."""
    lines = [prediction(key, row, value) for key, found in values.items() for row, value in enumerate(found)]
    return write_lines(folder, name, results(values, kinds, **changes), lines)


def write_lines(folder: Path, name: str, made: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / f"{name}.json").write_text(json.dumps(made))
    return folder / f"{name}.json"
