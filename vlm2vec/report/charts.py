"""Drawings as inline SVG: training curves with axes, and one track per row of the forest plot.

Colours, fonts and line widths come from the page's style sheet through classes, so that both colour schemes and print work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from vlm2vec.report.markup import Markup, el, join
from vlm2vec.report.summary import Row, Score, percent

WIDTH, HEIGHT = 340, 220
LEFT, RIGHT, TOP, BOTTOM = 40, 62, 10, 40
MOST_POINTS = 600
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One line of a chart: (step, value) points in order of step, its words and the class that styles it."""

    label: str
    points: Points
    style: str = "first"


@dataclass(frozen=True)
class Frame:
    """Where data lands on the canvas: x in steps, y in the units of the chart; canvas coordinates grow right and down."""

    x0: float
    x1: float
    y0: float
    y1: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x0) / (self.x1 - self.x0)
        up = (y - self.y0) / (self.y1 - self.y0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def series(log: Sequence[Mapping[str, Any]], key: str, label: str = "", style: str = "first") -> Series:
    """The finite values of one key of the training log; rows without it are passed over."""
    found = [(float(row["step"]), float(row[key])) for row in log if isinstance(row.get(key), int | float) and math.isfinite(row[key])]
    return Series(label or key, thin(found), style)


def thin(points: Points, most: int = MOST_POINTS) -> Points:
    """At most `most` points, each the mean of equally many neighbours."""
    width = math.ceil(len(points) / most) if points else 1
    if width == 1:
        return points
    buckets = [points[start : start + width] for start in range(0, len(points), width)]
    return [(fmean(x for x, _ in bucket), fmean(y for _, y in bucket)) for bucket in buckets]


def smooth(points: Points) -> Points:
    """A centred moving average over a twentieth of the curve; at both ends, over the half of the window that exists."""
    half = len(points) // 40
    return [(x, fmean(y for _, y in points[max(0, index - half) : index + half + 1])) for index, (x, _) in enumerate(points)]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, spaced by 1, 2 or 5 times a power of ten."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / about * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def curves(
    lines: Sequence[Series], name: str, fixed: tuple[float, float] | None = None, show: Callable[[float], str] = "{:.3g}".format
) -> Markup:
    """A line chart over training steps: each series as measured, faint, under its smoothed form, with the last smoothed value beside it.

    `fixed` sets the ends of the vertical axis; without it the axis spans all values and reaches down to 0 when none is negative.
    """
    values = [y for line in lines for _, y in line.points]
    marks_y = ticks(*(fixed or (min(0.0, *values), max(values))))
    steps = [x for line in lines for x, _ in line.points]
    first, last = min(steps), max(steps)
    frame = Frame(first, last if last > first else first + 1.0, marks_y[0], marks_y[-1])
    marks_x = [mark for mark in ticks(first, frame.x1, 3) if first <= mark <= frame.x1 and mark == int(mark)]
    return el(
        "svg",
        _grid(frame, marks_x, marks_y, show),
        *(_line(frame, line) for line in lines),
        *_endings(frame, lines, show),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        class_="curves",
        role="img",
        aria_label=_description(lines, name, show),
    )


def _grid(frame: Frame, marks_x: Sequence[float], marks_y: Sequence[float], show: Callable[[float], str]) -> Markup:
    parts = []
    for mark in marks_y:
        _, y = frame.at(frame.x0, mark)
        parts.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=_n(y), y2=_n(y), class_="axis" if mark == marks_y[0] else "grid"))
        parts.append(el("text", show(mark), x=LEFT - 8, y=_n(y + 4), class_="tick", text_anchor="end"))
    for mark in marks_x:
        x, y = frame.at(mark, frame.y0)
        parts.append(el("line", x1=_n(x), x2=_n(x), y1=_n(y), y2=_n(y + 4), class_="axis"))
        parts.append(el("text", f"{mark:,g}", x=_n(x), y=_n(y + 18), class_="tick", text_anchor="middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    return join(*parts, el("text", "step", x=_n(middle), y=HEIGHT - 4, class_="tick", text_anchor="middle"))


def _line(frame: Frame, line: Series) -> Markup:
    raw = el("path", d=_path(frame, line.points), class_=f"raw {line.style}")
    return join(raw, el("path", d=_path(frame, smooth(line.points)), class_=f"smooth {line.style}"))


def _path(frame: Frame, points: Points) -> str:
    return "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in (frame.at(*point) for point in points))


def _endings(frame: Frame, lines: Sequence[Series], show: Callable[[float], str]) -> list[Markup]:
    """The last values, and the labels where there is more than one line, kept apart and above the axis."""
    ends = sorted(((frame.at(*smooth(line.points)[-1]), line) for line in lines), key=lambda end: end[0][1])
    places = _places([y for (_, y), _ in ends])
    marks = []
    for ((x, y), line), place in zip(ends, places, strict=True):
        marks.append(el("circle", cx=_n(x), cy=_n(y), r=3.5, class_=f"end {line.style}"))
        marks.append(el("text", show(smooth(line.points)[-1][1]), x=_n(x + 9), y=_n(place + 4), class_="end-value"))
        if len(ends) > 1:
            marks.append(el("text", line.label, x=_n(x + 9), y=_n(place + 18), class_="tick"))
    return marks


def _places(heights: Sequence[float], gap: float = 31.0) -> list[float]:
    """Where to write beside lines that end at these heights, given from the top: `gap` apart, the lowest with room for its label."""
    if len(heights) == 1:
        return list(heights)
    places: list[float] = []
    limit = HEIGHT - BOTTOM - 20.0
    for height in reversed(heights):
        places.insert(0, min(height, limit))
        limit = places[0] - gap
    return places


def _description(lines: Sequence[Series], name: str, show: Callable[[float], str]) -> str:
    parts = []
    for line in lines:
        (first, start), (last, end) = smooth(line.points)[0], smooth(line.points)[-1]
        label = f" ({line.label})" if len(lines) > 1 else ""
        parts.append(f"{name}{label} from {show(start)} at step {first:,.0f} to {show(end)} at step {last:,.0f}")
    return "; ".join(parts) + "."


def track(row: Row) -> Markup:
    """One row of the forest plot from 0 to 100 %: before above, after below, chance dashed, the best published score as a bar.

    The numbers stand beside it as text.
    """
    is_mean = not row.details
    middle = "50%" if row.before is None else "67%"
    parts = [el("line", x1=f"{mark}%", x2=f"{mark}%", y1="0", y2="100%", class_="grid") for mark in (0, 25, 50, 75, 100)]
    if row.chance is not None:
        parts.append(el("line", x1=_x(row.chance), x2=_x(row.chance), y1="12%", y2="88%", class_="chance"))
    if row.best is not None:
        parts.append(el("svg", el("path", d="M0 -8V8", class_="best"), x=_x(row.best.score), y=middle, overflow="visible"))
    parts += [mark for mark in (_mark(row.before, "33%", "before", is_mean), _mark(row.after, middle, "after", is_mean)) if mark]
    return el("svg", *parts, class_="track", aria_hidden="true", focusable="false")


def _mark(score: Score | None, y: str, style: str, is_mean: bool) -> Markup | None:
    """A disc with whiskers for a set; a diamond, which stands in a box of its own to be placed in per cent, for a mean."""
    if score is None:
        return None
    whiskers = None if score.low is None else el("line", x1=_x(score.low), x2=_x(score.high or 0.0), y1=y, y2=y, class_=f"whisker {style}")
    if is_mean:
        diamond = el("path", d="M-6.5 0L0-6.5L6.5 0L0 6.5Z", class_=f"point {style}")
        return join(whiskers, el("svg", diamond, x=_x(score.value), y=y, overflow="visible"))
    return join(whiskers, el("circle", cx=_x(score.value), cy=y, r="4.5", class_=f"point {style}"))


def _x(fraction: float) -> str:
    return f"{percent(fraction)}%"


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
