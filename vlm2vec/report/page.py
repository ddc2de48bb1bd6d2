"""The report as one HTML page that asks the network for nothing and needs no script to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from vlm2vec.report import beside, charts, scores, smaller
from vlm2vec.report.gallery import gallery, pictures_of
from vlm2vec.report.markup import Markup, el, escape, join
from vlm2vec.report.summary import Summary, sentence, summarize
from vlm2vec.report.tables import provenance
from vlm2vec.report.thumbnails import thumbnails
from vlm2vec.standings import Published

SHORT = 12  # characters of a digest that are shown where the whole would be noise
LAST_STEP = {
    "step": "Last step",
    "temperature": "Temperature",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "duplicate_rate": "Duplicate rate",
    "padding_share": "Padding share",
}
SMOOTHED = "The faint line is what was logged, the strong one a moving average over a twentieth of it."
DRAWN = """Up to four hits and four misses of each set, drawn with a fixed seed, so not in proportion to the score.
Each query stands beside the five candidates it found nearest, best first, with their cosine similarity.
The gold candidate has a frame and a star."""
METRIC = """Each query is compared with its own list of candidates, one of which is the gold one.
Precision@1 is the share of queries whose gold candidate comes first."""
TIES = "A tie for the first place with an unlabelled candidate counts as a miss."
MEANS = """Intervals are 95 % intervals (Wilson's, for means with the effective sample size) over the queries:
they say how far another draw of queries could move the score, not another training run.
A mean counts every set the same, whatever its size; the macro mean counts every meta-task the same."""
EMBED = """from vlm2vec import Encoder

encoder = Encoder.from_pretrained({path!r})
vectors = encoder.encode(["a red apple", {{"image": "photo.jpg"}}])"""


def render(
    after: Mapping[str, Any],
    before: Mapping[str, Any] | None = None,
    log: Sequence[Mapping[str, Any]] | None = None,
    recipe_yaml: str | None = None,
    images_root: Path | None = None,
    published: Published | None = None,
) -> str:
    """The whole page. Equal inputs, with the same Pillow, give equal bytes.

    Raises InputError for a results format this version does not read.
    """
    summary = summarize(after, before, published)
    anchors = {row.key: f"set-{index}" for index, row in enumerate(summary.sets, 1)}
    shown = gallery(summary.groups, thumbnails(pictures_of(after), images_root), anchors)
    sections = [
        ("scores", "Scores", "Scores", join(scores.forest(summary, anchors), scores.table(summary, anchors), scores.more(summary))),
        ("published", "Published", "Beside published models", _published(after, before, published)),
        ("sizes", "Sizes", "Smaller vectors", _sizes(after)),
        ("training", "Training", "Training", _training(log or ())),
        ("examples", "Examples", "What it retrieved", join(el("p", DRAWN, class_="prose"), shown) if shown else None),
        ("next", "Next", "What to do next", _next(summary, after, anchors)),
        ("benchmark", "Benchmark", "What this benchmark is, and is not", _benchmark(after)),
        ("provenance", "Provenance", "Where these numbers come from", _provenance(after, before, recipe_yaml)),
    ]
    return page(f"{summary.suite}: {summary.metric}", _header(summary, after), sections)


def page(title: str, header: Markup, sections: Sequence[tuple[str, str, str, Markup | None]]) -> str:
    """A page of sections, each (anchor, name in the contents, heading, content); a section whose content is None is left out."""
    kept = [section for section in sections if section[-1] is not None]
    return _template("page.html").substitute(
        title=escape(title),
        style=_template("page.css").template,
        first=kept[0][0],
        header=header,
        nav=el("ul", *(el("li", el("a", name, href=f"#{anchor}")) for anchor, name, _, _ in kept)),
        body=join(*(el("section", el("h2", words), content, id=anchor, class_="block") for anchor, _, words, content in kept)),
    )


def _template(name: str) -> Template:
    return Template(files("vlm2vec.report").joinpath(name).read_text(encoding="utf-8"))


def _header(summary: Summary, after: Mapping[str, Any]) -> Markup:
    model = after["model"]
    versions = " · ".join(f"{name} {version}" for name, version in after["versions"].items() if version)
    facts = [
        ("Model", el("code", model["path"])),
        ("Recipe", _short(model.get("recipe_digest"))),
        ("Protocol", _short(after["protocol_digest"])),
        ("Versions", versions),
    ]
    return join(
        el("p", "vlm2vec report", class_="kicker"),
        el("h1", "Results on ", el("em", summary.suite)),
        el("p", sentence(summary), class_="lede"),
        *(el("p", text, class_="warning") for text in summary.warnings),
        scores.tiles(summary),
        fact_list(facts, "facts"),
    )


def _short(digest: str | None) -> Markup:
    return el("code", digest[:SHORT]) if digest else el("span", "none")


def fact_list(facts: Sequence[tuple[str, object]], style: str) -> Markup:
    """Named facts, laid out as `style` says."""
    return el("dl", *(el("div", el("dt", name), el("dd", value)) for name, value in facts), class_=style)


def _published(after: Mapping[str, Any], before: Mapping[str, Any] | None, published: Published | None) -> Markup | None:
    return None if published is None else beside.section(beside.beside(after, before, published))


def _sizes(after: Mapping[str, Any]) -> Markup | None:
    found = smaller.sizes(after)
    return smaller.section(found) if found else None


def _training(log: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Loss, accuracy and how far positives and negatives lie apart, as far as they were logged."""
    loss, accuracy = charts.series(log, "loss"), charts.series(log, "accuracy")
    near, far = charts.series(log, "positive_similarity", "positive"), charts.series(log, "negative_similarity", "negative", "second")
    figures = []
    if loss.points:
        figures.append(_figure("Loss", "InfoNCE over the global batch; lower is better.", charts.curves([loss], "Loss")))
    if accuracy.points:
        drawn = charts.curves([accuracy], "Accuracy", (0.0, 1.0), "{:.0%}".format)
        figures.append(_figure("Accuracy", "Share of training queries whose positive ranks first in the batch.", drawn))
    if near.points and far.points:
        drawn = charts.curves([near, far], "Cosine similarity", show="{:.2f}".format)
        figures.append(_figure("Cosine similarity", "Mean over positives and over negatives; the gap is what was learned.", drawn))
    if not figures:
        return None
    last = [(words, f"{log[-1][key]:,.4g}") for key, words in LAST_STEP.items() if isinstance(log[-1].get(key), int | float)]
    return join(el("p", SMOOTHED, class_="soft"), el("div", *figures, class_="figures"), fact_list(last, "facts compact"))


def _figure(title: str, words: str, drawing: Markup) -> Markup:
    return el("figure", el("figcaption", el("b", title), " ", el("span", words, class_="soft")), drawing)


def _next(summary: Summary, after: Mapping[str, Any], anchors: Mapping[str, str]) -> Markup:
    """Steps that follow from these numbers first, then what anyone can do with the model."""
    steps: list[object] = []
    weakest = min((row for row in summary.sets if row.examples), key=lambda row: row.lift, default=None)
    if weakest is not None:
        link = el("a", weakest.title, href=f"#{anchors[weakest.key]}")
        steps.append(join("Look at the misses of ", link, ", the set with the least gain over chance. Are they near misses, or noise?"))
    if summary.at_chance:
        names = ", ".join(row.title for row in summary.at_chance)
        steps.append(
            f"Not clearly above chance yet: {names}. See whether a training source covers them and whether the loss was still falling."
        )
    train, measure = "vlm2vec train RECIPE run.dir=runs/other train.lr=1e-4", f"vlm2vec eval MODEL --suite {summary.suite}"
    steps.append(join("Change one thing and compare the intervals: ", el("code", train)))
    steps.append(join("Measure another model the same way: ", el("code", measure)))
    code = EMBED.format(path=str(after["model"]["path"]))
    steps.append(join("Embed your own items:", el("pre", el("code", code), tabindex=0)))
    return el("ol", *(el("li", step) for step in steps), class_="steps")


def _benchmark(after: Mapping[str, Any]) -> Markup:
    """What the suite says of itself, then how its protocol reads."""
    own = [part.strip() for part in str(after.get("description") or "").split("\n\n") if part.strip()]
    pessimistic = after["protocol"].get("ties", "pessimistic") == "pessimistic"
    protocol = " ".join([METRIC, *([TIES] if pessimistic else []), MEANS])
    return el("div", *(el("p", part) for part in (*own, protocol)), class_="prose")


def _provenance(after: Mapping[str, Any], before: Mapping[str, Any] | None, recipe_yaml: str | None) -> Markup:
    facts = fact_list([(name, el("code", value)) for name, value in provenance(after, before)], "facts full")
    if recipe_yaml is None:
        return facts
    recipe = el("pre", el("code", recipe_yaml), tabindex=0)
    return join(facts, el("details", el("summary", el("h3", "The recipe")), recipe, class_="recipe"))
