"""Published scores on a suite: what was printed, where, and how far it can be trusted. Facts from `benchmarks/<suite>/reference.json`.

The file holds numbers in per cent as they were printed; here they are fractions in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from vlm2vec.errors import InputError
from vlm2vec.io import read_json
from vlm2vec.suite import Suite, load_suite

FILE = "reference.json"
FORMAT = 1
CONFIDENCE = ("high", "medium", "low")
BASES = ("sets", "meta-tasks")
WHOLE = ("IND", "OOD", "overall")


@dataclass(frozen=True)
class Source:
    """A publication. `columns` is the source whose scores of single sets its means were made from, where there is one."""

    key: str
    title: str
    where: str
    metric: str
    confidence: str
    columns: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Quote:
    """What one source says of a model, under the name it uses: means, scores of sets, or both; either may be partial."""

    source: Source
    named: str
    means: Mapping[str, float]
    sets: Mapping[str, float]
    note: str = ""


@dataclass(frozen=True)
class Model:
    """A model with its quotes, the one to show first."""

    name: str
    quotes: tuple[Quote, ...]


@dataclass(frozen=True)
class Inconsistency:
    """A printed mean that does not follow from its own sets, or from its own means of meta-tasks."""

    model: str
    source: Source
    mean: str
    basis: str
    published: float
    recomputed: float
    note: str = ""


@dataclass(frozen=True)
class Best:
    """The highest published score of one set."""

    score: float
    model: str
    source: Source


@dataclass(frozen=True)
class Published:
    """All that is known of a suite. `groups` lists the sets behind every mean: the meta-tasks, IND, OOD and overall."""

    suite: str
    sources: tuple[Source, ...]
    models: tuple[Model, ...]
    inconsistencies: tuple[Inconsistency, ...]
    groups: Mapping[str, tuple[str, ...]]

    def mean(self, quote: Quote, key: str) -> float | None:
        """The printed mean, or the one its scores of sets give where all of them are known, or None."""
        if key in quote.means:
            return quote.means[key]
        members = self.groups[key]
        return fmean(quote.sets[name] for name in members) if all(name in quote.sets for name in members) else None

    def best(self, name: str) -> Best | None:
        """The highest score of the set `name`, each model by the first of its quotes that has it; None where no score of it is known."""
        found = []
        for model in self.models:
            quote = next((quote for quote in model.quotes if name in quote.sets), None)
            if quote is not None:
                found.append(Best(quote.sets[name], model.name, quote.source))
        return max(found, key=lambda best: best.score, default=None)


def load(suite: str | Suite) -> Published | None:
    """The published scores of a suite, by its name under `benchmarks/`; None where there are none.

    Raises InputError naming the file and the key of what is wrong, or DataError for a suite that does not exist.
    """
    suite = load_suite(suite) if isinstance(suite, str) else suite
    file = next((file for folder in _folders() if (file := folder / suite.name / FILE).is_file()), None)
    return None if file is None else read(file, suite)


def _folders() -> tuple[Path, Path]:
    """Where benchmarks are looked for: the current folder, then beside the package."""
    return Path("benchmarks"), Path(__file__).resolve().parent.parent / "benchmarks"


def read(file: Path, suite: Suite) -> Published:
    """Published scores from a file of this module's format. Raises InputError naming the file and the key of what is wrong."""
    top = _Entry(read_json(file), f"{file}: ")
    top.keys("format", "suite", "unit", "about", "sources", "models", "inconsistencies")
    for key, expected in (("format", FORMAT), ("suite", suite.name), ("unit", "per cent")):
        if top.value.get(key) != expected:
            top.refuse(key, repr(expected))
    sources = tuple(_source(entry) for entry in top.entries("sources"))
    groups = _groups(suite)
    models = tuple(_model(entry, {source.key: source for source in sources}, groups) for entry in top.entries("models"))
    names = [model.name for model in models]
    for index, name in enumerate(names):
        if name in names[:index]:
            top.refuse(f"models[{index}].name", "a name that was not used before")
    return Published(suite.name, sources, models, tuple(_inconsistency(entry, models) for entry in top.entries("inconsistencies")), groups)


def _groups(suite: Suite) -> dict[str, tuple[str, ...]]:
    keys = [*dict.fromkeys(spec.meta_task for spec in suite.sets), *WHOLE]
    return {key: tuple(spec.name for spec in suite.sets if key in (spec.meta_task, spec.split, "overall")) for key in keys}


def _source(entry: _Entry) -> Source:
    entry.keys("key", "title", "where", "metric", "confidence", "columns", "note")
    return Source(
        key=entry.text("key"),
        title=entry.text("title"),
        where=entry.text("where"),
        metric=entry.text("metric"),
        confidence=entry.choice("confidence", CONFIDENCE),
        columns=entry.text("columns", "") or None,
        note=entry.text("note", ""),
    )


def _model(entry: _Entry, sources: Mapping[str, Source], groups: Mapping[str, Sequence[str]]) -> Model:
    entry.keys("name", "quotes")
    name = entry.text("name")
    quotes = []
    for quote in entry.entries("quotes"):
        quote.keys("source", "named", "note", "means", "sets")
        source = sources[quote.choice("source", tuple(sources))]
        means, sets = quote.scores("means", groups), quote.scores("sets", groups["overall"])
        quotes.append(Quote(source, quote.text("named", name), means, sets, quote.text("note", "")))
    return Model(name, tuple(quotes))


def _inconsistency(entry: _Entry, models: Sequence[Model]) -> Inconsistency:
    entry.keys("model", "source", "mean", "basis", "recomputed", "note")
    quotes = {model.name: {quote.source.key: quote for quote in model.quotes} for model in models}
    model = entry.choice("model", tuple(quotes))
    quote = quotes[model][entry.choice("source", tuple(quotes[model]))]
    mean = entry.choice("mean", tuple(quote.means))
    basis = entry.choice("basis", BASES)
    return Inconsistency(model, quote.source, mean, basis, quote.means[mean], entry.score("recomputed"), entry.text("note", ""))


@dataclass(frozen=True)
class _Entry:
    """A JSON value that is expected to be an object, with its place in the file for error messages."""

    value: Any
    where: str

    def keys(self, *known: str) -> None:
        if not isinstance(self.value, dict):
            raise InputError(f"{self.where or 'top'} expected an object, got {_shown(self.value)}")
        for key in self.value:
            if key not in known:
                raise InputError(f"{self.where}{key}: unknown key; known: {', '.join(known)}")

    def refuse(self, key: str, expected: str) -> None:
        found = _shown(self.value[key]) if key in self.value else "nothing"
        raise InputError(f"{self.where}{key}: expected {expected}, got {found}")

    def text(self, key: str, default: str | None = None) -> str:
        value = self.value.get(key, default)
        if not isinstance(value, str):
            self.refuse(key, "text")
        return value

    def choice(self, key: str, known: Sequence[str]) -> str:
        if (value := self.text(key)) not in known:
            self.refuse(key, f"one of {', '.join(known)}")
        return value

    def score(self, key: str) -> float:
        """A number from 0 to 100, as a fraction."""
        value = self.value.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
            self.refuse(key, "per cent from 0 to 100")
        return value / 100

    def scores(self, key: str, known: Sequence[str] | Mapping[str, Any]) -> dict[str, float]:
        inner = _Entry(self.value.get(key, {}), f"{self.where}{key}.")
        inner.keys(*known)
        return {name: inner.score(name) for name in inner.value}

    def entries(self, key: str) -> list[_Entry]:
        values = self.value.get(key)
        if not isinstance(values, list):
            self.refuse(key, "a list")
        return [_Entry(value, f"{self.where}{key}[{index}].") for index, value in enumerate(values)]


def _shown(value: Any) -> str:
    return repr(value)[:80]
