"""A comparison in words: for a terminal, at most 100 columns, and as Markdown for a repository."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vlm2vec.compare import LEVEL, Comparison, Contrast, Row
from vlm2vec.report.markup import clean
from vlm2vec.report.plain import code, plain, rows
from vlm2vec.report.summary import META_TASKS, TOTALS, percent

NAME_WIDTH = 27
WIDTHS = (6, 6, 23, 7, 12)
WORDS = {"better": "better", "worse": "worse", "noise": "within noise", "identical": "identical"}
LISTED = 6  # sets named in a sentence


def table(comparison: Comparison) -> str:
    """Aligned plain text, a block for every model against the first; no line exceeds 100 columns."""
    lines = [f"{side.letter}  {_cut(side.name, 44):<46}{_cut(side.model, 50)}".rstrip() for side in comparison.sides]
    for contrast in comparison.contrasts:
        lines += ["", *_wrapped(sentence(contrast)), "", *_block(contrast, comparison)]
    return "\n".join([*lines, "", *(line for text in notes(comparison) for line in _wrapped(text))]) + "\n"


def _block(contrast: Contrast, comparison: Comparison) -> Iterator[str]:
    heads = (contrast.first.letter, contrast.second.letter, "difference [95 %]     ", "p", "up/down")
    head = "set".ljust(NAME_WIDTH) + "".join(name.rjust(width) for name, width in zip(heads, WIDTHS, strict=True))
    rule = "-" * 96
    yield from (head, rule)
    for mean, members in grouped(contrast):
        yield _text_row(mean, META_TASKS.get(mean.key, mean.key))
        yield from (_text_row(row, row.key, "  ") for row in members)
    yield rule
    yield from (_text_row(row, TOTALS[row.key]) for row in totals(contrast))


def grouped(contrast: Contrast) -> Iterator[tuple[Row, list[Row]]]:
    """The mean of every meta-task with its sets."""
    for mean in contrast.means:
        members = [row for row in contrast.sets if row.meta_task == mean.key]
        if members:
            yield mean, members


def totals(contrast: Contrast) -> list[Row]:
    return [row for row in contrast.means if row.key in TOTALS]


def _text_row(row: Row, name: str, indent: str = "") -> str:
    low, high = (percent(end, signed=True) for end in row.interval)
    gap = f"{percent(row.difference, signed=True)} [{low:>5}, {high:>5}]"
    flips = f"{row.won}/{row.lost}"
    cells = (percent(row.first), percent(row.second), gap, probability(row), flips)
    numbers = "".join(cell.rjust(width) for cell, width in zip(cells, WIDTHS, strict=True))
    name = indent + _cut(name, NAME_WIDTH - len(indent))
    return f"{name:<{NAME_WIDTH}}{numbers}  {WORDS[row.verdict]}"


def probability(row: Row) -> str:
    """The p-value that the verdict rests on."""
    p = row.p if row.p_holm is None else row.p_holm
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _cut(text: str, width: int) -> str:
    text = " ".join(clean(text).split())
    return text if len(text) <= width else text[: width - 1] + "~"


def _wrapped(text: str, width: int = 100) -> list[str]:
    """Lines of whole words, a word longer than a line cut."""
    lines = [""]
    for word in clean(text).split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {_cut(word, width)}".strip()
    return lines


def sentence(contrast: Contrast) -> str:
    """The outcome in words: the overall difference and whether it is more than noise, then which sets differ."""
    first, second, row = contrast.first.letter, contrast.second.letter, contrast.headline
    if all(each.verdict == "identical" for each in contrast.sets):
        return f"{second} and {first} are identical: the same score on each of {row.queries:,} queries."
    scores = f"{percent(row.second)} against {percent(row.first)} %"
    low, high = (percent(end, signed=True) for end in row.interval)
    measured = f"({scores}; difference {percent(row.difference, signed=True)} points, 95 % interval {low} to {high}; p {_relation(row)})"
    verdict = {
        "better": f"{second} is better than {first} overall {measured}: more than noise.",
        "worse": f"{second} is worse than {first} overall {measured}: more than noise.",
        "noise": f"The overall difference between {second} and {first} is within noise {measured}.",
        "identical": f"{second} and {first} are identical overall {measured}.",
    }[row.verdict]
    return f"{verdict} {_which(contrast)}"


def _relation(row: Row) -> str:
    text = probability(row)
    return f"< {text[1:]}" if text.startswith("<") else f"= {text}"


def _which(contrast: Contrast) -> str:
    better, worse = contrast.differing("better"), contrast.differing("worse")
    count = len(contrast.sets)
    if not better and not worse:
        return "No set differs beyond noise." if count > 1 else ""
    parts = [f"{word} on {_names(found)}" for word, found in (("better", better), ("worse", worse)) if found]
    return f"Of {count} sets {len(better) + len(worse)} differ beyond noise: {contrast.second.letter} is {', '.join(parts)}."


def _names(found: Sequence[Row]) -> str:
    names = [row.key for row in found[:LISTED]]
    return ", ".join(names) + (f" and {len(found) - LISTED} more" if len(found) > LISTED else "")


def notes(comparison: Comparison) -> Iterator[str]:
    """How to read the numbers, what was left out, what was forced."""
    count = len(comparison.contrasts[0].sets)
    yield (
        f"p: two-sided, by random signs of the paired differences ({comparison.draws:,} draws, seed {comparison.seed}), exact where a "
        f"set is scored by hits. Beyond noise is below {LEVEL}. For sets p is corrected by Holm's method for {count} of them; p of "
        "means and all intervals are not corrected. up/down: queries that scored higher and lower. Only queries vary, not training runs."
    )
    if comparison.left_out:
        listed = ", ".join(f"{name} (only {letters})" for name, letters in comparison.left_out.items())
        yield f"! Left out, and in no mean here: {listed}."
    if comparison.forced:
        yield f"! Not measured alike, compared by force: {'; '.join(comparison.forced)}."


def markdown(comparison: Comparison) -> str:
    """The comparison without pictures."""
    blocks = [f"# {title(comparison)}"]
    blocks += ["\n".join(f"- {side.letter}: {code(side.name)}, model {code(side.model)}" for side in comparison.sides)]
    for contrast in comparison.contrasts:
        blocks += [f"## {contrast.second.letter} against {contrast.first.letter}", plain(sentence(contrast))]
        blocks += ["\n".join(_markdown_table(contrast))]
    return "\n\n".join([*blocks, *(plain(text) for text in notes(comparison))]) + "\n"


def title(comparison: Comparison) -> str:
    letters = [side.letter for side in comparison.sides]
    return f"{', '.join(letters[:-1])} and {letters[-1]} on {plain(comparison.suite)}"


def _markdown_table(contrast: Contrast) -> Iterator[str]:
    heads = ["set", contrast.first.letter, contrast.second.letter, "difference", "95 % interval", "p", "up", "down", "verdict"]
    body = []
    for mean, members in grouped(contrast):
        body += [
            _markdown_row(mean, f"**{plain(META_TASKS.get(mean.key, mean.key))}**"),
            *(_markdown_row(row, plain(row.key)) for row in members),
        ]
    body += [_markdown_row(row, f"**{TOTALS[row.key]}**") for row in totals(contrast)]
    yield from rows(heads, body)


def _markdown_row(row: Row, name: str) -> list[str]:
    low, high = (percent(end, signed=True) for end in row.interval)
    gap = percent(row.difference, signed=True)
    verdict = WORDS[row.verdict]
    marked = f"**{verdict}**" if row.verdict in ("better", "worse") else verdict
    return [
        name,
        percent(row.first),
        percent(row.second),
        gap,
        f"{low} to {high}",
        probability(row),
        f"{row.won:,}",
        f"{row.lost:,}",
        marked,
    ]
