"""What a report says, before anyone decides how it looks: scores before and after, in groups, with their means.

Scores, intervals and chance are fractions in [0, 1] here; only the writers turn them into per cent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from vlm2vec.results import require_format
from vlm2vec.standings import Best, Published

META_TASKS = {
    "classification": "Classification",
    "vqa": "Visual question answering",
    "retrieval": "Retrieval",
    "grounding": "Grounding",
}
TOTALS = {
    "IND": "In-distribution (IND)",
    "OOD": "Out-of-distribution (OOD)",
    "overall": "Overall, mean of sets",
    "macro": "Macro, mean of meta-tasks",
}
NAMED = 8  # sets listed in a sentence


@dataclass(frozen=True)
class Score:
    """A share of queries with its 95 % interval; both ends are None when no interval was computed."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """One set, or the mean of several.

    `details` is the set's entry in the results, empty for a mean; `examples` some of its queries, `best` its highest published score.
    """

    key: str
    title: str
    after: Score | None
    before: Score | None
    chance: float | None
    sets: int = 1
    details: Mapping[str, Any] = field(default_factory=dict)
    examples: Sequence[Mapping[str, Any]] = ()
    best: Best | None = None

    @property
    def change(self) -> float | None:
        """After minus before, a difference of fractions."""
        return None if self.before is None or self.after is None else self.after.value - self.before.value

    @property
    def apart(self) -> bool:
        """The two intervals do not touch."""
        if self.before is None or self.after is None:
            return False
        ends = (self.before.low, self.before.high, self.after.low, self.after.high)
        return None not in ends and (ends[2] > ends[1] or ends[3] < ends[0])  # type: ignore[operator]

    @property
    def above_chance(self) -> bool:
        """The whole interval (the score itself, without one) lies above chance."""
        if self.after is None or self.chance is None:
            return True
        low = self.after.value if self.after.low is None else self.after.low
        return low > self.chance

    @property
    def lift(self) -> float:
        """How much of the way from chance to perfect was covered; 0 is chance and 1 is perfect."""
        chance = self.chance or 0.0
        score = self.after.value if self.after else 0.0
        return (score - chance) / (1.0 - chance) if chance < 1.0 else 0.0


@dataclass(frozen=True)
class Group:
    """The sets of one meta-task under their mean."""

    mean: Row
    sets: tuple[Row, ...]


@dataclass(frozen=True)
class Summary:
    """All rows of a report.

    `comparable` is False when before and after were measured under different protocols; `noticed` is what the evaluation itself warned of;
    `standard` names the total that stands for all: overall where scores are published, so that it can be held against them, else macro.
    """

    suite: str
    metric: str
    groups: tuple[Group, ...]
    totals: tuple[Row, ...]
    compared: bool
    comparable: bool
    missing: tuple[str, ...]
    noticed: tuple[str, ...]
    standard: str = "macro"

    @property
    def sets(self) -> list[Row]:
        return [row for group in self.groups for row in group.sets]

    @property
    def headline(self) -> Row | None:
        """The standard mean, or the last total there is."""
        return next((row for row in self.totals if row.key == self.standard), self.totals[-1] if self.totals else None)

    @property
    def at_chance(self) -> list[Row]:
        """The sets that chance alone could explain."""
        return [row for row in self.sets if not row.above_chance]

    @property
    def warnings(self) -> list[str]:
        """What a reader must know before comparing numbers."""
        found = []
        if not self.comparable:
            found.append("Before and after were measured under different protocols. Do not compare them.")
        if self.missing:
            found.append(f"Not evaluated, because their data is missing or broken: {', '.join(self.missing)}.")
        return [*found, *self.noticed]


def summarize(after: Mapping[str, Any], before: Mapping[str, Any] | None = None, published: Published | None = None) -> Summary:
    """Read one or two results files of `evaluate`, and the published scores of their suite, into rows.

    Raises InputError when a file is of a format this version does not read.
    """
    for which, results in (("after", after), ("before", before)):
        if results is not None:
            require_format(results, f"results {which}")
    sets = [_set_row(name, entry, after, before, published) for name, entry in after["sets"].items()]
    names = [*META_TASKS, *(row.details["meta_task"] for row in sets)]
    groups = []
    for name in dict.fromkeys(names):
        members = tuple(row for row in sets if row.details["meta_task"] == name)
        if members:
            groups.append(Group(_mean_row(name, META_TASKS.get(name, name), members, after, before), members))
    return Summary(
        suite=str(after["suite"]),
        metric=" and ".join(dict.fromkeys(str(row.details["metric"]) for row in sets)) or "precision@1",
        groups=tuple(groups),
        totals=_totals(sets, groups, after, before),
        compared=before is not None,
        comparable=before is None or before.get("protocol_digest") == after.get("protocol_digest"),
        missing=tuple(entry["name"] if isinstance(entry, Mapping) else entry for entry in after.get("missing", ())),
        noticed=(*after.get("warnings", ()), *(f"Before: {text}" for text in (before or {}).get("warnings", ()))),
        standard="overall" if published else "macro",
    )


def _set_row(
    name: str, entry: Mapping[str, Any], after: Mapping[str, Any], before: Mapping[str, Any] | None, published: Published | None
) -> Row:
    return Row(
        name,
        name,
        after=_score(entry),
        before=_score(_entry(before, "sets", name)),
        chance=entry.get("chance"),
        details=entry,
        examples=after.get("examples", {}).get(name, ()),
        best=published.best(name) if published else None,
    )


def _totals(sets: Sequence[Row], groups: Sequence[Group], after: Mapping[str, Any], before: Mapping[str, Any] | None) -> tuple[Row, ...]:
    members: dict[str, Sequence[Row]] = {split: [row for row in sets if row.details["split"] == split] for split in ("IND", "OOD")}
    members |= {"overall": sets, "macro": [group.mean for group in groups]}
    return tuple(_mean_row(key, TOTALS[key], rows, after, before) for key, rows in members.items() if rows and after["means"].get(key))


def _entry(results: Mapping[str, Any] | None, part: str, name: str) -> Mapping[str, Any] | None:
    return None if results is None else results[part].get(name)


def _score(entry: Mapping[str, Any] | None) -> Score | None:
    if entry is None or entry["score"] is None:
        return None
    low, high = entry.get("interval") or (None, None)
    return Score(entry["score"], low, high)


def _mean_row(key: str, title: str, members: Sequence[Row], after: Mapping[str, Any], before: Mapping[str, Any] | None) -> Row:
    """The means come from the results; only the chance of a mean is computed here, as the mean of its members'."""
    chances = [row.chance for row in members]
    chance = None if None in chances else fmean(value for value in chances if value is not None)
    score, was = _score(_entry(after, "means", key)), _score(_entry(before, "means", key))
    return Row(key, title, score, was, chance, sets=sum(row.sets for row in members))


def percent(value: float | None, signed: bool = False) -> str:
    """A fraction as per cent with one decimal; a dash for None. A change that rounds to nothing has no sign."""
    if value is None:
        return "\N{EN DASH}"
    text = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def sentence(summary: Summary) -> str:
    """The result in two sentences, with what keeps it honest."""
    row = summary.headline
    if row is None or row.after is None:
        withheld = " Means are withheld because the data of some sets is missing or broken." if summary.missing else ""
        return f"{len(summary.sets)} sets were evaluated.{withheld}" if summary.sets else "No set was evaluated."
    what, score = f"{_capital(row.key)} {summary.metric}", f"{percent(row.after.value)} %"
    if row.before is None or row.change is None:
        return f"{what} is {score}, where chance is {percent(row.chance)} %. {_beyond_chance(summary)}"
    moved = {1: "rose from {} to", -1: "fell from {} to", 0: "stayed at"}[_sign(row.change)].format(percent(row.before.value))
    overlap = "do not overlap" if row.apart else "overlap"
    points = f"{percent(row.change, signed=True)} points; the 95 % intervals {overlap}"
    return f"{what} {moved} {score}, {points}. {_beyond_intervals(summary)} {_beyond_chance(summary)}"


def _beyond_intervals(summary: Summary) -> str:
    signs = [_sign(row.change or 0.0) for row in summary.sets if row.apart]
    worse = f", {signs.count(-1)} worse" if -1 in signs else ""
    return f"{signs.count(1)} of {len(summary.sets)} sets are better beyond their intervals{worse}."


def _beyond_chance(summary: Summary) -> str:
    low = summary.at_chance
    if len(low) > NAMED:
        return f"{len(low)} of {len(summary.sets)} sets are not clearly above chance."
    return f"Not clearly above chance: {', '.join(row.title for row in low)}." if low else "Every set is above its chance."


def _sign(change: float) -> int:
    return (change > 0) - (change < 0)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
