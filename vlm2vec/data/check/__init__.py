"""`vlm2vec data check`: is everything that a suite needs in a folder, under the right names, whole and readable?

`check` returns plain data and `table` shows them. `layout` knows which folders belong to which sets, `rows` reads them, `pictures` looks at
what they name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from vlm2vec.data.check import layout, rows
from vlm2vec.data.check.layout import Place
from vlm2vec.data.check.pictures import Pictures
from vlm2vec.data.check.report import Example, Finding, Report, SetReport, finding, table
from vlm2vec.errors import DataError
from vlm2vec.log import progress
from vlm2vec.suite import load_suite

__all__ = ["Example", "Finding", "Report", "SetReport", "check", "table"]


def check(folder: Path | str, suite: str = "mmeb", subsets: Sequence[str] = (), decode: bool = False, workers: int = 8) -> Report:
    """Compare a folder with what `suite` says should be in it; the sides it holds, evaluation or training or both, are found out.

    `decode` opens every picture with `workers` threads instead of looking at its first bytes. Nothing is changed, and nothing found is an
    error here. Raises DataError when there is no such folder or suite, when it holds no set of either side, and for unknown `subsets`.
    """
    folder = Path(folder)
    places = _chosen(layout.find(folder, load_suite(suite, folder)), subsets)
    looks: dict[Path, Pictures] = {}
    reports: list[SetReport] = []
    with progress(len(places), f"checking {folder}", "sets") as bar:
        for place in places:
            look = looks.setdefault(place.pictures, Pictures(place.pictures, decode, workers))
            reports.append(_check(place, look))
            bar.update()
    complete = all(entry.rows and entry.present == entry.pictures for entry in reports)
    return Report(str(folder), suite, decode, tuple(reports), tuple(layout.notes(folder, places, complete)))


def _chosen(places: Sequence[Place], subsets: Sequence[str]) -> Sequence[Place]:
    known = {place.name for place in places}
    for name in subsets:
        if name not in known:
            raise DataError(f"no set {name!r} to check; there are: {', '.join(sorted(known))}")
    return [place for place in places if not subsets or place.name in subsets]


def _check(place: Place, look: Pictures) -> SetReport:
    if place.problem is not None:
        return SetReport(place.label, place.side, findings=(place.problem,))
    found = rows.read(place.files, place.side)
    present, problems = look.look(found.path_P, found.row_P)
    findings = (*found.findings, *finding("count", _counts(place, found)), *problems)
    return SetReport(place.label, place.side, found.rows, found.candidates, len(found.path_P), present, findings)


def _counts(place: Place, found: rows.Rows) -> Iterator[Example]:
    """Numbers that are not those of the suite; a file that could not be read has said so already."""
    if found.rows and abs(found.rows - place.rows) >= max(1, place.rounded):
        about = "about " if place.rounded > 1 else ""
        yield Example(f"{found.rows:,} rows, the suite says {about}{place.rows:,}")
    if found.candidates and place.candidates and found.candidates != place.candidates:
        yield Example(f"{found.candidates:,} candidates per query (median), the suite says {place.candidates:,}")
