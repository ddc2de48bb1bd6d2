"""Parts of a page that several sections are made of."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from vlm2vec.report.markup import Markup, el


def scrolling(name: str, caption: str, heads: Sequence[str], bodies: Sequence[Sequence[Markup]], words: Collection[int] = (0, 1)) -> Markup:
    """A table in a box that scrolls sideways by itself where the screen is narrow; all columns but those of `words` are numbers."""
    head = el("tr", *(el("th", title, scope="col", class_=None if index in words else "num") for index, title in enumerate(heads)))
    whole = el("table", el("caption", el("span", caption)), el("thead", head), *(el("tbody", *rows) for rows in bodies))
    return el("div", whole, class_="scroll", tabindex=0, role="region", aria_label=name)


def folded(title: str, content: Markup) -> Markup:
    """Something to be unfolded by who wants it; print shows it."""
    return el("details", el("summary", el("h3", title)), content, class_="fold")
