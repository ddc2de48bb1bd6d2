"""The parity gate: one exported folder, the same items through every tool, and where they part.

Our own embeddings are the measure. What an export stored of itself comes first: it tells a damaged or changed folder from a tool that reads
a good one differently.

Shape letters: N items, D embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.nn.functional import cosine_similarity

from vlm2vec import backends, io, samples
from vlm2vec.backbones import resolve
from vlm2vec.backends import Fed, Seen
from vlm2vec.config import ModelConfig
from vlm2vec.encoder import SETTINGS
from vlm2vec.errors import ManifestError, ModelError, ParityError, Vlm2VecError
from vlm2vec.probe_file import PROBES, read_probes

CARD = "README.md"  # written anew where the folder is published, so it is not held against the manifest
COSINE = {"float32": 0.9999, "float16": 0.999, "bfloat16": 0.99}  # least cosine of two embeddings of one item, by number format
PIXELS = 1e-3  # largest difference between means, or spreads, of pixels that are the same picture
SHOWN = 4  # token ids that a message quotes


@dataclass(frozen=True)
class Row:
    """One tool on one group of items: largest difference of two numbers, least cosine, and what is wrong with it."""

    tool: str
    group: str
    items: int
    largest: float
    cosine: float
    problem: str = ""

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        verdict = "FAILS" if self.problem else ""
        return self.tool, self.group, str(self.items), f"{self.largest:.1e}", f"{self.cosine:.7f}", verdict


@dataclass
class Report:
    """What was compared in which number format, what failed outright, and what was left out and why."""

    folder: Path
    dtype: str
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        """Everything that keeps the folder from passing."""
        return [*self.failures, *(f"{row.tool}, {row.group}: {row.problem}" for row in self.rows if row.problem)]

    def table(self) -> str:
        """The rows as aligned text, then what was left out."""
        cells = [("tool", "items", "", "largest difference", "least cosine", ""), *(row.cells() for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join([*lines, *(f"{tool}: left out: {why}" for tool, why in self.skipped.items())])

    def require(self) -> None:
        """Raise ParityError if anything is wrong."""
        if self.problems:
            bar = f"computed in {self.dtype}, where a cosine must be at least {COSINE[self.dtype]}"
            listed = "\n  ".join(self.problems)
            raise ParityError(f"{self.folder}: {len(self.problems)} checks failed, {bar}:\n  {listed}")


def verify(model: str | Path, revision: str | None = None, device: str = "cpu", dtype: str = "float32") -> Report:
    """Check an exported folder, here or on the Hub, file by file and then tool by tool. Raises ModelError for what is no export of ours."""
    folder = resolve(ModelConfig(path=str(model), revision=revision))
    report = Report(folder, dtype)
    try:
        io.verify_manifest(folder, apart_from=(CARD,))
    except ManifestError as error:
        report.failures.append(f"files: {error}")
    compare(folder, report, device)
    return report


def compare(folder: Path, report: Report, device: str = "cpu", before: Seen | None = None, rounded: str = "float32") -> Seen:
    """Add to `report` how the tools agree on a folder, published or not. Returns what our own code sees.

    `before` is what our code saw of the model that the folder was made from, until its weights were `rounded` to their number format.
    """
    settings = export_settings(folder)
    try:
        measure = backends.ours(folder, device, report.dtype, settings)
        stored = read_probes(folder / PROBES) if (folder / PROBES).exists() else None
    except Vlm2VecError as error:
        report.failures.append(f"vlm2vec: {error}")
        return Seen()
    for tool, other, dtype in (("before the export", before, rounded), ("stored", stored, report.dtype)):
        if other is not None:
            report.rows += _rows(tool, measure, other, dtype)
    for tool in backends.OTHERS:
        if why := _left_out(tool, settings):
            report.skipped[tool] = why
        else:
            _ask(report, tool, measure, folder, device, settings)
    return measure


def _ask(report: Report, tool: str, measure: Seen, folder: Path, device: str, settings: Mapping[str, Any]) -> None:
    try:
        other = backends.OTHERS[tool](folder, device, report.dtype, settings)
    except Exception as error:  # it is other people's code: whatever it raises, it could not embed
        report.failures.append(f"{tool}: {type(error).__name__}: {error}")
    else:
        report.rows += _rows(tool, measure, other, report.dtype)


def _left_out(tool: str, settings: Mapping[str, Any]) -> str:
    """Why a tool is not asked, "" if it is."""
    if not backends.installed(tool):
        return "not installed"
    return "; ".join(settings["export"]["differences"]) if tool != "sentence-transformers" else ""


def export_settings(folder: Path) -> dict[str, Any]:
    """What an export says of itself. Raises ModelError for a folder that is none."""
    settings = io.read_json(folder / SETTINGS) if (folder / SETTINGS).exists() else None
    if not isinstance(settings, dict) or not isinstance(settings.get("export"), dict):
        raise ModelError(f"{folder} is no export; make one with `vlm2vec export {folder} --to DIR`")
    return settings


def _rows(tool: str, measure: Seen, other: Seen, dtype: str) -> Iterator[Row]:
    for group in samples.groups():
        mine_ND, theirs_ND = measure.embeddings[group.name], other.embeddings[group.name]
        if mine_ND.shape != theirs_ND.shape:
            sizes = f"{theirs_ND.shape[-1]} numbers for {mine_ND.shape[-1]}"
            yield Row(tool, group.name, len(group.ids), float("nan"), float("nan"), sizes)
            continue
        cosine_N = cosine_similarity(mine_ND.double(), theirs_ND.double())
        worst = int(cosine_N.nan_to_num(-1).argmin())
        agrees = bool((cosine_N >= COSINE[dtype]).all())  # no comparison with NaN holds
        problem = "" if agrees else explain(group.ids[worst], measure.fed, other.fed)
        yield Row(tool, group.name, len(group.ids), float((mine_ND - theirs_ND).abs().max()), float(cosine_N[worst]), problem)


def explain(item: str, mine: Mapping[str, Fed], theirs: Mapping[str, Fed]) -> str:
    """What kind of difference it is, by what the models were fed for `item`."""
    if item not in theirs:
        return f"other embeddings, worst for {item}"
    here, there = mine[item], theirs[item]
    if here.tokens != there.tokens:
        place = _first_difference(here.tokens, there.tokens)
        found, expected = (list(tokens[place : place + SHOWN]) for tokens in (there.tokens, here.tokens))
        return f"other token ids for {item}, at place {place} {found} instead of {expected}: the chat template or the tokenizer differs"
    if max(abs(one - two) for one, two in zip(here.pixels, there.pixels, strict=True)) > PIXELS:
        return f"the same token ids but other pixels for {item}: the image processor's settings differ"
    return f"the same token ids and pixels but other states for {item}: weights, pooling or attention differ"


def _first_difference(one: tuple[int, ...], two: tuple[int, ...]) -> int:
    """The first place where two sequences part; the length of the shorter one if it begins the other."""
    return next((place for place, (left, right) in enumerate(zip(one, two, strict=False)) if left != right), min(len(one), len(two)))
