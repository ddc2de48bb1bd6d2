"""The scores on the page: a headline, a forest plot, and the table that holds every number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlm2vec.report import charts
from vlm2vec.report.blocks import folded, scrolling
from vlm2vec.report.markup import Markup, breakable, el, join
from vlm2vec.report.summary import Row, Score, Summary, percent
from vlm2vec.report.tables import number, size

APART = "* the intervals before and after do not overlap."
SCALE = (0, 25, 50, 75, 100)
FOLD_ABOVE = 20  # sets
Anchors = Mapping[str, str]


def tiles(summary: Summary) -> Markup:
    """The headline and the mean of each meta-task in large figures."""
    head = summary.headline
    first = [_tile(f"{head.title.partition(',')[0]} mean", head, "tile first")] if head else []
    return el("div", *first, *(_tile(group.mean.title, group.mean, "tile") for group in summary.groups), class_="tiles")


def _tile(name: str, row: Row, style: str) -> Markup:
    was = f"was {percent(row.before.value)} · " if row.before else ""
    return el(
        "div",
        el("p", name, class_="name"),
        el("p", percent(row.after.value if row.after else None), el("span", " %", class_="unit"), class_="figure"),
        el("p", f"{was}chance {percent(row.chance)}", class_="soft"),
        class_=style,
    )


def forest(summary: Summary, anchors: Anchors) -> Markup:
    """Every score as a mark with its interval on a scale from 0 to 100 %, before above after; the numbers stand beside them as text."""
    bunches = [join(_forest_row(group.mean, anchors), *(_forest_row(row, anchors) for row in group.sets)) for group in summary.groups]
    totals = join(*(_forest_row(row, anchors) for row in summary.totals))
    scale = el("div", *(el("span", f"{mark} %" if mark == SCALE[-1] else mark) for mark in SCALE), class_="scale", aria_hidden="true")
    return el(
        "figure",
        el("figcaption", el("span", f"{summary.metric} in %", class_="key"), *_legend(summary)),
        scale,
        *(el("div", rows, class_="bunch") for rows in (*bunches, totals) if rows),
        scale,
        class_="forest" if summary.compared else "forest single",
    )


def _legend(summary: Summary) -> list[Markup]:
    dot, diamond = {"cx": 8, "cy": 8, "r": 4.5}, "M8 1.5L14.5 8L8 14.5L1.5 8Z"
    keys = [(el("circle", **dot, class_="point before"), "before training")] if summary.compared else []
    keys += [
        (el("circle", **dot, class_="point after"), "after training" if summary.compared else "score"),
        (el("path", d=diamond, class_="point after"), "mean of sets"),
        (el("line", x1=8, x2=8, y1=1, y2=15, class_="chance"), "chance"),
    ]
    if any(row.best for row in summary.sets):
        keys.append((el("path", d="M8 0V16", class_="best"), "best published"))
    drawn = [el("span", _glyph(shape), " ", words, class_="key") for shape, words in keys]
    return drawn + [el("span", words, class_="key") for words in ("whiskers: 95 % interval", *([APART] if summary.compared else []))]


def _glyph(shape: Markup) -> Markup:
    return el("svg", shape, width=16, height=16, viewBox="0 0 16 16", aria_hidden="true", focusable="false")


def _forest_row(row: Row, anchors: Anchors) -> Markup:
    title = breakable(row.title)
    name = el("a", title, href=f"#{anchors[row.key]}") if row.examples else title
    split = el("span", row.details["split"], class_="split") if row.details else None
    value = [el("b", percent(row.after.value if row.after else None)), el("span", interval(row.after), class_="soft interval")]
    if row.change is not None:
        value.append(el("span", _change(row), class_="change"))
    parts = (el("span", name, " ", split, class_="name"), charts.track(row), el("span", *value, class_="value"))
    return el("div", *parts, class_="row" if row.details else "row mean")


def _change(row: Row) -> str:
    return percent(row.change, signed=True) + ("*" if row.apart else "")


def interval(score: Score | None) -> str:
    """Both ends in per cent, or nothing."""
    return "" if score is None or score.low is None else f"{percent(score.low)}\N{EN DASH}{percent(score.high)}"


def table(summary: Summary, anchors: Anchors) -> Markup:
    """Every number; folded where there are many sets, since the drawing above names them all already."""
    scores = ["Before", "After", "Change"] if summary.compared else ["Score"]
    best = ["Best published"] if any(row.best for row in summary.sets) else []
    heads = ["Set", "Split", *scores, *best, "Chance", "Queries", "Candidates", "Ties", *(["Best published by"] if best else [])]
    words = f"{summary.metric} in %, with 95 % intervals. {APART if summary.compared else ''}".strip()
    blocks = [*((group.mean, *group.sets) for group in summary.groups), summary.totals]
    bodies = [[_table_row(row, summary.compared, bool(best)) for row in rows] for rows in blocks if rows]
    box = scrolling("All scores as a table", words, heads, bodies, (0, 1, len(heads) - 1) if best else (0, 1))
    return box if len(summary.sets) <= FOLD_ABOVE else folded("All scores as a table", box)


def more(summary: Summary) -> Markup | None:
    """The other metrics of every set, folded; nothing where the results have none."""
    names = [name for name in dict.fromkeys(name for row in summary.sets for name in row.details.get("metrics", {}))]
    if not names:
        return None
    bodies = [[_metrics_row(row, names) for row in group.sets] for group in summary.groups]
    words = "All in %. With one right candidate per query some of them say the same."
    return folded("Other metrics", scrolling("Other metrics as a table", words, ["Set", "Split", *names], bodies))


def _metrics_row(row: Row, names: Sequence[str]) -> Markup:
    values = [row.details.get("metrics", {}).get(name) for name in names]
    return _line(row, *(el("td", percent(value), class_="num") for value in values))


def _table_row(row: Row, compared: bool, with_best: bool) -> Markup:
    scores = [_table_score(row.before), _table_score(row.after), _change(row)] if compared else [_table_score(row.after)]
    best = [percent(row.best.score) if row.best else ""] if with_best else []
    counts = [percent(row.chance), size(row), number(row.details.get("candidates")), number(row.details.get("ties"))]
    who = [el("td", row.best.model if row.best else "", class_="from")] if with_best else []
    return _line(row, *(el("td", cell, class_="num") for cell in (*scores, *best, *counts)), *who)


def _line(row: Row, *cells: Markup) -> Markup:
    name = el("th", breakable(row.title), scope="row")
    return el("tr", name, el("td", row.details.get("split", "")), *cells, class_=None if row.details else "mean")


def _table_score(score: Score | None) -> Markup:
    ends = interval(score)
    return join(el("b", percent(score.value if score else None)), el("span", " ", ends, class_="soft interval") if ends else None)
