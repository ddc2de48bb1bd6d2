"""The harness: encode every distinct item of a suite once, score every set, say how sure the numbers are.

The results without timing and examples, `scores_json`, are the same bytes whatever the order of the rows, the number of processes, the size
of a batch and the state of the cache, and however often the run was killed, as far as the encoder gives an item the same embedding in any
company: in float32 it does to about 1e-7, which no score has felt yet, and which no code can rule out.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

from vlm2vec import io, prompts
from vlm2vec.cache import EmbeddingCache
from vlm2vec.data.types import Item
from vlm2vec.errors import DataError, InputError
from vlm2vec.evalsets import Identity, Intake, take_in
from vlm2vec.fill import fill
from vlm2vec.io import digest
from vlm2vec.metrics import interval
from vlm2vec.results import FORMAT, predictions_file
from vlm2vec.scoring import Scored, Variant, score
from vlm2vec.suite import MetaTask, SetSpec, Split, Suite, load_suite

__all__ = ["evaluate", "load_suite", "scores_json"]

SHOWN = 100  # problems listed per set
UNSURE = ("timing", "examples")  # parts of the results that may differ between two runs that score the same


@dataclass(frozen=True)
class Protocol:
    """The choices that decide a score: who wins equal scores, and when two candidates are one."""

    ties: str
    identity: Identity


@dataclass(frozen=True, eq=False)
class Evaluation:
    """`results` are JSON values; what came of every query is made when asked for, because it is a thousand times as much."""

    results: dict[str, Any]
    _scored: list[Scored]
    _items: Mapping[str, Item]
    _root: Path

    @property
    def digest(self) -> str:
        """Of the model and the protocol: results with the same digest are results of the same measurement."""
        return digest([self.results["model"]["fingerprint"], self.results["protocol_digest"]])

    def predictions(self) -> Iterator[dict[str, Any]]:
        """For every query, set by set in canonical order: its value, the rank of its gold, ties, and the first five retrieved."""
        return (line for found in self._scored for line in found.predictions(self._items, self._root))

    def write(self, file: Path) -> None:
        """Write the results to `file` and the predictions into the folder of that name without its ending; equal scores, equal bytes."""
        io.rewrite_jsonl(predictions_file(file), self.predictions())
        io.write_json(file, self.results)


# "reference" makes the choices of the published evaluation code (VLM2Vec, branch v1): argmax over the list, names as identity
PROTOCOLS = {"strict": Protocol("pessimistic", "content"), "reference": Protocol("reference", "name")}


def evaluate(
    encoder: Any,
    suite: Suite,
    cache_dir: str | Path,
    *,
    limit: int | None = None,
    subsets: Sequence[str] | None = None,
    protocol: str = "strict",
    seed: int = 17,
    variants: Sequence[Variant] = (),
    chunk_tokens: int = 32768,
    workers: int = 0,
    allow_missing: bool = False,
    recipe_digest: str | None = None,
    progress: bool | None = None,
) -> Evaluation:
    """Score `encoder` on `suite`.

    `limit` keeps so many queries per set (a seeded choice, their candidates whole), `subsets` only the named sets. `variants` are scored
    besides the embeddings as they are: fewer dimensions, coarser numbers.
    Embeddings are kept in `cache_dir` as they come, so that a killed run goes on where it was. Of several ranks each encodes its share, and
    all return the same scores. `progress` None shows the bars on a terminal only.

    Raises DataError that lists everything missing or broken before anything is encoded; with `allow_missing` such sets are named in
    "missing" instead, and every mean they belong to is None. Raises NonFiniteError for an embedding that is NaN or infinite and EnvError if
    the cache cannot be written.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    rule = PROTOCOLS[protocol]
    suite = suite.only(subsets) if subsets else suite
    clock = Clock()
    fingerprint = encoder.fingerprint()
    cache = EmbeddingCache(Path(cache_dir), fingerprint)
    intake = take_in(suite, cache, limit, seed, rule.identity)
    _refuse_missing(suite, intake, allow_missing)
    clock.lap("read")
    filled = fill(encoder, cache, intake, chunk_tokens, workers, progress)
    clock.lap("encode")
    scored = [score(task, cache, rule.ties, variants) for task in intake.tasks]
    measured = {"protocol": protocol, "ties": rule.ties, "limit": limit, "subsets": sorted(subsets) if subsets else None}
    described = _protocol(encoder, suite, intake, measured | {"seed": seed})
    results = {
        "format": FORMAT,
        "suite": suite.name,
        "description": suite.description,
        "protocol": described,
        "protocol_digest": digest(described),
        "model": {"path": encoder.source, "fingerprint": fingerprint, "recipe_digest": recipe_digest, "dims": scored[0].dims},
        "versions": _versions(),
        "sets": {found.task.spec.name: found.entry() for found in scored},
        "means": _means(suite.sets, {found.task.spec.name: found for found in scored}, None),
        "grid": list(_grid(suite.sets, scored, variants)),
        "missing": [{"name": name, "problems": found[:SHOWN]} for name, found in intake.problems.items()],
        "warnings": [found.warning for found in scored if found.warning],
        "examples": {found.task.spec.name: found.examples(intake.items, suite.root, seed) for found in scored},
    }
    clock.lap("score")
    seconds = {name: round(spent, 3) for name, spent in filled.seconds.items()}
    timing = {**clock.seconds, "items": len(intake.items), "encoded": filled.encoded, "sets": seconds}
    return Evaluation(results | {"timing": timing}, scored, intake.items, suite.root)


def scores_json(results: Mapping[str, Any]) -> str:
    """Everything in `results` but timing and examples, as text: equal scores are equal bytes."""
    return json.dumps({key: value for key, value in results.items() if key not in UNSURE}, indent=1, allow_nan=False) + "\n"


class Clock:
    """Seconds since the last lap, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[f"{name}_seconds"] = round(now - self._last, 3)
        self._last = now


def _refuse_missing(suite: Suite, intake: Intake, allow_missing: bool) -> None:
    """Raise DataError listing every problem, unless sets may be missing and one is left."""
    if not intake.problems or (allow_missing and intake.tasks):
        return
    lines = []
    for name, found in intake.problems.items():
        lines += [f"  {name}: {problem}" for problem in found[:SHOWN]]
        lines += [f"  {name}: and {len(found) - SHOWN:,} more"] * (len(found) > SHOWN)
    head = f"suite {suite.name}: {len(intake.problems)} of {len(suite.sets)} sets cannot be scored; nothing was encoded"
    raise DataError("\n".join([head, *lines, "repair the data, or allow missing sets and get no mean over them"]))


# -- means -------------------------------------------------------------------------------------------------------------------------------


Groups = dict[str, Any]  # name of a mean -> names of its sets, or names of sets by group for a mean of means


def groups_of(sets: Sequence[SetSpec]) -> Groups:
    """Unweighted means over sets by meta-task, by split, over all sets, and over the means of the meta-tasks (macro)."""
    meta_tasks = {name: [spec.name for spec in sets if spec.meta_task == name] for name in get_args(MetaTask)}
    splits = {name: [spec.name for spec in sets if spec.split == name] for name in get_args(Split)}
    groups: Groups = {name: members for name, members in (meta_tasks | splits).items() if members}
    return groups | {"overall": [spec.name for spec in sets], "macro": {name: members for name, members in meta_tasks.items() if members}}


def _means(sets: Sequence[SetSpec], found: Mapping[str, Scored], variant: int | None) -> dict[str, dict[str, Any]]:
    return {name: _mean(group, found, variant) for name, group in groups_of(sets).items()}


def _mean(group: Sequence[str] | Mapping[str, Sequence[str]], found: Mapping[str, Scored], variant: int | None) -> dict[str, Any]:
    """Mean and interval of a group of sets, or of groups; None for both where a set of it is missing."""
    parts = dict(group) if isinstance(group, Mapping) else {"": group}
    if any(name not in found for part in parts.values() for name in part):
        return {"score": None, "interval": None}
    values: dict[str, Any] = {key: {name: found[name].values(variant) for name in part} for key, part in parts.items()}
    score = fmean(fmean(float(value_Q.mean()) for value_Q in part.values()) for part in values.values())
    nested = values if isinstance(group, Mapping) else values[""]
    return {"score": score, "interval": list(interval(nested))}


def _grid(sets: Sequence[SetSpec], scored: Sequence[Scored], variants: Sequence[Variant]) -> Iterator[dict[str, Any]]:
    """A cell for each variant: scores of the sets and their means."""
    found = {each.task.spec.name: each for each in scored}
    for index, variant in enumerate(variants):
        yield {
            "dims": variant.dims or scored[0].dims,
            "precision": variant.precision,
            "sets": {name: {"score": float(each.values(index).mean())} for name, each in found.items()},
            "means": _means(sets, found, index),
        }


# -- what was measured, and with what ----------------------------------------------------------------------------------------------------


def _protocol(encoder: Any, suite: Suite, intake: Intake, options: Mapping[str, Any]) -> dict[str, Any]:
    """All that must be equal for two results to be compared."""
    specs = {spec.name: [spec.meta_task, spec.split, spec.metric, spec.scope] for spec in suite.sets}
    rule = PROTOCOLS[options["protocol"]]
    return {
        "suite": suite.name,
        "suite_digest": digest(specs),
        "data": {task.spec.name: task.digest for task in intake.tasks},
        **options,
        "limit_rule": "queries chosen by a hash of seed and row, candidates whole" if options["limit"] else None,
        "identity": IDENTITIES[rule.identity],
        "scores": "float32, exact sums",
        "prompt_version": prompts.VERSION,
        "pooling": encoder.options.pooling,
        "intervals": "95 %, Wilson with the effective sample size, over queries within each set",
    }


IDENTITIES = {
    "content": "candidates with equal prompt and picture bytes are one candidate",
    "name": "candidates with equal text and path are one candidate",
}


def _versions() -> dict[str, str | None]:
    return {"python": platform.python_version(), **{name: _version(name) for name in ("torch", "transformers", "vlm2vec")}}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
