"""Text for Markdown: made inert, and numbers and tables as rows of cells."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from vlm2vec.report.markup import clean


def plain(text: object) -> str:
    """The text with everything Markdown or HTML would act on made inert; paragraphs are kept, other line breaks are not."""
    paragraphs = re.split(r"\n\s*\n", clean(text).strip())
    return "\n\n".join(re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", " ".join(paragraph.split())) for paragraph in paragraphs)


def code(value: object) -> str:
    """As code, in a fence longer than any run of backticks inside."""
    text = " ".join(clean(value).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def rows(heads: Sequence[str], body: Sequence[Sequence[str]], left: int = 1) -> Iterator[str]:
    """A Markdown table; the first `left` columns are aligned left, the others right. Cells are Markdown already."""
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * left + "---:|" * (len(heads) - left)
    yield from (f"| {' | '.join(cells)} |" for cells in body)
