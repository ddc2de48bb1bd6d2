"""A comparison as one page: differences with their intervals, and the queries that only one of the models got right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm2vec.compare import Comparison, Contrast, Flip, Row, Side, flips, to_json
from vlm2vec.io import write_atomic, write_json
from vlm2vec.report.blocks import folded, scrolling
from vlm2vec.report.contrast import WORDS, grouped, markdown, notes, probability, sentence, totals
from vlm2vec.report.gallery import Shared, answer, folding, question, share
from vlm2vec.report.markup import Markup, breakable, el, join
from vlm2vec.report.page import fact_list, page
from vlm2vec.report.summary import META_TASKS, TOTALS, percent
from vlm2vec.report.thumbnails import Thumbnail, thumbnails
from vlm2vec.results import Measured

SHOWN = 3  # queries that flipped each way, per set, and candidates of each model
TICKS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)  # where the scale may end, as fractions
DRAWN = """Up to three queries of each set that only one of the two models got right, drawn with a fixed seed.
Each query stands beside the three candidates that each of the two found nearest, best first. The gold candidate has a frame and a star."""


@dataclass(frozen=True)
class Shown:
    """The flips of one set that the page shows, under its row."""

    row: Row
    flips: tuple[Flip, ...]


def write_comparison(
    folder: Path, comparison: Comparison, measured: Sequence[Measured], html: bool = False, images_root: Path | None = None
) -> dict[str, Path]:
    """Write `comparison.json` and `comparison.md`, and with `html` `comparison.html`, into `folder`; returns their paths by kind.

    `measured` are the evaluations in the order of the comparison's sides, `images_root` the folder that their pictures' paths start from.
    Raises EnvError if the storage fails.
    """
    paths = {"json": folder / "comparison.json", "markdown": folder / "comparison.md"}
    write_json(paths["json"], to_json(comparison))
    write_atomic(paths["markdown"], markdown(comparison))
    if html:
        paths["html"] = folder / "comparison.html"
        write_atomic(paths["html"], render(comparison, measured, images_root))
    return paths


def render(comparison: Comparison, measured: Sequence[Measured], images_root: Path | None = None) -> str:
    """The whole page. Equal inputs, with the same Pillow, give equal bytes."""
    by_letter = {side.letter: each for side, each in zip(comparison.sides, measured, strict=True)}
    shown = [_shown(contrast, by_letter) for contrast in comparison.contrasts]
    pictures = thumbnails((path for found in shown for each in found for path in _pictures(each)), images_root)
    sections: list[tuple[str, str, str, Markup | None]] = []
    for contrast, found in zip(comparison.contrasts, shown, strict=True):
        letter, name = contrast.second.letter, f"{contrast.second.letter} against {contrast.first.letter}"
        sections.append((f"scores-{letter}", name, name, _scores(contrast)))
        gallery = join(el("p", DRAWN, class_="prose"), *_gallery(contrast, found, pictures)) if found else None
        sections.append((f"flips-{letter}", f"Flips of {letter}", f"What only {contrast.first.letter} or only {letter} got right", gallery))
    sections.append(("notes", "Notes", "How to read this", el("div", *(el("p", text) for text in notes(comparison)), class_="prose")))
    return page(f"{comparison.suite}: comparison", _header(comparison), sections)


def _header(comparison: Comparison) -> Markup:
    warnings = [text.removeprefix("! ") for text in notes(comparison) if text.startswith("! ")]
    return join(
        el("p", "vlm2vec comparison", class_="kicker"),
        el("h1", f"{len(comparison.sides)} models on ", el("em", comparison.suite)),
        *(el("p", sentence(contrast), class_="lede") for contrast in comparison.contrasts),
        *(el("p", text, class_="warning") for text in warnings),
        fact_list([(side.letter, _side(side)) for side in comparison.sides], "facts full"),
    )


def _side(side: Side) -> Markup:
    return join(el("code", side.name), el("br"), el("span", side.model, class_="soft"))


# -- differences -------------------------------------------------------------------------------------------------------------------------


def _scores(contrast: Contrast) -> Markup:
    limit = scale_of([*contrast.sets, *contrast.means])
    bunches = [join(_forest_row(mean, limit), *(_forest_row(row, limit) for row in members)) for mean, members in grouped(contrast)]
    bunches.append(join(*(_forest_row(row, limit) for row in totals(contrast))))
    first, second = contrast.first.letter, contrast.second.letter
    marks = (percent(share * limit, signed=True) for share in (-1, -0.5, 0, 0.5, 1))
    scale = el("div", *(el("span", mark) for mark in marks), class_="scale", aria_hidden="true")
    caption = f"Difference in points with its 95 % interval. Right of 0 {second} is better, left of it {first}; grey is within noise."
    drawn = [el("div", rows, class_="bunch") for rows in bunches]
    figure = el("figure", el("figcaption", el("span", caption, class_="key")), scale, *drawn, scale, class_="forest contrast")
    return join(figure, folded("All numbers as a table", _table(contrast)))


def scale_of(found: Sequence[Row]) -> float:
    """Where the scale ends on both sides: the first round number that holds every interval."""
    widest = max(abs(end) for row in found for end in row.interval)
    return min((tick for tick in TICKS if tick >= widest), default=TICKS[0])


def _forest_row(row: Row, limit: float) -> Markup:
    is_mean = row.p_holm is None
    title = TOTALS.get(row.key, META_TASKS.get(row.key, row.key)) if is_mean else row.key
    split = el("span", row.split, class_="split") if row.split else None
    low, high = (percent(end, signed=True) for end in row.interval)
    value = [
        el("b", percent(row.difference, signed=True)),
        el("span", f"{low} to {high}", class_="soft interval"),
        el("span", WORDS[row.verdict], class_=f"change {row.verdict}"),
    ]
    parts = (el("span", breakable(title), " ", split, class_="name"), _track(row, limit, is_mean), el("span", *value, class_="value"))
    return el("div", *parts, class_="row mean" if is_mean else "row")


def _track(row: Row, limit: float, is_mean: bool) -> Markup:
    low, middle, high = (_x(value, limit) for value in (row.interval[0], row.difference, row.interval[1]))
    lines = [el("line", x1=f"{mark}%", x2=f"{mark}%", y1="0", y2="100%", class_="grid") for mark in (0, 25, 75, 100)]
    zero = el("line", x1="50%", x2="50%", y1="0", y2="100%", class_="axis")
    whisker = el("line", x1=low, x2=high, y1="50%", y2="50%", class_=f"whisker {row.verdict}")
    style = f"point {row.verdict}"
    if is_mean:
        point = el("svg", el("path", d="M-6.5 0L0-6.5L6.5 0L0 6.5Z", class_=style), x=middle, y="50%", overflow="visible")
    else:
        point = el("circle", cx=middle, cy="50%", r="4.5", class_=style)
    return el("svg", *lines, zero, whisker, point, class_="track", aria_hidden="true", focusable="false")


def _x(value: float, limit: float) -> str:
    return f"{50 + 50 * max(-1.0, min(1.0, value / limit)):.2f}%"


def _table(contrast: Contrast) -> Markup:
    heads = [
        "Set",
        "Split",
        contrast.first.letter,
        contrast.second.letter,
        "Difference",
        "p",
        "p (Holm)",
        "Up",
        "Down",
        "Queries",
        "Verdict",
    ]
    blocks = [[mean, *members] for mean, members in grouped(contrast)]
    bodies = [[_table_row(row) for row in rows] for rows in [*blocks, totals(contrast)]]
    words = "Scores in %, the difference with its 95 % interval; p of means is not corrected."
    return scrolling("All numbers as a table", words, heads, bodies, (0, 1, len(heads) - 1))


def _table_row(row: Row) -> Markup:
    is_mean = row.p_holm is None
    name = TOTALS.get(row.key, META_TASKS.get(row.key, row.key)) if is_mean else row.key
    low, high = (percent(end, signed=True) for end in row.interval)
    gap = join(el("b", percent(row.difference, signed=True)), el("span", f" {low} to {high}", class_="soft"))
    numbers = [percent(row.first), percent(row.second), gap, f"{row.p:.2g}", "" if is_mean else probability(row)]
    counts = [f"{count:,}" for count in (row.won, row.lost, row.queries)]
    cells = [el("td", cell, class_="num") for cell in (*numbers, *counts)]
    verdict = el("td", WORDS[row.verdict], class_=f"from {row.verdict}")
    return el("tr", el("th", breakable(name), scope="row"), el("td", row.split or ""), *cells, verdict, class_="mean" if is_mean else None)


# -- flips -------------------------------------------------------------------------------------------------------------------------------


def _shown(contrast: Contrast, measured: Mapping[str, Measured]) -> list[Shown]:
    first, second = measured[contrast.first.letter], measured[contrast.second.letter]
    found = [Shown(row, tuple(flips(first, second, row.key, SHOWN))) for _, members in grouped(contrast) for row in members]
    return [each for each in found if each.flips]


def _both(flip: Flip) -> list[Mapping[str, Any]]:
    """The two predictions, cut to what is shown of them."""
    return [{**prediction, "retrieved": prediction["retrieved"][:SHOWN], "gold": None} for prediction in (flip.first, flip.second)]


def _pictures(shown: Shown) -> Iterator[str]:
    for flip in shown.flips:
        items = [flip.first["query"], *(item for prediction in _both(flip) for item in prediction["retrieved"])]
        yield from (item["image"] for item in items if item.get("image"))


def _gallery(contrast: Contrast, shown: Sequence[Shown], pictures: Mapping[str, Thumbnail]) -> Iterator[Markup]:
    task = None
    for each in shown:
        if each.row.meta_task != task:
            task = each.row.meta_task
            yield el("h3", META_TASKS.get(str(task), task))
        shared = share([prediction for flip in each.flips for prediction in _both(flip)], pictures)
        sides = ((True, contrast.second), (False, contrast.first))
        columns = [_column(gained, side, each.flips, contrast, shared) for gained, side in sides]
        remark = f"{each.row.split} · {each.row.won:,} up, {each.row.lost:,} down"
        yield folding(each.row.key, remark, shared, columns, None, unfolded=each is shown[0])


def _column(gained: bool, side: Side, found: Sequence[Flip], contrast: Contrast, shared: Shared) -> Markup:
    cards = [_card(flip, contrast, shared) for flip in found if flip.gained is gained]
    words = f"Only {side.letter} is right"
    head = el("p", words, class_="only")
    return el("div", head, *(cards or [el("p", "None.", class_="soft")]), class_="column", role="group", aria_label=words)


def _card(flip: Flip, contrast: Contrast, shared: Shared) -> Markup:
    first, second = _both(flip)
    blocks = [
        el("div", *answer(prediction, shared, side.letter), class_="hit" if prediction["hit"] else "miss")
        for side, prediction in ((contrast.first, first), (contrast.second, second))
    ]
    return el("article", question(flip.first, shared), el("div", *blocks, class_="answer two"), class_="example flip")
