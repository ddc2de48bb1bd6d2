"""What a validation found, as plain data and as text for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

SIDES = ("query", "positive", "negatives")
POINTS = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
_SPREADS = ("positives of a row", "negatives of a row", "picture width", "picture height")


@dataclass
class Found:
    """How often something is wrong, and the first places."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str, keep: int) -> None:
        self.count += 1
        if len(self.examples) < keep:
            self.examples.append(example)


@dataclass(frozen=True)
class Report:
    """The problems of some files by kind, and their statistics."""

    files: tuple[str, ...]
    decoded: bool
    problems: dict[str, Found]
    statistics: dict[str, Any]

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        problems = {kind: {"count": found.count, "examples": found.examples} for kind, found in self.problems.items()}
        return {"format": 1, "ok": self.ok, "files": self.files, "decoded": self.decoded, "problems": problems, **self.statistics}

    def text(self, shown: int) -> str:
        """For people: the first `shown` places of each kind, the counts, the statistics, the verdict."""
        return "\n".join([*self._problems(shown), *_lines(self.statistics), "", self._verdict()])

    def _problems(self, shown: int) -> Iterator[str]:
        for kind, found in self.problems.items():
            yield f"{kind}: {found.count:,}"
            yield from (f"  {example}" for example in found.examples[:shown])
            if found.count > shown:
                yield f"  and {found.count - shown:,} more"
            yield ""

    def _verdict(self) -> str:
        count = sum(found.count for found in self.problems.values())
        how = "every picture was decoded" if self.decoded else "pictures were not looked at"
        rows = f"{self.statistics['rows']:,} rows; {how}"
        return f"{', '.join(self.files)}: " + (f"{count:,} problems in {rows}" if count else f"nothing wrong in {rows}")


def percentiles(counter: Mapping[int, int]) -> dict[str, int]:
    """The values at POINTS, each one that occurs: the smallest with at least that share of all values at or below it."""
    total, reached, at = sum(counter.values()), 0, {}
    rest = list(POINTS.items())
    for value in sorted(counter):
        reached += counter[value]
        while rest and reached >= max(1, rest[0][1] * total):
            at[rest.pop(0)[0]] = value
    return at


def statistics(counts: Mapping[str, Counter[Any]], distinct: Mapping[str, tuple[int, int, str]]) -> dict[str, Any]:
    """The counters of a validation as they are reported; `distinct` is what `validate` knows of the different keys of each kind."""
    rows = sum(counts["rows"].values())
    whole = sum(counts["positives of a row"].values())
    made: dict[str, Any] = {"rows": rows, "whole rows": whole, "rows by file": dict(counts["rows"])}
    made |= {f"rows with {name}": counts["rows with"][name] for name in ("id", "group", "score")}
    made |= {"groups": distinct["group"][0], "largest group": distinct["group"][1]}
    made["repeated rows"] = whole - distinct["row"][0]
    made["different"] = {
        kind: {"count": number, "most rows on one": most, "at": where}
        for kind, (number, most, where) in distinct.items()
        if kind in ("query", "positive", "picture")
    }
    made["sides"] = {side: _side(counts, side) for side in SIDES if counts[f"{side} holds"]}
    made["spread"] = {name: percentiles(counts[name]) for name in _SPREADS if counts[name]}
    return made


def _side(counts: Mapping[str, Counter[Any]], side: str) -> dict[str, Any]:
    spreads = {unit: percentiles(counts[f"{side} {unit}"]) for unit in ("characters", "tokens") if counts[f"{side} {unit}"]}
    holds = counts[f"{side} holds"]
    return {"items": sum(holds.values()), "hold": dict(holds.most_common()), "instructed": counts["instructed"][side], **spreads}


def _lines(made: Mapping[str, Any]) -> Iterator[str]:
    rows = [("rows", f"{made['rows']:,}" + (f", {made['whole rows']:,} of them can be read" if made["whole rows"] < made["rows"] else ""))]
    rows += [("groups", f"{made['groups']:,}, the largest of {made['largest group']:,} rows")] if made["groups"] else []
    rows += [(f"with {name}", f"{made[f'rows with {name}']:,} rows") for name in ("id", "group", "score") if made[f"rows with {name}"]]
    rows += [("repeated rows", f"{made['repeated rows']:,}")] if made["repeated rows"] else []
    for kind, entry in made["different"].items():
        often = f"; one is in {entry['most rows on one']:,} rows, first {entry['at']}" if entry["most rows on one"] > 1 else ""
        rows += [(f"different {'queries' if kind == 'query' else kind + 's'}", f"{entry['count']:,}{often}")] if entry["count"] else []
    for side, entry in made["sides"].items():
        hold = ", ".join(f"{kind} {count:,}" for kind, count in entry["hold"].items())
        rows.append((side, f"{hold}" + (f"; {entry['instructed']:,} with an instruction" if entry["instructed"] else "")))
        rows += [(f"  {unit}", _spread(entry[unit])) for unit in ("characters", "tokens") if unit in entry]
    rows += [(name, _spread(points)) for name, points in made["spread"].items() if points["max"]]
    width = max(len(name) for name, _ in rows)
    yield from (f"{name:<{width}}  {text}" for name, text in rows)


def _spread(points: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in points.items())
