"""Files that an evaluation leaves: `<name>.json` with the scores, and beside it the folder `<name>/` whose predictions.jsonl has a line per
query. Here they are found, checked against each other and read without holding more of a prediction than its numbers.

Shape letter: Q queries of a set.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm2vec.errors import InputError
from vlm2vec.io import read_json

FORMAT = 2
PREDICTIONS = "predictions.jsonl"
KEYS = ("suite", "protocol", "model", "sets")
AGREE = 1e-6  # between a score and the mean of its predictions


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What one model did on one set: per query who it is (`ids`), its score in [0, 1], whether the first candidate was right, and where
    its line starts in the file, in bytes.
    """

    ids: tuple[str, ...]
    value_Q: NDArray[np.float64]
    hit_Q: NDArray[np.bool_]
    offset_Q: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Measured:
    """One evaluation: its results, where they lie, and the outcomes of every set."""

    file: Path
    results: Mapping[str, Any]
    sets: Mapping[str, Outcomes]

    @property
    def name(self) -> str:
        return self.file.name.removesuffix(".json")

    def predictions(self, name: str, places: Sequence[int]) -> list[dict[str, Any]]:
        """The whole predictions of a set for some of its queries, in the order asked for."""
        with open(predictions_file(self.file), "rb") as file:
            return [_line_at(file, int(self.sets[name].offset_Q[place])) for place in places]


def _line_at(file: Any, offset: int) -> dict[str, Any]:
    file.seek(offset)
    return json.loads(file.readline())


def require_format(results: Any, what: str) -> None:
    """Raise InputError unless `results` is of the format this version writes. `what` is what the message calls them."""
    found = results.get("format") if isinstance(results, Mapping) else None
    if found != FORMAT:
        raise InputError(f"{what}: format {found!r} found, {FORMAT} expected; evaluate again with this version")


def results_file(path: str | Path) -> Path:
    """The JSON file meant by its own path or by the folder beside it that has its name. Raises InputError if it is not there."""
    path = Path(path)
    file = path.with_name(path.name + ".json") if path.is_dir() else path
    if not file.is_file():
        hint = f" (the folder {path} is there, its results are not)" if path.is_dir() else ""
        raise InputError(f"{file} not found{hint}; give a results file <model>@<digest>.json or the folder beside it")
    return file


def model_name(path: str) -> str:
    """What results call a model: the last part of its path that says something, fit for a file name."""
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..")]
    last = parts[-2] if len(parts) > 1 and parts[-1] == "model" else parts[-1] if parts else "model"
    return re.sub(r"[^\w.+-]", "_", last)


def predictions_file(file: Path) -> Path:
    """Where the predictions of a results file lie."""
    return file.with_name(file.name.removesuffix(".json")) / PREDICTIONS


def read(path: str | Path) -> Measured:
    """Read results with their predictions.

    Raises InputError for a file that is missing, broken or of another format, and where the predictions are not those of the results: other
    sets, another number of queries, or another mean than the score.
    """
    file = results_file(path)
    results = read_json(file)
    require_format(results, str(file))
    for key in KEYS:
        if key not in results:
            raise InputError(f"{file}: {key} is missing; evaluate again")
    sets = _outcomes(predictions_file(file))
    for name in {**results["sets"], **sets}:
        _require_agreement(name, results["sets"].get(name), sets.get(name), predictions_file(file))
    return Measured(file, results, {name: sets[name] for name in results["sets"]})


def _require_agreement(name: str, entry: Mapping[str, Any] | None, found: Outcomes | None, file: Path) -> None:
    told, counted = 0 if entry is None else entry["n"], 0 if found is None else len(found.ids)
    if entry is None or found is None or told != counted:
        raise InputError(f"{file}: set {name} has {counted} predictions, the results tell of {told}; evaluate again")
    if abs(entry["score"] - found.value_Q.mean()) > AGREE:
        raise InputError(f"{file}: set {name} scores {found.value_Q.mean():.6f}, the results say {entry['score']:.6f}; evaluate again")


def _outcomes(file: Path) -> dict[str, Outcomes]:
    rows: dict[str, list[tuple[str, float, bool, int]]] = {}
    for offset, row in lines(file):
        rows.setdefault(row["set"], []).append((row["query_id"], row["value"], row["hit"], offset))
    return {name: _columns(found) for name, found in rows.items()}


def _columns(rows: Sequence[tuple[str, float, bool, int]]) -> Outcomes:
    ids, values, hits, offsets = zip(*rows, strict=True)
    return Outcomes(ids, np.array(values, np.float64), np.array(hits, np.bool_), np.array(offsets, np.int64))


def lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every prediction with the byte its line starts at. Raises InputError with file:line."""
    if not file.is_file():
        raise InputError(f"{file} not found; the predictions of every query are needed: evaluate again")
    offset = 0
    with open(file, "rb") as content:
        for number, line in enumerate(content, 1):
            yield offset, _row(line, f"{file}:{number}")
            offset += len(line)


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}); was the evaluation killed? evaluate again") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object, got {type(row).__name__}")
    for key, kind in (("set", str), ("query_id", str), ("value", int | float), ("hit", bool)):
        if not isinstance(row.get(key), kind):
            raise InputError(f"{where}: {key}: expected {getattr(kind, '__name__', 'a number')}, got {row.get(key)!r}")
    if not 0 <= row["value"] <= 1:
        raise InputError(f"{where}: value: expected a number from 0 to 1, got {row['value']!r}")
    return row
