"""What was retrieved, to be looked at: each query beside its five best candidates.

Hits, misses and the gold candidate are told apart by word and sign, not by colour alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm2vec.report.markup import Markup, el, join
from vlm2vec.report.summary import Group, Row, percent
from vlm2vec.report.thumbnails import Thumbnail

LONGEST = 280  # characters of a text that are shown
SHORTEST_LEAD = 12  # a shared beginning of fewer characters is not worth saying once
PLACEHOLDER = re.compile(r"<\|image_\d+\|>")
CLAUSE_ENDS = (": ", ". ", "? ", "! ", "\n")
GOLD = el("span", "\N{BLACK STAR} gold", class_="tag")
Item = Mapping[str, Any]  # "text", "image" or None; a retrieved one has "score" and "gold" too
Example = Mapping[str, Any]


@dataclass(frozen=True)
class Shared:
    """What the examples of one set have in common: the thumbnails by path, and the words all queries or all candidates begin with.

    `whole` names the side, query or candidate, of which these words are all there is.
    """

    pictures: Mapping[str, Thumbnail]
    query_lead: str
    target_lead: str
    whole: frozenset[str] = frozenset()


def pictures_of(results: Mapping[str, Any]) -> Iterator[str]:
    """The path of every picture the gallery shows, as often as it is shown."""
    for examples in results.get("examples", {}).values():
        for example in examples:
            yield from (item["image"] for item in (example["query"], *_targets(example)) if item.get("image"))


def _targets(example: Example) -> list[Item]:
    return [*example["retrieved"], *([example["gold"]] if _gold_apart(example) else [])]


def _gold_apart(example: Example) -> bool:
    """The results hold the gold item itself and it is not among those retrieved."""
    return bool(example.get("gold")) and not any(item.get("gold") for item in example["retrieved"])


def gallery(groups: Sequence[Group], pictures: Mapping[str, Thumbnail], anchors: Mapping[str, str]) -> Markup:
    """All sets by meta-task. The first set of each meta-task is unfolded; print unfolds all."""
    return join(*(part for group in groups for part in _group(group, pictures, anchors)))


def _group(group: Group, pictures: Mapping[str, Thumbnail], anchors: Mapping[str, str]) -> Iterator[Markup]:
    rows = [row for row in group.sets if row.examples]
    if rows:
        yield el("h3", group.mean.title)
    for row in rows:
        yield _set(row, pictures, anchors[row.key], unfolded=row is rows[0])


def _set(row: Row, pictures: Mapping[str, Thumbnail], anchor: str, unfolded: bool) -> Markup:
    shared = share(row.examples, pictures)
    score = f"{percent(row.after.value)} %" if row.after else "not measured"
    return folding(
        row.title,
        f"{row.details['split']} · {score}",
        shared,
        [_column("Hits", True, row.examples, shared), _column("Misses", False, row.examples, shared)],
        anchor,
        unfolded,
    )


def share(examples: Sequence[Example], pictures: Mapping[str, Thumbnail]) -> Shared:
    """What can be said once for all these examples."""
    queries = [shown_text(example["query"]) for example in examples]
    targets = [shown_text(item) for example in examples for item in _targets(example)]
    same = {"query": set(queries) == {lead(queries)}, "candidate": set(targets) == {lead(targets)}}
    return Shared(pictures, lead(queries), lead(targets), frozenset(who for who, all_of_it in same.items() if all_of_it))


def folding(title: str, remark: str, shared: Shared, columns: Sequence[Markup], anchor: str | None, unfolded: bool) -> Markup:
    """One set of the gallery, to be folded: what all its queries begin with, above columns of cards."""
    leads = [_lead_line("query", shared.query_lead, shared), _lead_line("candidate", shared.target_lead, shared)]
    return el(
        "details",
        el("summary", el("h4", title), el("span", remark, class_="soft")),
        el("div", *leads, class_="leads"),
        el("div", *columns, class_="columns"),
        class_="set",
        id=anchor,
        open=True if unfolded else None,
    )


def _column(word: str, hit: bool, examples: Sequence[Example], shared: Shared) -> Markup:
    cards = [_example(example, shared) for example in examples if example["hit"] is hit]
    none = el("p", f"No {word.lower()} among the examples.", class_="soft")
    return el("div", *(cards or [none]), class_="column", role="group", aria_label=word)


def _lead_line(who: str, words: str, shared: Shared) -> Markup | None:
    if not words:
        return None
    verb = "reads" if who in shared.whole else "begins"
    return el("p", el("span", f"Every {who} {verb}:", class_="soft"), " ", el("q", shorten(words.strip()), dir="auto"))


def shown_text(item: Item) -> str:
    """The item's words without image placeholders, which the picture itself stands for."""
    return PLACEHOLDER.sub("", item.get("text") or "").strip()


def lead(texts: Sequence[str]) -> str:
    """What all texts begin with, up to the end of a clause; equal texts as a whole; nothing for a single text or a few letters."""
    common = os.path.commonprefix(list(texts))
    if set(texts) != {common}:
        common = common[: max(common.rfind(end) + len(end) if end in common else 0 for end in CLAUSE_ENDS)]
    return common if len(texts) > 1 and len(common) >= SHORTEST_LEAD else ""


def _example(example: Example, shared: Shared) -> Markup:
    return el(
        "article",
        question(example, shared),
        el("div", *answer(example, shared), class_="answer"),
        class_="example hit" if example["hit"] else "example miss",
    )


def question(example: Example, shared: Shared) -> Markup:
    """The query: its picture above its words."""
    return el("div", face(example["query"], shared.pictures, shared.query_lead, "query"), class_="query")


def answer(example: Example, shared: Shared, who: str = "") -> list[Markup | None]:
    """Whether it was a hit, what was retrieved, and the gold one where it is known and not among that. `who` answered."""
    items = example["retrieved"]
    style = "found pictures" if any(item.get("image") for item in items) else "found words"
    found = el("ol", *(_candidate(item, rank, shared) for rank, item in enumerate(items, 1)), class_=style)
    return [_verdict(example, who), found, _sought(example, shared)]


def _verdict(example: Example, who: str = "") -> Markup:
    name = el("span", who, class_="who") if who else None
    if example["hit"]:
        return el("p", name, el("span", "\N{CHECK MARK}", aria_hidden="true"), " Hit", class_="verdict")
    rank = example.get("gold_rank")
    where = el("span", f" \N{MIDDLE DOT} gold is at rank {rank:,}", class_="soft") if rank else None
    return el("p", name, el("span", "\N{MULTIPLICATION X}", aria_hidden="true"), " Miss", where, class_="verdict")


def _sought(example: Example, shared: Shared) -> Markup | None:
    """The right answer, when it is known and too far down to be among those retrieved."""
    if not _gold_apart(example):
        return None
    return el("div", GOLD, face(example["gold"], shared.pictures, shared.target_lead, "gold"), class_="sought")


def _candidate(item: Item, rank: int, shared: Shared) -> Markup:
    gold = bool(item.get("gold"))
    foot = el("div", GOLD if gold else None, el("span", f"{item['score']:.2f}", class_="cosine"), class_="foot")
    return el("li", face(item, shared.pictures, shared.target_lead, f"rank {rank}"), foot, class_="gold" if gold else None)


def face(item: Item, pictures: Mapping[str, Thumbnail], said: str, role: str) -> Markup:
    """The picture, or a card in its place, above the words; words that are said once for the whole set are left out beside a picture."""
    path, full = item.get("image"), shown_text(item)
    text = full.removeprefix(said).strip()
    if path:
        return join(_picture(path, pictures, role), _words(text) if text else None)
    return _words(text or full) if full else el("p", "(empty)", class_="soft")


def _words(text: str) -> Markup:
    return el("p", shorten(text), dir="auto", class_="text")


def _picture(path: str, pictures: Mapping[str, Thumbnail], role: str) -> Markup:
    name = path.replace("\\", "/").rsplit("/", 1)[-1]
    thumbnail = pictures.get(path)
    if thumbnail is None:
        return el("div", el("span", "picture missing"), el("span", name, class_="file"), class_="frame absent")
    size = {"width": thumbnail.width, "height": thumbnail.height}
    return el("div", el("img", src=thumbnail.uri, alt=f"{role}: {name}", **size, decoding="async"), class_="frame")


def shorten(text: str) -> str:
    """At most `LONGEST` characters, the rest as an ellipsis."""
    return text if len(text) <= LONGEST else text[: LONGEST - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"
