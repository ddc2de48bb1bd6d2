"""What smaller vectors cost: the means with fewer dimensions or less precision, beside the bytes a vector takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm2vec.report.blocks import folded, scrolling
from vlm2vec.report.markup import Markup, el, join
from vlm2vec.report.plain import rows
from vlm2vec.report.summary import META_TASKS, TOTALS, percent

BITS = {"float32": 32, "int8": 8, "binary": 1}  # per dimension
FACTOR = 4  # bytes of the factor that an int8 vector brings
NAMES = {
    "classification": "Classification",
    "vqa": "VQA",
    "retrieval": "Retrieval",
    "grounding": "Grounding",
    "overall": "Overall",
    "macro": "Macro",
}
WORDS = """The same embeddings with only their first dimensions kept, brought back to unit length, and stored in fewer bits.
An int8 vector has a byte per dimension and 4 for its scale; a binary one has a bit per dimension.
The change is that of the overall mean against the scores above."""


@dataclass(frozen=True)
class Size:
    """One way to store a vector, what it costs and what it scores: means by name as fractions, None where they are withheld."""

    dims: int
    precision: str
    means: Mapping[str, float | None]
    change: float | None  # of the overall mean against that of the results

    @property
    def vector_bytes(self) -> int:
        """Bytes per vector, without what an index adds."""
        return -(-self.dims * BITS[self.precision] // 8) + (FACTOR if self.precision == "int8" else 0)


def sizes(after: Mapping[str, Any]) -> list[Size]:
    """The entries of the results' grid with the vectors as they are among them, largest vector first; nothing without a grid."""
    if not after.get("grid"):
        return []
    full = (after["means"].get("overall") or {}).get("score")
    found = []
    for entry in ({"dims": after["model"]["dims"], "precision": "float32", "means": after["means"]}, *after["grid"]):
        means = {key: mean["score"] for key, mean in entry["means"].items()}
        overall = means.get("overall")
        change = None if full is None or overall is None else overall - full
        found.append(Size(entry["dims"], entry["precision"], means, change))
    return sorted(found, key=lambda size: (-size.vector_bytes, -size.dims))


def _columns(found: Sequence[Size]) -> list[str]:
    return [key for key in ("overall", "macro", "IND", "OOD", *META_TASKS) if any(key in size.means for size in found)]


def _cells(size: Size, columns: Sequence[str]) -> list[str]:
    first = [f"{size.dims:,}", size.precision, f"{size.vector_bytes:,}", percent(size.change, signed=True)]
    return [*first, *(percent(size.means.get(key)) for key in columns)]


def _heads(columns: Sequence[str]) -> list[str]:
    return ["Dimensions", "Precision", "Bytes", "Change", *(NAMES.get(key, key) for key in columns)]


def section(found: Sequence[Size]) -> Markup:
    """Dimensions by precision with the overall mean and the bytes, then every mean, folded."""
    columns = _columns(found)
    everything = scrolling(
        "All means of smaller vectors",
        "Bytes per vector, and means in %.",
        _heads(columns),
        [[_row(size, columns) for size in found]],
        (1,),
    )
    return join(el("p", WORDS, class_="prose"), el("div", _matrix(found), class_="matrix"), folded("Every mean", everything))


def _matrix(found: Sequence[Size]) -> Markup:
    at = {(size.dims, size.precision): size for size in found}
    kinds = [kind for kind in BITS if any(size.precision == kind for size in found)]
    rows = []
    for dims in sorted({size.dims for size in found}, reverse=True):
        name = el("th", f"{dims:,}", scope="row", class_="num")
        rows.append(el("tr", name, *(el("td", _square(at.get((dims, kind))), class_="num") for kind in kinds)))
    return scrolling(
        "Overall mean by dimensions and precision",
        "Overall mean in %, its change, and bytes per vector.",
        ["Dimensions", *kinds],
        [rows],
        (),
    )


def _square(size: Size | None) -> Markup | None:
    if size is None:
        return None
    change = "" if size.change is None else f"{percent(size.change, signed=True)} · "
    return join(el("b", percent(size.means.get("overall"))), el("span", f"{change}{size.vector_bytes:,} B", class_="soft cost"))


def _row(size: Size, columns: Sequence[str]) -> Markup:
    first, precision, *numbers = _cells(size, columns)
    return el("tr", el("th", first, scope="row", class_="num"), el("td", precision), *(el("td", cell, class_="num") for cell in numbers))


def markdown(found: Sequence[Size]) -> Iterator[str]:
    """The same as Markdown."""
    columns = _columns(found)
    yield WORDS.replace("\n", " ")
    yield "\n".join(
        rows([name.lower() if name in NAMES.values() else name for name in _heads(columns)], [_cells(size, columns) for size in found], 2)
    )


def text(found: Sequence[Size]) -> Iterator[str]:
    """The same for a terminal: bytes, overall and macro mean."""
    columns = [key for key in ("overall", "macro") if key in TOTALS and key in _columns(found)]
    yield "".join(
        name.rjust(width) for name, width in zip(["dims", "precision", "bytes", "change", *columns], (6, 11, 8, 8, 9, 9), strict=False)
    )
    for size in found:
        yield "".join(cell.rjust(width) for cell, width in zip(_cells(size, columns), (6, 11, 8, 8, 9, 9), strict=False))
