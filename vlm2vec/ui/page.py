"""The page, and the part of it that a search replaces. All that comes from outside is escaped by `report.markup`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from urllib.parse import urlencode

from vlm2vec.data.images import load_image
from vlm2vec.data.types import ImageRef
from vlm2vec.index import Hit
from vlm2vec.report.gallery import shorten
from vlm2vec.report.markup import Markup, breakable, el, escape, join
from vlm2vec.report.thumbnails import LEVELS, inline, shrunk, webp
from vlm2vec.ui.search import LONGEST, MOST, Answer, Question, Searcher

EXAMPLES = ("something to eat", "a person at work", "a map or a chart")
SHOWN = 8  # items to begin with
UPLOAD = 32_000_000  # bytes of a picture that is sent
SIDE = 320  # of the pictures in the results
STATIC = {
    "page.css": ("vlm2vec.report", "text/css"),
    "ui.css": ("vlm2vec.ui", "text/css"),
    "ui.js": ("vlm2vec.ui", "text/javascript"),
}


def static() -> dict[str, tuple[bytes, str]]:
    """What the page loads: content and media type by name."""
    return {name: (files(package).joinpath(name).read_bytes(), kind) for name, (package, kind) in STATIC.items()}


def page(searcher: Searcher, question: Question, results: Markup) -> str:
    """The whole page with the question in its form and the results below it."""
    meta = searcher.index.meta
    values = {
        "title": f"Search {searcher.index.folder.name}",
        "name": searcher.index.folder.name,
        "about": f"{meta['items']:,} items, found by meaning with {'/'.join(Path(meta['loading']['path']).parts[-2:])}",
        "limit": UPLOAD,
        "longest": LONGEST,
        "most": MOST,
        "text": question.text,
        "instruction": searcher.instruction if question.instruction is None else question.instruction,
        "top": searcher.top if question.top is None else question.top,
    }
    template = Template(files("vlm2vec.ui").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute({key: escape(value) for key, value in values.items()}, results=results)


def answered(answer: Answer) -> Markup:
    """The results, under the question."""
    found = f"{len(answer.hits):,} nearest items" if answer.hits else "The index has no items to show"
    heading = el("h2", found, " ", *_asked(answer))
    return join(heading, el("ol", *(_card(rank, hit, answer.question) for rank, hit in enumerate(answer.hits, 1)), class_="hits"))


def failed(message: str) -> Markup:
    """What went wrong, in the place of results."""
    return el("div", el("h2", "That did not work"), el("p", message), class_="warning", role="alert")


def beginning(hits: Sequence[Hit]) -> Markup:
    """What to do, while nothing was asked: example queries, and items to start from."""
    if not hits:
        return el("p", "This index has no items yet. Run vlm2vec index again once there are some.", class_="lede")
    texts = [" ".join(hit.text.split())[:60] for hit in hits if hit.text.strip()][:3]
    tries = (el("li", el("a", words, href=_address(text=words), class_="chip")) for words in texts or EXAMPLES)
    return join(
        el("p", "Say what you are looking for in plain words, drop a picture anywhere on this page, or both.", class_="lede"),
        el("ul", *tries, class_="chips", aria_label="Example queries"),
        el("h2", "Or start from one of these"),
        el("ul", *(_start(hit) for hit in hits), class_="hits starts"),
    )


def plain(answer: Answer) -> dict[str, object]:
    """An answer as JSON; pictures are addresses below this page."""
    return {"results": [_plain(rank, hit) for rank, hit in enumerate(answer.hits, 1)]}


def _plain(rank: int, hit: Hit) -> dict[str, object]:
    pictures = [_picture(hit, number) for number in range(_pictures(hit))]
    about = {"id": hit.id, "row": hit.number, "text": hit.text, "instruction": hit.instruction}
    return {"rank": rank, "score": hit.score, **about, "pictures": pictures, "like": hit.place}


def _asked(answer: Answer) -> list[Markup]:
    if answer.like is not None:
        return [el("span", "to ", el("em", answer.like.id), class_="of"), _face(answer.like)]
    text, picture = shorten(answer.question.text.strip()), answer.question.picture
    words = [el("em", text)] if text else []
    if not picture:
        return [el("span", "to ", *words, class_="of")]
    return [el("span", "to ", *words, " and this picture" if text else "this picture", class_="of"), _own(picture)]


def _own(data: bytes) -> Markup:
    small = shrunk(load_image(ImageRef(data, "the picture")), LEVELS[0][0])
    shown = inline(webp(small, LEVELS[0][1]), *small.size)
    return el("span", el("img", src=shown.uri, alt="", width=shown.width, height=shown.height), class_="frame")


def _card(rank: int, hit: Hit, question: Question) -> Markup:
    more = _address(like=hit.place, top=question.top)
    width = f"{max(0.0, min(1.0, hit.score)):.1%}"
    score = el("svg", el("rect", width=width, height="100%"), class_="score-bar", aria_hidden="true")
    opened = (
        el("a", "Open" if _pictures(hit) == 1 else f"Open {number + 1}", href=_picture(hit, number), target="_blank", rel="noopener")
        for number in range(_pictures(hit))
    )
    return el(
        "li",
        el("a", _face(hit), href=more, class_="face", tabindex="-1", aria_hidden="true") if _pictures(hit) else None,
        el("p", shorten(hit.text), dir="auto", class_="text") if hit.text.strip() else None,
        el("div", el("span", f"{rank}.", class_="soft"), el("span", breakable(hit.id), class_="id"), class_="name"),
        el("div", score, el("span", el("span", "score ", class_="unseen"), f"{hit.score:.3f}"), class_="score"),
        el("div", el("a", "More like this", el("span", f": {hit.id}", class_="unseen"), href=more, class_="more"), *opened, class_="do"),
    )


def _start(hit: Hit) -> Markup:
    shown = _face(hit) if _pictures(hit) else el("p", shorten(hit.text), dir="auto", class_="text")
    return el("li", el("a", shown, href=_address(like=hit.place), class_="face", aria_label=f"More like {hit.id}"))


def _face(hit: Hit) -> Markup:
    if not _pictures(hit):
        return join()
    return el("span", el("img", src=_picture(hit, 0, SIDE), alt=f"{hit.id}", loading="lazy", decoding="async"), class_="frame")


def _pictures(hit: Hit) -> int:
    return len(hit.images) or int(hit.thumbnail is not None)


def _picture(hit: Hit, number: int, side: int | None = None) -> str:
    options = urlencode({key: value for key, value in (("number", number), ("size", side)) if value})
    return f"/picture/{hit.place}" + (f"?{options}" if options else "")


def _address(**values: object) -> str:
    return "/?" + urlencode({key: value for key, value in values.items() if value is not None})
