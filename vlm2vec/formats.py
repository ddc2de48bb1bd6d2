"""Results in the formats of others: the two files per set that the first MMEB evaluation leaves, and what its leaderboard takes.

Only what was measured is written. What is missing is left out with a warning, never filled in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vlm2vec import log
from vlm2vec.errors import InputError
from vlm2vec.io import safe_join, write_atomic
from vlm2vec.results import require_format
from vlm2vec.suite import load_suite

SUITE = "mmeb"
IMAGES = "eval_images/"  # the folder that picture paths start from in the data
HITS = ("precision@1", "hit@1")
KINDS = ("hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr")
METRICS = tuple(f"{kind}@{k}" for kind in KINDS for k in (1, 5, 10))
METADATA: dict[str, type] = {
    "model_name": str,
    "model_backbone": str,
    "model_size": float,  # thousand millions of parameters
    "embedding_dimension": int,
    "max_length_tokens": int,
    "model_release_date": str,  # YYYY-MM-DD
    "data_source": str,
    "url": str,
    "report_generated_date": str,
}
logger = log.get_logger(__name__)


def write_reference_files(results: Mapping[str, Any], predictions: Iterable[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write `<set>_score.json` and `<set>_pred.txt` for every set into `folder`; returns the paths.

    The score file is {"acc", "num_correct", "num_pred"}. The other has a line per query, in the order of the data's rows: the candidate
    that came first, as the Python tuple (text, path of its picture below the picture folder, "" for none). `predictions` are the lines
    of predictions.jsonl in any order. A set that is not scored by hits has no such files and is left out with a warning.

    Raises InputError where the predictions are not those of the results, EnvError if the storage fails.
    """
    require_format(results, "results")
    rows: dict[str, list[Mapping[str, Any]]] = {name: [] for name in results["sets"]}
    for prediction in predictions:
        if prediction["set"] not in rows:
            raise InputError(f"predictions of set {prediction['set']!r}, which the results do not have")
        rows[prediction["set"]].append(prediction)
    paths = []
    for name, entry in results["sets"].items():
        if entry["metric"] not in HITS:
            logger.warning("%s: scored by %s, for which there is no reference format; left out", name, entry["metric"])
            continue
        if len(rows[name]) != entry["n"]:
            raise InputError(f"set {name}: {len(rows[name])} predictions, the results tell of {entry['n']} queries; evaluate again")
        for suffix, text in (("score.json", _score(rows[name])), ("pred.txt", _firsts(rows[name]))):
            paths.append(safe_join(folder, f"{name}_{suffix}"))
            write_atomic(paths[-1], text)
    return paths


def _score(rows: list[Mapping[str, Any]]) -> str:
    correct = sum(bool(row["hit"]) for row in rows)
    return json.dumps({"acc": correct / len(rows), "num_correct": correct, "num_pred": len(rows)}) + "\n"


def _firsts(rows: list[Mapping[str, Any]]) -> str:
    firsts = [row["retrieved"][0] for row in sorted(rows, key=lambda row: row["row"])]
    return "".join(f"{(first['text'], (first['image'] or '').removeprefix(IMAGES))!r}\n" for first in firsts)


def submission(results: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What the MMEB leaderboard takes: {"metadata": ..., "metrics": {"image": {set: {"hit@1": ..., "num_pred", "num_data"}}}}.

    `metadata` has `model_name` and any other key of `METADATA`; where they are absent, `data_source` becomes "Self-Reported" and
    `report_generated_date` now. Sets and metrics that the results lack are left out with a warning; a run over fewer queries is
    warned of. Raises InputError for results of another suite or format and for metadata that the leaderboard does not know.
    """
    require_format(results, "results")
    if results["suite"] != SUITE:
        raise InputError(f"results of suite {results['suite']}: the leaderboard takes {SUITE} only")
    names = [spec.name for spec in load_suite(SUITE).sets]
    found = {name: _numbers(name, results["sets"][name]) for name in names if name in results["sets"]}
    image = {name: numbers for name, numbers in found.items() if "hit@1" in numbers}
    if lacking := [name for name in names if name not in image]:
        logger.warning("%d of %d sets are left out of the submission: %s", len(lacking), len(names), ", ".join(lacking))
    if results["protocol"].get("limit") is not None:
        logger.warning("only %s queries per set were evaluated; the leaderboard expects all", results["protocol"]["limit"])
    return {"metadata": _metadata(metadata), "metrics": {"image": image}}


def _numbers(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    measured = entry.get("metrics", {})
    if lacking := [metric for metric in METRICS if metric not in measured]:
        logger.warning("%s: %s not measured; left out", name, ", ".join(lacking))
    return {metric: measured[metric] for metric in METRICS if metric in measured} | {"num_pred": entry["n"], "num_data": entry["n"]}


def _metadata(given: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata in the leaderboard's order, checked key by key."""
    for key, value in given.items():
        if key not in METADATA:
            raise InputError(f"metadata: unknown key {key!r}; known: {', '.join(METADATA)}")
        kinds = (int, float) if METADATA[key] is float else METADATA[key]
        if isinstance(value, bool) or not isinstance(value, kinds) or value == "":
            raise InputError(f"metadata: {key}: expected {METADATA[key].__name__}, got {value!r}")
    if "model_name" not in given:
        raise InputError("metadata: model_name is required")
    filled = {"data_source": "Self-Reported", "report_generated_date": datetime.now(UTC).isoformat(timespec="seconds"), **given}
    return {key: filled[key] for key in METADATA if key in filled}
