"""Our means beside published ones: which of ours may stand there, where every number is from, and which printed ones are in doubt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vlm2vec.report.blocks import folded, scrolling
from vlm2vec.report.markup import Markup, el, join
from vlm2vec.report.plain import plain, rows
from vlm2vec.report.summary import percent
from vlm2vec.standings import Inconsistency, Model, Published, Source

OVERALL = "overall"
NAMES = {"classification": "Classification", "vqa": "VQA", "retrieval": "Retrieval", "grounding": "Grounding", OVERALL: "Overall"}
DOUBT = "\N{DAGGER}"
FOLLOWS = {"sets": "the scores of its sets give", "meta-tasks": "its own means of meta-tasks give"}


@dataclass(frozen=True)
class Standing:
    """One line of the table: means by name (fractions, None where unknown), the source's key, and what other sources say of the same."""

    title: str
    means: Mapping[str, float | None]
    source: str = ""
    also: str = ""
    ours: bool = False


@dataclass(frozen=True)
class Beside:
    """The table, best overall first, and what must be known to read it. `doubted` holds (title, mean) of printed means in doubt."""

    columns: tuple[str, ...]
    standings: tuple[Standing, ...]
    doubted: frozenset[tuple[str, str]]
    cautions: tuple[str, ...]
    inconsistencies: tuple[Inconsistency, ...]
    sources: tuple[Source, ...]


def beside(after: Mapping[str, Any], before: Mapping[str, Any] | None, published: Published) -> Beside:
    """Our results among the published models."""
    columns = (OVERALL, "IND", "OOD", *(key for key in published.groups if key not in (OVERALL, "IND", "OOD")))
    ours = [Standing("This model", _own_means(after, published), "this report", ours=True)]
    if before is not None:
        ours.append(Standing("This model, before training", _own_means(before, published), "this report", ours=True))
    found = [*ours, *(_standing(model, published) for model in published.models)]
    return Beside(
        columns,
        tuple(sorted(found, key=_height, reverse=True)),
        frozenset((entry.model, entry.mean) for entry in published.inconsistencies if _shown_first(entry, published)),
        tuple(_cautions(after, published, whole=None not in ours[0].means.values())),
        published.inconsistencies,
        published.sources,
    )


def _height(line: Standing) -> float:
    """Where a line stands: by its overall mean; without one ours stand at the top and others at the bottom."""
    value = line.means[OVERALL]
    return value if value is not None else 2.0 if line.ours else -1.0


def _own_means(results: Mapping[str, Any], published: Published) -> dict[str, float | None]:
    """Our means over exactly the sets that the published ones are over."""
    means = {}
    for key, members in published.groups.items():
        complete = all(name in results["sets"] for name in members)
        means[key] = results["means"].get(key, {}).get("score") if complete else None
    return means


def _standing(model: Model, published: Published) -> Standing:
    """The model by its first quote; of the others, the overall means that read differently, each with its sources."""
    first, *others = model.quotes
    means = {key: published.mean(first, key) for key in published.groups}
    elsewhere: dict[str, list[str]] = {}
    for quote in others:
        elsewhere.setdefault(percent(published.mean(quote, OVERALL)), []).append(quote.source.key)
    also = [f"{value} ({', '.join(keys)})" for value, keys in elsewhere.items() if value not in (percent(means[OVERALL]), percent(None))]
    return Standing(model.name, means, first.source.key, "; ".join(also))


def _shown_first(entry: Inconsistency, published: Published) -> bool:
    model = next(model for model in published.models if model.name == entry.model)
    return model.quotes[0].source == entry.source


def _cautions(after: Mapping[str, Any], published: Published, whole: bool) -> Iterator[str]:
    limit = after["protocol"].get("limit")
    if limit is not None:
        yield f"Only {limit} queries per set were evaluated here; the published numbers are over all of them."
    if not whole:
        yield "Means of which not every set was evaluated here are left out."
    if after["protocol"].get("ties", "pessimistic") == "pessimistic":
        yield "A tie for the first place counts as a miss here; in the published evaluations the candidate listed first won: the gold one."
    name, spread = _widest(published)
    if spread:
        apart = f"Quotes of one and the same model lie up to {percent(spread)} points apart ({name})."
        yield f"The published numbers come from other code. {apart}"


def _widest(published: Published) -> tuple[str, float]:
    """The model whose overall means differ most between its sources, and by how much."""
    spreads = []
    for model in published.models:
        values = [value for quote in model.quotes if (value := published.mean(quote, OVERALL)) is not None]
        spreads.append((model.name, max(values) - min(values) if values else 0.0))
    return max(spreads, key=lambda spread: spread[1], default=("", 0.0))


def place(table: Beside) -> str:
    """Where we stand, in a sentence; nothing where our overall mean is not known."""
    own = next(line for line in table.standings if line.ours)
    score = own.means[OVERALL]
    others = [value for line in table.standings if not line.ours and (value := line.means[OVERALL]) is not None]
    if score is None:
        return f"Without an overall mean there is no place for this model among the {len(others)} published ones."
    above = sum(value > score for value in others)
    return f"Overall {percent(score)} %: of {len(others)} published models, {above or 'none'} score higher."


def _doubt(entry: Inconsistency) -> str:
    note = f" ({entry.note})" if entry.note else ""
    printed, follows = percent(entry.published), percent(entry.recomputed)
    return f"{entry.model}, {NAMES.get(entry.mean, entry.mean)}: printed {printed}, {FOLLOWS[entry.basis]} {follows}{note}."


def _cell(line: Standing, key: str, doubted: frozenset[tuple[str, str]]) -> str:
    return percent(line.means[key]) + (DOUBT if (line.title, key) in doubted else "")


def section(table: Beside) -> Markup:
    """The table on the page, ours marked by word, weight and colour."""
    heads = ["Model", *(NAMES.get(key, key) for key in table.columns), "Source", "Overall elsewhere"]
    words = (0, len(heads) - 2, len(heads) - 1)
    doubts, sources = [el("li", _doubt(entry)) for entry in table.inconsistencies], [_source(source) for source in table.sources]
    body = [_row(line, table) for line in table.standings]
    return join(
        el("p", place(table), class_="prose"),
        el("ul", *(el("li", text) for text in table.cautions), class_="prose cautions"),
        scrolling("Published models as a table", f"Means in %, by overall. {DOUBT} in doubt, see below.", heads, [body], words),
        folded("Printed numbers in doubt", el("ul", *doubts, class_="prose")) if doubts else None,
        folded("Sources of the published numbers", el("ul", *sources, class_="prose")),
    )


def _row(line: Standing, table: Beside) -> Markup:
    numbers = [el("td", _cell(line, key, table.doubted), class_="num main" if key == OVERALL else "num") for key in table.columns]
    sources = [el("td", line.source, class_="from"), el("td", line.also, class_="from elsewhere")]
    return el("tr", el("th", line.title, scope="row", class_="long"), *numbers, *sources, class_="ours" if line.ours else None)


def _source(source: Source) -> Markup:
    facts = f"{source.where}. {source.metric}; confidence {source.confidence}."
    return el("li", el("b", source.key), f" {source.title}: {facts} {source.note}".rstrip())


def lines(table: Beside) -> Iterator[str]:
    """The same as Markdown."""
    yield plain(place(table))
    yield "\n".join(f"- {plain(text)}" for text in table.cautions)
    heads = ["model", *(NAMES.get(key, key).lower() if key in NAMES else key for key in table.columns), "source", "overall elsewhere"]
    body = []
    for line in table.standings:
        cells = [plain(line.title), *(_cell(line, key, table.doubted) for key in table.columns), plain(line.source), plain(line.also)]
        body.append([f"**{cell}**" if line.ours and cell else cell for cell in cells])
    yield "\n".join(rows(heads, body))
    yield f"Means in %, by overall. {DOUBT} in doubt:"
    yield "\n".join(f"- {plain(_doubt(entry))}" for entry in table.inconsistencies)
    yield "\n".join(
        f"- {plain(source.key)}: {plain(f'{source.title}, {source.where}; confidence {source.confidence}')}" for source in table.sources
    )
