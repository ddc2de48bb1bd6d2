"""Two or more evaluations of the same data, query by query: how far they are apart, and whether that is more than noise.

Every model is held against the first. Scores, differences and intervals are fractions; a positive difference speaks for the later model.

Shape letter: Q queries that both models answered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from vlm2vec.errors import InputError
from vlm2vec.io import digest
from vlm2vec.paired import DRAWS, Sample, holm, interval, mean_p_value, p_value
from vlm2vec.results import Measured, Outcomes
from vlm2vec.suite import MetaTask, Split

FORMAT = 1
LEVEL = 0.05
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Of a protocol: what says nothing about the data or the score of a query. A seed that chose other queries shows in the queries.
HARMLESS = frozenset({"subsets", "seed", "bootstrap", "intervals", "pooling"})
ENTRY_KEYS = ("metric", "n", "candidates", "digest")
NAMED = 8  # differing keys that an error lists


@dataclass(frozen=True)
class Side:
    """One of the evaluations, under the letter that stands for it."""

    letter: str
    name: str
    model: str
    fingerprint: str


@dataclass(frozen=True)
class Row:
    """One set, or the mean over `sets` sets. `won` and `lost` count the queries that scored higher and lower; a mean has no `p_holm`."""

    key: str
    meta_task: str | None
    split: str | None
    sets: int
    queries: int
    first: float
    second: float
    difference: float
    interval: tuple[float, float]
    p: float
    p_holm: float | None
    won: int
    lost: int

    @property
    def verdict(self) -> str:
        """ "identical" where no query differs, "better" or "worse" where more than noise does, else "noise"."""
        if not self.won and not self.lost:
            return "identical"
        if (self.p if self.p_holm is None else self.p_holm) >= LEVEL:
            return "noise"
        return "better" if self.difference > 0 else "worse"


@dataclass(frozen=True)
class Contrast:
    """`second` against `first`: a row per set, and a row per mean over those sets by its name in the results."""

    first: Side
    second: Side
    sets: tuple[Row, ...]
    means: tuple[Row, ...]

    @property
    def headline(self) -> Row:
        """The mean over all sets."""
        return next(row for row in self.means if row.key == "overall")

    def differing(self, verdict: str) -> list[Row]:
        return [row for row in self.sets if row.verdict == verdict]


@dataclass(frozen=True)
class Comparison:
    """All contrasts with the first side. `left_out` names the sets that not all sides have, with the letters of those that do; `forced`
    says what was not alike and compared nonetheless.
    """

    suite: str
    metrics: tuple[str, ...]
    sides: tuple[Side, ...]
    contrasts: tuple[Contrast, ...]
    left_out: Mapping[str, str]
    forced: tuple[str, ...]
    draws: int = DRAWS
    seed: int = 0


def compare(measured: Sequence[Measured], force: bool = False, draws: int = DRAWS, seed: int = 0) -> Comparison:
    """Hold every evaluation against the first, on the sets that all of them have.

    Raises InputError where protocols or data differ, naming the keys; with `force` they are compared on the queries both have, and
    `forced` tells of it. Raises InputError too for fewer than two evaluations and where no set, or no query, is common.
    """
    if not 2 <= len(measured) <= len(LETTERS):
        raise InputError(f"{len(measured)} results given; give from 2 to {len(LETTERS)} of them")
    sides = [_side(letter, each) for letter, each in zip(LETTERS, measured, strict=False)]
    names = [name for name in measured[0].sets if all(name in each.sets for each in measured)]
    if not names:
        raise InputError(
            "no set is in all of the results; "
            + "; ".join(f"{side.letter} has {_some(each.sets)}" for side, each in zip(sides, measured, strict=True))
        )
    unlike = [text for side, each in zip(sides[1:], measured[1:], strict=True) for text in _unlike(measured[0], each, names, side.letter)]
    if unlike and not force:
        raise InputError(f"not measured alike: {_some(unlike, '; ')}. --force compares the queries that both have nonetheless")
    every = {name: None for each in measured for name in each.sets if name not in names}
    return Comparison(
        suite=str(measured[0].results["suite"]),
        metrics=tuple(dict.fromkeys(measured[0].results["sets"][name]["metric"] for name in names)),
        sides=tuple(sides),
        contrasts=tuple(
            _contrast(sides[0], side, measured[0], each, names, draws, seed) for side, each in zip(sides[1:], measured[1:], strict=True)
        ),
        left_out={name: "".join(side.letter for side, each in zip(sides, measured, strict=True) if name in each.sets) for name in every},
        forced=tuple(unlike),
        draws=draws,
        seed=seed,
    )


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON values, verdicts included."""
    tree = asdict(comparison)
    for contrast, found in zip(tree["contrasts"], comparison.contrasts, strict=True):
        for part in ("sets", "means"):
            for entry, row in zip(contrast[part], getattr(found, part), strict=True):
                entry["verdict"] = row.verdict
    return {"format": FORMAT, "level": LEVEL, **tree}


def _side(letter: str, measured: Measured) -> Side:
    model = measured.results["model"]
    return Side(letter, measured.name, str(model["path"]), str(model["fingerprint"]))


def _some(texts: Iterable[str], comma: str = ", ") -> str:
    listed = list(texts)
    return comma.join(listed[:NAMED]) + (f"{comma}and {len(listed) - NAMED} more" if len(listed) > NAMED else "")


# -- what is alike -----------------------------------------------------------------------------------------------------------------------


def _unlike(first: Measured, second: Measured, names: Sequence[str], letter: str) -> Iterator[str]:
    """Everything that forbids comparing the two, as "key: value in A, value in B"."""
    for key, one, other in _differing(first, second, names):
        yield f"{key}: {_shown(one)} in A, {_shown(other)} in {letter}"
    for name in names:
        ids, others = Counter(first.sets[name].ids), Counter(second.sets[name].ids)
        if ids != others:
            yield f"queries of {name}: {(ids - others).total()} only in A, {(others - ids).total()} only in {letter}"


def _differing(first: Measured, second: Measured, names: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
    if first.results["suite"] != second.results["suite"]:
        yield "suite", first.results["suite"], second.results["suite"]
    one, other = first.results["protocol"], second.results["protocol"]
    partly = one.get("subsets") != other.get("subsets")  # one digest over all sets must differ then: the sets are looked at one by one
    for key in dict.fromkeys([*one, *other]):
        value, found = one.get(key), other.get(key)
        if key in HARMLESS or (partly and key == "suite_digest"):
            continue
        if isinstance(value, Mapping) and isinstance(found, Mapping):  # by set
            yield from ((f"{key} of {name}", value.get(name), found.get(name)) for name in names if value.get(name) != found.get(name))
        elif value != found:
            yield key, value, found
    for name in names:
        entry, theirs = first.results["sets"][name], second.results["sets"][name]
        yield from ((f"{key} of {name}", entry.get(key), theirs.get(key)) for key in ENTRY_KEYS if entry.get(key) != theirs.get(key))


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:12]}\N{HORIZONTAL ELLIPSIS}"


# -- query by query ----------------------------------------------------------------------------------------------------------------------


def pair(first: Outcomes, second: Outcomes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places (Q,) of the queries both have, in the order of the first. Of queries with equal ids the k-th goes with the k-th."""
    if first.ids == second.ids:
        same = np.arange(len(first.ids))
        return same, same
    places: dict[tuple[str, int], int] = {key: place for place, key in enumerate(_numbered(second.ids))}
    found = [(place, places[key]) for place, key in enumerate(_numbered(first.ids)) if key in places]
    left, right = np.array(found, np.int64).reshape(-1, 2).T
    return left, right


def _numbered(ids: Sequence[str]) -> Iterator[tuple[str, int]]:
    seen: Counter[str] = Counter()
    for name in ids:
        yield name, seen[name]
        seen[name] += 1


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Scores of the common queries of one set."""

    entry: Mapping[str, Any]
    first_Q: NDArray[np.float64]
    second_Q: NDArray[np.float64]

    @property
    def difference_Q(self) -> NDArray[np.float64]:
        return self.second_Q - self.first_Q


def _contrast(first: Side, second: Side, measured: Measured, other: Measured, names: Sequence[str], draws: int, seed: int) -> Contrast:
    pairs = {}
    for name in names:
        left, right = pair(measured.sets[name], other.sets[name])
        if not len(left):
            raise InputError(f"set {name}: A and {second.letter} have no query in common; leave the set out")
        pairs[name] = _Pairs(measured.results["sets"][name], measured.sets[name].value_Q[left], other.sets[name].value_Q[right])
    p_values = [p_value(Sample(name, found.difference_Q), draws, seed) for name, found in pairs.items()]
    adjusted = holm(p_values)
    rows = [_row(name, {name: 1.0}, pairs, p, p_holm) for name, p, p_holm in zip(names, p_values, adjusted, strict=True)]
    means = []
    for key, weights in mean_weights({name: found.entry for name, found in pairs.items()}).items():
        samples = [Sample(name, pairs[name].difference_Q, weight) for name, weight in weights.items()]
        means.append(_row(key, weights, pairs, mean_p_value(samples, draws, seed), None))
    return Contrast(first, second, tuple(rows), tuple(means))


def mean_weights(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The weight of every set in every mean: meta-tasks, IND, OOD, overall, and macro, the mean of the meta-tasks' means."""
    tasks = {task: [name for name in entries if entries[name]["meta_task"] == task] for task in get_args(MetaTask)}
    tasks = {task: members for task, members in tasks.items() if members}
    splits = {split: [name for name in entries if entries[name]["split"] == split] for split in get_args(Split)}
    groups = tasks | {split: members for split, members in splits.items() if members} | {"overall": list(entries)}
    weights = {key: dict.fromkeys(members, 1 / len(members)) for key, members in groups.items()}
    return weights | {"macro": {name: weight / len(tasks) for task in tasks for name, weight in weights[task].items()}}


def _row(key: str, weights: Mapping[str, float], pairs: Mapping[str, _Pairs], p: float, p_holm: float | None) -> Row:
    found = [pairs[name] for name in weights]
    is_set = p_holm is not None
    first, second = (
        sum(weight * float(np.mean(getattr(pairs[name], side))) for name, weight in weights.items()) for side in ("first_Q", "second_Q")
    )
    return Row(
        key=key,
        meta_task=found[0].entry["meta_task"] if is_set else None,
        split=found[0].entry["split"] if is_set else None,
        sets=len(found),
        queries=sum(len(each.first_Q) for each in found),
        first=first,
        second=second,
        difference=second - first,
        interval=interval([Sample(name, pairs[name].difference_Q, weight) for name, weight in weights.items()]),
        p=p,
        p_holm=p_holm,
        won=sum(int((each.difference_Q > 0).sum()) for each in found),
        lost=sum(int((each.difference_Q < 0).sum()) for each in found),
    )


@dataclass(frozen=True)
class Flip:
    """A query that one model got right and the other wrong, with the predictions of both; `gained` says that the second got it right."""

    gained: bool
    first: Mapping[str, Any]
    second: Mapping[str, Any]


def flips(first: Measured, second: Measured, name: str, most: int, seed: int = 0) -> list[Flip]:
    """Up to `most` queries of a set that flipped to right, then up to `most` to wrong, in an order that a hash of the query decides."""
    left, right = pair(first.sets[name], second.sets[name])
    hit_Q, other_Q = first.sets[name].hit_Q[left], second.sets[name].hit_Q[right]
    found = []
    for gained, flipped_Q in ((True, ~hit_Q & other_Q), (False, hit_Q & ~other_Q)):
        places = sorted(np.flatnonzero(flipped_Q).tolist(), key=lambda place: digest([seed, name, first.sets[name].ids[left[place]]]))[
            :most
        ]
        ours, theirs = first.predictions(name, left[places].tolist()), second.predictions(name, right[places].tolist())
        found += [Flip(gained, one, other) for one, other in zip(ours, theirs, strict=True)]
    return found
