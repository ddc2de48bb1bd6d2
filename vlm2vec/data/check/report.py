"""What a check found, as plain data, and as a table for people."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

KEPT = 1000  # examples kept per finding; the count is always whole
SHOWN = 5  # examples that the table shows


@dataclass(frozen=True)
class Example:
    """One place: the row, the path of the picture or file below the folder, and what is wrong there."""

    text: str
    row: int | None = None
    path: str = ""

    def __str__(self) -> str:
        where = [f"row {self.row}"] if self.row is not None else []
        return ", ".join([*where, *([self.path] if self.path else [])]) + (": " if where or self.path else "") + self.text


@dataclass(frozen=True)
class Finding:
    """`count` problems of one kind: missing, misnamed, corrupt, rows, count, and of pictures: missing, empty, web page, unreadable."""

    kind: str
    count: int
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class SetReport:
    """One set. `rows`, `candidates` (the median per query, None for training) and `pictures` (different ones named) are what was found."""

    name: str
    side: str
    rows: int = 0
    candidates: int | None = None
    pictures: int = 0
    present: int = 0
    findings: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.findings


@dataclass(frozen=True)
class Report:
    """All of a folder. `notes` are remarks that do no harm: archives that were unpacked but not deleted, files of macOS, other folders."""

    folder: str
    suite: str
    decoded: bool
    sets: tuple[SetReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return all(entry.ok for entry in self.sets)

    def totals(self) -> dict[str, int]:
        """Sums over the sets; under "problems: <kind>" how many problems of each kind there are."""
        problems: Counter[str] = Counter()
        for entry in self.sets:
            for finding in entry.findings:
                problems[f"problems: {finding.kind}"] += finding.count
        sums = {key: sum(getattr(entry, key) for entry in self.sets) for key in ("rows", "pictures", "present")}
        return {"sets": len(self.sets), "ok": sum(entry.ok for entry in self.sets), **sums, **problems}

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {"format": 1, "ok": self.ok, **dataclasses.asdict(self), "totals": self.totals()}


def finding(kind: str, examples: Iterable[Example], count: int | None = None) -> list[Finding]:
    """A finding of all `examples` (or of `count`, of which these are some), as a list; an empty one when there is none."""
    found = list(examples)
    return [Finding(kind, len(found) if count is None else count, tuple(found[:KEPT]))] if found else []


def table(report: Report) -> str:
    """The report for people: a line per set, then the problems, notes and totals."""
    rows: list[tuple[str, ...]] = [("set", "rows", "candidates", "pictures", "present", "problems")]
    rows += [_line(entry) for entry in report.sets]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:5], widths[1:5], strict=True)), row[5]])
        for row in rows
    ]
    return "\n".join(
        [*(line.rstrip() for line in lines), "", *_problems(report.sets), *(f"note: {note}" for note in report.notes), _verdict(report)]
    )


def _line(entry: SetReport) -> tuple[str, ...]:
    problems = ", ".join(f"{found.count:,} {found.kind}" for found in entry.findings) or "none"
    candidates = "" if entry.candidates is None else f"{entry.candidates:,}"
    return (entry.name, f"{entry.rows:,}", candidates, f"{entry.pictures:,}", f"{entry.present:,}", problems)


def _problems(sets: Sequence[SetReport]) -> Iterator[str]:
    for entry in sets:
        for found in entry.findings:
            yield f"{entry.name}: {found.count:,} {found.kind}"
            yield from (f"  {example}" for example in found.examples[:SHOWN])
            if found.count > SHOWN:
                yield f"  and {found.count - SHOWN:,} more"


def _verdict(report: Report) -> str:
    totals = report.totals()
    how = "every picture was decoded" if report.decoded else "pictures were looked at, not decoded (--decode opens every one)"
    problems = sum(count for key, count in totals.items() if key.startswith("problems"))
    state = "all is there" if report.ok else f"{problems:,} problems in {totals['sets'] - totals['ok']} of {totals['sets']} sets"
    found = f"{totals['sets']} sets, {totals['rows']:,} rows, {totals['present']:,} of {totals['pictures']:,} pictures"
    return f"{report.folder}: {state}; {found}; {how}"
