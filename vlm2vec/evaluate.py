"""The harness: encode every distinct item of a suite once, score precision@1, say how sure the numbers are.

The results without their timing, `scores_json`, are the same bytes whatever the order of the rows, the size of a batch and the state of the
cache, and however often the run was killed, as far as the encoder gives an item the same embedding in any company.

Shape letters: Q queries, N distinct targets of a set, M candidates of one query, D embedding.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from vlm2vec import dist, log, prompts
from vlm2vec.cache import EmbeddingCache
from vlm2vec.data.types import Item
from vlm2vec.errors import DataError, EnvError, InputError, NonFiniteError
from vlm2vec.evalsets import Intake, Task, picture_name, take_in
from vlm2vec.io import digest
from vlm2vec.metrics import TIES, bootstrap_interval, rank_gold, similarity
from vlm2vec.suite import MetaTask, SetSpec, Split, Suite, load_suite

__all__ = ["evaluate", "load_suite", "scores_json"]

FORMAT = 1
METRIC = "precision@1"
BLOCK = 512  # items per shard of the cache: what a kill can cost
QUERIES_AT_ONCE = 64
GRID = 2.0**26
COLLAPSED = 1e-6
EXAMPLES, RETRIEVED = 4, 5  # hits and misses shown per set, items shown per query
SHOWN = 100  # problems listed per set
logger = log.get_logger(__name__)


def evaluate(
    encoder: Any,
    suite: Suite,
    cache_dir: str | Path,
    *,
    limit: int | None = None,
    subsets: Sequence[str] | None = None,
    ties: str = "pessimistic",
    bootstrap: int = 1000,
    seed: int = 17,
    chunk_tokens: int = 32768,
    workers: int = 0,
    allow_missing: bool = False,
    recipe_digest: str | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Score `encoder` on `suite` and return the results as JSON values.

    `limit` keeps so many queries per set (a seeded choice, their candidates whole), `subsets` only the named sets. `bootstrap` resamples
    give the 95 % intervals; 0 gives none. Embeddings are kept in `cache_dir` as they come, so that a killed run goes on where it was. Of
    several ranks each encodes its share, and all return the same results. `progress` None shows the bar on a terminal only.

    Raises DataError that lists everything missing or broken before anything is encoded; with `allow_missing` such sets are named in
    "missing" instead, and every mean they belong to is None. Raises NonFiniteError for an embedding that is NaN or infinite and EnvError if
    the cache cannot be written.
    """
    if ties not in TIES:
        raise InputError(f"ties: expected one of {', '.join(TIES)}, got {ties!r}")
    options = {"ties": ties, "limit": limit, "subsets": sorted(subsets) if subsets else None, "bootstrap": bootstrap, "seed": seed}
    suite = suite.only(subsets) if subsets else suite
    clock = Clock()
    fingerprint = encoder.fingerprint()
    cache = EmbeddingCache(Path(cache_dir), fingerprint)
    intake = take_in(suite, cache, limit, seed)
    _refuse_missing(suite, intake, allow_missing)
    clock.lap("read")
    encoded = encode_missing(encoder, cache, intake.items, chunk_tokens, workers, progress)
    clock.lap("encode")
    scored = [score(task, cache, ties, bootstrap, seed) for task in intake.tasks]
    protocol = _protocol(encoder, suite, intake, options)
    results = {
        "format": FORMAT,
        "suite": suite.name,
        "description": suite.description,
        "protocol": protocol,
        "protocol_digest": digest(protocol),
        "model": {"path": encoder.source, "fingerprint": fingerprint, "recipe_digest": recipe_digest},
        "versions": _versions(),
        "sets": {found.task.spec.name: found.entry(intake.items, suite.root, seed) for found in scored},
        "means": _means(suite.sets, scored, bootstrap, seed),
        "missing": [{"name": name, "problems": found[:SHOWN]} for name, found in intake.problems.items()],
        "warnings": [found.warning for found in scored if found.warning],
    }
    clock.lap("score")
    return results | {"timing": {**clock.seconds, "items": len(intake.items), "encoded": encoded}}


def scores_json(results: Mapping[str, Any]) -> str:
    """Everything in `results` but the timing, as text: equal scores are equal bytes."""
    return json.dumps({key: value for key, value in results.items() if key != "timing"}, indent=1, allow_nan=False) + "\n"


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


# -- encoding ----------------------------------------------------------------------------------------------------------------------------


def encode_missing(
    encoder: Any, cache: EmbeddingCache, items: Mapping[str, Item], chunk_tokens: int, workers: int = 0, progress: bool | None = None
) -> int:
    """Bring every item (by content digest) into the cache; returns how many this process encoded.

    The blocks depend on the items alone, so that a resumed run repeats whole blocks, in the same company. Every rank fills its own blocks
    and then what is missing still, which is nothing where all ranks see the same folder.
    """
    contents = sorted(items)
    blocks = [contents[start : start + BLOCK] for start in range(0, len(contents), BLOCK)]
    own = blocks[dist.rank() :: dist.world_size()]
    encoded = 0
    with log.progress(sum(map(len, own)), "encoding", "item", enabled=progress) as bar:
        for block in own:
            encoded += _fill(encoder, cache, items, block, chunk_tokens, workers)
            bar.update(len(block))
    dist.barrier()
    return encoded + sum(_fill(encoder, cache, items, block, chunk_tokens, workers) for block in blocks)


def _fill(encoder: Any, cache: EmbeddingCache, items: Mapping[str, Item], block: Sequence[str], chunk_tokens: int, workers: int) -> int:
    """Encode and publish the items of a block that are not in the cache; returns their number."""
    keys = {cache.key(content): content for content in block}
    missing = cache.missing(list(keys))
    if not missing:
        return 0
    fresh = [items[keys[key]] for key in missing]
    rows_ND = np.asarray(encoder.encode(fresh, chunk_tokens=chunk_tokens, workers=workers), dtype=np.float32)
    bad = ~np.isfinite(rows_ND).all(axis=1)
    if bad.any():
        first = fresh[int(bad.argmax())]
        name = first.images[0].label if first.images else repr(prompts.render(first)[:80])
        raise NonFiniteError(f"{int(bad.sum())} of {len(fresh)} embeddings are NaN or infinite, first {name}; nothing was scored")
    cache.put(missing, rows_ND)
    return len(missing)


def _rows(cache: EmbeddingCache, contents: Sequence[str]) -> NDArray[np.float32]:
    found, rows_ND = cache.get([cache.key(content) for content in contents])
    if not found.all():
        lost = int((~found).sum())
        raise EnvError(f"{lost} embeddings vanished from {cache.directory} while they were in use; run again to encode them once more")
    return rows_ND


# -- scoring -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scored:
    """The outcome of one set; `scores[q]` (M_q,) are the similarities of `task.candidates[q]`, float32."""

    task: Task
    scores: list[NDArray[np.float32]]
    rank_Q: NDArray[np.int64]
    ties_Q: NDArray[np.int64]
    ties: str
    interval: tuple[float, float] | None
    warning: str

    @property
    def hit_Q(self) -> NDArray[np.bool_]:
        return self.rank_Q == 1

    @property
    def value(self) -> float:
        """precision@1, a fraction."""
        return int(self.hit_Q.sum()) / len(self.hit_Q)

    def entry(self, items: Mapping[str, Item], root: Path, seed: int) -> dict[str, Any]:
        """What the results say about this set."""
        spec = self.task.spec
        return {
            "meta_task": spec.meta_task,
            "split": spec.split,
            "metric": METRIC,
            "score": self.value,
            "interval": self.interval and list(self.interval),
            "n": len(self.hit_Q),
            "candidates": self.task.listed,
            "chance": self.task.chance,
            "ties": int((self.ties_Q > 0).sum()),
            "examples": [self._example(query, items, root) for query in self._chosen(seed)],
        }

    def _chosen(self, seed: int) -> list[int]:
        """Hits, then misses: of each the first few in an order that a hash of the query decides."""
        said = [digest([seed, self.task.spec.name, query]) for query in self.task.queries]
        order = sorted(range(len(said)), key=lambda query: said[query])
        hits = [query for query in order if self.hit_Q[query]]
        misses = [query for query in order if not self.hit_Q[query]]
        return hits[:EXAMPLES] + misses[:EXAMPLES]

    def _example(self, query: int, items: Mapping[str, Item], root: Path) -> dict[str, Any]:
        members, scores = self.task.candidates[query], self.scores[query]
        gold_M = np.arange(len(members)) == 0
        # among equal scores the gold stands where the rule for ties puts it, the others in the order of their content
        order = np.lexsort((members, gold_M if self.ties == "pessimistic" else ~gold_M, -scores))[:RETRIEVED]
        return {
            "query": _shown(items[self.task.queries[query]], root),
            "hit": bool(self.hit_Q[query]),
            "gold_rank": int(self.rank_Q[query]),
            "gold": _shown(items[self.task.targets[members[0]]], root),
            "retrieved": [
                {**_shown(items[self.task.targets[members[place]]], root), "score": round(float(scores[place]), 3), "gold": place == 0}
                for place in order.tolist()
            ],
        }


def _shown(item: Item, root: Path) -> dict[str, Any]:
    return {"text": prompts.render(item), "image": picture_name(item.images[0], root) if item.images else None}


def score(task: Task, cache: EmbeddingCache, ties: str, bootstrap: int, seed: int) -> Scored:
    """Rank the candidates of every query in float32.

    Where all targets lie within 1e-6 of each other, only rounding tells them apart: under the pessimistic rule all their scores are ties.
    """
    target_ND = _rows(cache, task.targets)
    scores = candidate_scores(_rows(cache, task.queries), target_ND, task.candidates)
    collapsed = len(target_ND) > 1 and bool(np.ptp(target_ND, axis=0).max() <= COLLAPSED)
    if collapsed and ties == "pessimistic":
        scores = [np.full_like(row, row[0]) for row in scores]
    ranks = rank_gold(scores, [np.arange(len(members)) == 0 for members in task.candidates], ties)
    interval = bootstrap_interval({task.spec.name: ranks.correct_Q}, bootstrap, seed) if bootstrap else None
    warning = f"{task.spec.name}: all {len(target_ND)} candidates within {COLLAPSED:g}: model collapsed?" if collapsed else ""
    found = Scored(task, scores, ranks.rank_Q, ranks.ties_Q, ties, interval, warning)
    if warning:
        logger.warning(warning)
    span = "" if interval is None else f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    logger.info("%s: %s %.1f %%%s, %d queries", task.spec.name, METRIC, 100 * found.value, span, len(task.queries))
    return found


def candidate_scores(
    query_QD: NDArray[np.float32], target_ND: NDArray[np.float32], candidates: Sequence[NDArray[np.int64]]
) -> list[NDArray[np.float32]]:
    """Dot product of every query with each of its candidates, a row (M_q,) per query; equal embeddings score equally in any company."""
    query_QD, target_ND = on_grid(query_QD), on_grid(target_ND)
    scores: list[NDArray[np.float32]] = []
    for start in range(0, len(query_QD), QUERIES_AT_ONCE):
        members = candidates[start : start + QUERIES_AT_ONCE]
        used = np.unique(np.concatenate(members))
        block = similarity(query_QD[start : start + QUERIES_AT_ONCE], target_ND[used])
        scores += [row[np.searchsorted(used, indices)] for row, indices in zip(block, members, strict=True)]
    return scores


def on_grid(rows_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Unit rows with every number rounded to a multiple of 2^-26, an error below that of float32 at one.

    Products of such numbers are multiples of 2^-52 and their partial sums stay below 2, so a float64 matrix product commits no rounding:
    its result cannot depend on the order in which a library adds, hence not on the shape of the matrices.
    """
    return np.rint(rows_ND * np.float32(GRID)) / np.float32(GRID)


# -- the results -------------------------------------------------------------------------------------------------------------------------


def _means(sets: Sequence[SetSpec], scored: Sequence[Scored], bootstrap: int, seed: int) -> dict[str, dict[str, Any]]:
    """Unweighted means over sets by meta-task, by split, over all sets, and over the means of the meta-tasks (macro)."""
    found = {each.task.spec.name: each for each in scored}
    meta_tasks = {name: [spec.name for spec in sets if spec.meta_task == name] for name in get_args(MetaTask)}
    splits = {name: [spec.name for spec in sets if spec.split == name] for name in get_args(Split)}
    groups: dict[str, Any] = {name: members for name, members in (meta_tasks | splits).items() if members}
    groups |= {"overall": [spec.name for spec in sets], "macro": {name: members for name, members in meta_tasks.items() if members}}
    return {name: _mean(group, found, bootstrap, seed) for name, group in groups.items()}


def _mean(group: Sequence[str] | Mapping[str, Sequence[str]], found: Mapping[str, Scored], bootstrap: int, seed: int) -> dict[str, Any]:
    """Mean and interval of a group of sets, or of groups; None for both where a set of it is missing."""
    parts = list(group.values()) if isinstance(group, Mapping) else [group]
    if any(name not in found for part in parts for name in part):
        return {"score": None, "interval": None}
    value = fmean(fmean(found[name].value for name in part) for part in parts)
    hits: Any = [{name: found[name].hit_Q for name in part} for part in parts]
    nested = dict(zip(group, hits, strict=True)) if isinstance(group, Mapping) else hits[0]
    return {"score": value, "interval": list(bootstrap_interval(nested, bootstrap, seed)) if bootstrap else None}


def _protocol(encoder: Any, suite: Suite, intake: Intake, options: Mapping[str, Any]) -> dict[str, Any]:
    """All that must be equal for two results to be compared."""
    return {
        "suite": suite.name,
        "suite_digest": digest({"datasets": suite.digest, "data": {task.spec.name: task.digest for task in intake.tasks}}),
        **options,
        "limit_rule": "queries chosen by a hash of seed and row, candidates whole" if options["limit"] else None,
        "metric": METRIC,
        "identity": "items with equal prompt and picture bytes are one item",
        "scores": "float32, exact sums",
        "prompt_version": prompts.VERSION,
        "pooling": encoder.options.pooling,
        "intervals": "95 % bootstrap over queries within each set",
    }


def _versions() -> dict[str, str | None]:
    return {"python": platform.python_version(), **{name: _version(name) for name in ("torch", "transformers", "vlm2vec")}}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
