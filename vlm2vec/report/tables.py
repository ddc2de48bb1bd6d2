"""The scores as plain text for a terminal, at most 100 columns, and as Markdown for a repository."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlm2vec.io import digest
from vlm2vec.report import beside, smaller
from vlm2vec.report.markup import clean
from vlm2vec.report.plain import code, plain, rows
from vlm2vec.report.summary import META_TASKS, Row, Score, Summary, percent, sentence, summarize
from vlm2vec.standings import Published

NAME_WIDTH = 27
SLOWEST = 3  # sets whose time is told
MOST_FLAT = 8  # values that are written out
SPLIT_WIDTH = 3
WIDTHS = {"before": 19, "after": 19, "score": 19, "change": 7, "chance": 6, "queries": 7, "candidates": 10}


def table(after: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> str:
    """Aligned plain text: sets under the mean of their meta-task, then IND, OOD, overall and macro, then smaller vectors if any were tried.

    No line exceeds 100 columns. Numbers are per cent with 95 % intervals in brackets; `*` marks a change whose intervals do not overlap.
    Raises InputError for a results format this version does not read.
    """
    summary = summarize(after, before)
    columns = _columns(summary)
    head = _line("set", "", [name.rjust(WIDTHS[name]) for name in columns])
    rule = "-" * len(head)
    lines = [f"{clean(summary.suite)[:40]}: {summary.metric} in %, with 95 % intervals", "", head, rule]
    for group in summary.groups:
        lines.append(_text_row(group.mean, columns))
        lines += [_text_row(row, columns, indent="  ") for row in group.sets]
    lines += [rule, *(_text_row(row, columns) for row in summary.totals), ""]
    sizes = smaller.sizes(after)
    lines += [*smaller.text(sizes), ""] if sizes else []
    return "\n".join([*lines, *_notes(summary)]).rstrip() + "\n"


def _columns(summary: Summary) -> list[str]:
    return ["before", "after", "change", "chance", "queries"] if summary.compared else ["score", "chance", "queries", "candidates"]


def _line(name: str, split: str, cells: Sequence[str]) -> str:
    return "  ".join([name.ljust(NAME_WIDTH), split.ljust(SPLIT_WIDTH), *cells]).rstrip()


def _text_row(row: Row, columns: Sequence[str], indent: str = "") -> str:
    name = indent + " ".join(clean(row.title).split())
    name = name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 1] + "~"
    return _line(name, str(row.details.get("split", "")), [_cell(row, column).rjust(WIDTHS[column]) for column in columns])


def _cell(row: Row, column: str) -> str:
    if column in ("before", "after", "score"):
        return _aligned(row.before if column == "before" else row.after)
    if column == "change":
        return "-" if row.change is None else percent(row.change, signed=True) + ("*" if row.apart else " ")
    if column == "chance":
        return percent(row.chance)
    return size(row) if column == "queries" else number(row.details.get("candidates", ""))


def _aligned(score: Score | None) -> str:
    """Padded inside the brackets, so that the points stand under each other."""
    if score is None:
        return "-" + " " * 14
    interval = "" if score.low is None else f" [{percent(score.low)}-{percent(score.high)}]"
    return f"{percent(score.value)}{interval:<14}"


def size(row: Row) -> str:
    """How many queries a set has, or how many sets a mean is over."""
    if not row.details:
        return "1 set" if row.sets == 1 else f"{row.sets} sets"
    return number(row.details.get("n"))


def number(value: object) -> str:
    """A count as people write it: thousands apart, no needless decimals; empty for what is not a number."""
    return f"{value:,.10g}" if isinstance(value, int | float) else ""


def _notes(summary: Summary) -> Iterator[str]:
    if any(row.apart for row in (*summary.sets, *summary.totals, *(group.mean for group in summary.groups))):
        yield "* the intervals before and after do not overlap"
    yield from (f"! {clean(text)}" for text in summary.warnings)


def markdown(
    after: Mapping[str, Any],
    before: Mapping[str, Any] | None = None,
    log: Sequence[Mapping[str, Any]] | None = None,
    published: Published | None = None,
) -> str:
    """The report without pictures: the result in words, the table, what was measured and with what.

    Raises InputError for a results format this version does not read.
    """
    summary = summarize(after, before, published)
    blocks = [f"# Results on {plain(summary.suite)}", plain(sentence(summary)), *(plain(text) for text in summary.warnings)]
    if after.get("description"):
        blocks += ["## What this benchmark is", plain(after["description"])]
    blocks += ["## Scores", "\n".join(_markdown_table(summary))]
    blocks += [f"{plain(summary.metric)} in %, 95 % intervals in brackets. A change in bold: the two intervals do not overlap."]
    if published:
        blocks += ["## Beside published models", *beside.lines(beside.beside(after, before, published))]
    if sizes := smaller.sizes(after):
        blocks += ["## Smaller vectors", *smaller.markdown(sizes)]
    if log:
        blocks += ["## Training", "\n".join(_training(log))]
    blocks += ["## Provenance", "\n".join(f"- {plain(key)}: {code(value)}" for key, value in provenance(after, before))]
    return "\n\n".join(blocks) + "\n"


def score_table(results: Mapping[str, Any]) -> str:
    """The scores alone as a table in Markdown. Raises InputError for a results format this version does not read."""
    return "\n".join(_markdown_table(summarize(results)))


def _markdown_table(summary: Summary) -> Iterator[str]:
    columns = _columns(summary)
    best = ["best published"] if any(row.best for row in summary.sets) else []
    body = []
    for group in summary.groups:
        body.append(_markdown_row(group.mean, columns, META_TASKS.get(group.mean.key, group.mean.key)))
        body += [_markdown_row(row, columns) for row in group.sets]
    body += [_markdown_row(row, columns, row.title) for row in summary.totals]
    yield from rows(["set", "split", *columns, *best], [cells if best else cells[:-1] for cells in body], left=2)


def _markdown_row(row: Row, columns: Sequence[str], mean_of: str | None = None) -> list[str]:
    cells = [" ".join(_cell(row, column).split()).replace("[ ", "[") for column in columns]
    if "change" in columns and row.apart:
        at = columns.index("change")
        cells[at] = f"**{cells[at].rstrip('*')}**"
    name = plain(row.title) if mean_of is None else f"**{plain(mean_of)}**"
    best = f"{percent(row.best.score)} {plain(row.best.model)}" if row.best else ""
    return [name, plain(row.details.get("split", "")), *cells, best]


def _training(log: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield f"- {len(log)} logged steps, the last is step {log[-1].get('step')}"
    for key in ("loss", "accuracy"):
        values = [row[key] for row in log if isinstance(row.get(key), int | float)]
        if values:
            yield f"- {key}: {values[0]:.4g} at the start, {values[-1]:.4g} at the end"


def provenance(after: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> list[tuple[str, str]]:
    """What would have to be the same to get the same numbers again, as (name, value) pairs."""
    model = after["model"]
    found = [("model", model["path"]), ("model fingerprint", model["fingerprint"]), ("recipe digest", model.get("recipe_digest"))]
    if before is not None:
        found.append(("model fingerprint before", before["model"]["fingerprint"]))
    found += [("suite", after["suite"]), ("protocol digest", after["protocol_digest"])]
    if before is not None and before.get("protocol_digest") != after.get("protocol_digest"):
        found.append(("protocol digest before", before.get("protocol_digest")))
    found += [(f"protocol: {key}", _flat(value)) for key, value in after["protocol"].items()]
    found += [(f"{key} version", value) for key, value in after["versions"].items()]
    found += [("timing", _flat(value)) for value in [_timing(after.get("timing") or {})] if value]
    return [(key, _flat(value)) for key, value in found]


def _timing(timing: Mapping[str, Any]) -> dict[str, Any]:
    """The times of the whole evaluation, and of its slowest sets where the results hold the time of each."""
    whole = {key: value for key, value in timing.items() if key != "sets"}
    slowest = sorted(timing.get("sets", {}).items(), key=lambda entry: -entry[1])[:SLOWEST]
    return whole | ({"slowest": {name: f"{seconds:.1f} s" for name, seconds in slowest}} if slowest else {})


def _flat(value: object) -> str:
    if isinstance(value, Mapping) and len(value) > MOST_FLAT:
        return f"{len(value)} values, sha256 {digest(value)[:12]}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flat(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_flat, value))
    return "none" if value is None else str(value)
