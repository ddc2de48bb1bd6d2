"""What a search found as one page: each query with its picture, and the items nearest to it, best first."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlm2vec.data.images import load_image
from vlm2vec.data.types import Item
from vlm2vec.index import Hit
from vlm2vec.report.gallery import face, shorten
from vlm2vec.report.markup import Markup, breakable, el, join
from vlm2vec.report.page import fact_list, page
from vlm2vec.report.thumbnails import LEVELS, Thumbnail, inline, shrunk, thumbnails, webp

Asked = tuple[Item, Sequence[Hit]]


def render(meta: Mapping[str, Any], asked: Sequence[Asked], instruction: str, approximately: bool) -> str:
    """The whole page, asking the network for nothing. `meta` are the settings of the index; a picture that is gone becomes a card."""
    root = Path(meta["root"])
    shown = [hit for _, hits in asked for hit in hits]
    pictures = thumbnails((_below(hit, root) for hit in shown if hit.images), root)
    pictures |= {_label(hit): _inlined(hit.thumbnail) for hit in shown if hit.thumbnail}
    sections: list[tuple[str, str, str, Markup | None]] = []
    for number, (item, hits) in enumerate(asked, 1):
        name, heading = (f"{number}. {_words(item)}"[:60], _words(item)) if len(asked) > 1 else ("Items", "The nearest items")
        sections.append((f"query-{number}", name, heading, _results(item, hits, root, pictures)))
    sections.append(("about", "About", "How this was found", _about(meta, instruction, approximately)))
    return page(f"Search: {_words(asked[0][0])}", _header(meta, asked), sections)


def _header(meta: Mapping[str, Any], asked: Sequence[Asked]) -> Markup:
    what = el("em", _words(asked[0][0])) if len(asked) == 1 else f"{len(asked):,} queries"
    lede = f"The nearest of {meta['items']:,} items, best first, each with its cosine similarity."
    return join(el("p", "vlm2vec search", class_="kicker"), el("h1", what), el("p", lede, class_="lede"))


def _words(item: Item) -> str:
    return shorten(item.text.strip()) or "A picture"


def _results(item: Item, hits: Sequence[Hit], root: Path, pictures: Mapping[str, Thumbnail]) -> Markup:
    own = {str(number): small for number, ref in enumerate(item.images) if (small := _small(load_image(ref)))}
    faces = [face({"text": "", "image": number}, own, "", "query") for number in own]
    asked = el("div", *(el("div", each, class_="asked") for each in faces), class_="asking") if faces else None
    return join(asked, el("ol", *(_card(rank, hit, root, pictures) for rank, hit in enumerate(hits, 1)), class_="hits"))


def _card(rank: int, hit: Hit, root: Path, pictures: Mapping[str, Thumbnail]) -> Markup:
    image = _below(hit, root) if hit.images else _label(hit) if hit.thumbnail else None
    foot = el("div", el("span", f"{rank}.", class_="soft"), " ", el("b", f"{hit.score:.3f}"), class_="score")
    shown = face({"text": hit.text, "image": image}, pictures, "", f"rank {rank}")
    return el("li", shown, foot, el("div", breakable(hit.id), class_="soft"))


def _below(hit: Hit, root: Path) -> str:
    return hit.images[0].relative_to(root).as_posix()


def _label(hit: Hit) -> str:
    return f"row {hit.number}"


def _small(picture: Image.Image) -> Thumbnail:
    small = shrunk(picture, LEVELS[0][0])
    return inline(webp(small, LEVELS[0][1]), *small.size)


def _inlined(data: bytes | None) -> Thumbnail:
    assert data is not None
    with Image.open(io.BytesIO(data), formats=["WEBP"]) as picture:
        return inline(data, *picture.size)


def _about(meta: Mapping[str, Any], instruction: str, approximately: bool) -> Markup:
    lists = meta["approximate"]
    how = f"Approximate: {lists['recall']:.1%} of the true best ten, measured when the lists were made" if approximately else "Exact"
    facts = [
        ("Search", how),
        ("Model", el("code", meta["loading"]["path"])),
        ("Instruction of queries", instruction or "none"),
        ("Instruction of items", meta["instruction"] or "none"),
        ("Items", f"{meta['items']:,} of {meta['source']}"),
    ]
    return fact_list(facts, "facts full")
