"""Rows of MMEB (Jiang et al. 2024, arXiv:2410.05160) as pairs and evaluation sets, and of one's own data in the same columns.

Training rows: qry, qry_image_path, pos_text, pos_image_path and, if there are negatives, neg_text and neg_image_path, each one text or
a list per row. Evaluation rows: qry_text, qry_img_path and two parallel lists, tgt_text and tgt_img_path, whose first entry is the gold.
Texts carry instruction, placeholder and newlines, unless the row keeps its instructions apart in qry_inst and tgt_inst (MMEB-V2, Meng et
al. 2025, arXiv:2507.04590). "" or null stands for an absent text or picture. Picture paths are relative to an image root.

Shape letters: Q queries, M candidates of a query, N candidates of all queries one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vlm2vec.data.corpus import read_corpus
from vlm2vec.data.own.read import is_own, read_own_set
from vlm2vec.data.readers import Column, find_files, read_rows
from vlm2vec.data.sampler import choose_rows
from vlm2vec.data.sides import Sides, appearance, check_sides, flat_sides, instruct, make_item, numbered
from vlm2vec.data.types import EvalSet, Item, Pair
from vlm2vec.errors import DataError
from vlm2vec.log import get_logger
from vlm2vec.suite import SetSpec

QUERY, POSITIVE, NEGATIVE = ("qry", "qry_image_path"), ("pos_text", "pos_image_path"), ("neg_text", "neg_image_path")
EVAL_QUERY, CANDIDATES = ("qry_text", "qry_img_path"), ("tgt_text", "tgt_img_path")
INSTRUCTIONS = ("qry_inst", "tgt_inst")

_logger = get_logger(__name__)


# -- training ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TrainRows:
    """A training source: `rows[index]` is made a Pair when asked for. Texts stay in Arrow buffers, pictures on disk."""

    name: str
    image_root: Path
    files: Sequence[Path]
    total: int  # rows in the files, before a cap
    numbers: NDArray[np.int64]  # row number in the files of each row that is used
    _table: pa.Table = field(repr=False)

    def __len__(self) -> int:
        return len(self.numbers)

    def id(self, index: int) -> str:
        """What the pair is called in logs and errors; reads nothing."""
        return f"{self.name}:{self.numbers[index]}"

    def __getitem__(self, index: int) -> Pair:
        """Raises PathError when a picture lies outside the image root."""
        cells = {name: self._table.column(name)[int(index)].as_py() for name in self._table.column_names}
        label = f"{self.name} row {self.numbers[index]}"
        query, positive = (make_item(cells[text], cells[path], self.image_root, label) for text, path in (QUERY, POSITIVE))
        negatives = _negatives(cells, positive, self.image_root, label) if NEGATIVE[0] in cells else ()
        return Pair(self.id(index), self.name, query, positive, negatives)


def read_train(
    root: Path,
    name: str,
    path: str | None = None,
    split: str = "original",
    cap: int | None = None,
    seed: int = 17,
    negatives: bool = True,
    take: Literal["random", "first"] = "random",
) -> TrainRows:
    """The rows of a split of `root/path` (None: `root/name`); picture paths are relative to `root`.

    `cap` keeps that many rows: the first ones of the files, or a random choice, the same for the same seed and name; a smaller cap keeps
    some of a larger one's. Without `negatives` the columns of negatives are not read. Raises DataError naming file or row for anything that
    could not become a pair.
    """
    files = find_files(root, path or name, split)
    columns = [Column(column) for column in (*QUERY, *POSITIVE)]
    columns += [Column(column, many=True, required=False) for column in NEGATIVE if negatives]
    stored = read_rows(files, columns)
    numbers = choose_rows(len(stored), cap, seed, "cap", name) if take == "random" else np.arange(len(stored))[:cap]
    table = stored if len(numbers) == len(stored) else stored.take(numbers)
    check_sides(table, {"query": QUERY, "positive": POSITIVE}, name, numbers)
    if negatives:
        flat_sides(table, NEGATIVE, name, numbers)
    return TrainRows(name, root, files, len(stored), numbers, table)


def _negatives(cells: dict[str, Any], positive: Item, image_root: Path, label: str) -> tuple[Item, ...]:
    """The negatives of a row, without entries that hold nothing (lists are padded with such).

    A bare picture beside a positive that is a picture with words (VisDial) gets the positive's words: another prompt would give it away.
    """
    texts, paths = (cells[name] for name in NEGATIVE)
    count = max(len(texts), len(paths))
    sides = zip(*(side if len(side) == count else [""] * count for side in (texts, paths)), strict=True)
    words = positive.text if positive.images else ""
    return tuple(make_item(text or words, path, image_root, label) for text, path in sides if text.strip() or path)


# -- evaluation --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """What a suite knows of one side of a set: the template of its prompts, of which rows with instructions of their own need the end, and
    whether there must be a column of pictures.
    """

    template: str = ""
    pictures: bool = True


def read_set(root: Path, spec: SetSpec, image_root: Path) -> EvalSet:
    """The set that a suite describes: rows with candidates of their own, or one corpus for all queries (`spec.scope`).

    A path that names a file of one's own data is read as that; the paths of its pictures start at `root`, as in training. Raises DataError
    or PathError as `read_eval`, `corpus.read_corpus` and `own.read.read_own_set` do.
    """
    if is_own(root / spec.path):
        return read_own_set(root, spec)
    if spec.scope == "global":
        return read_corpus(root, spec, image_root)
    forms = Form(spec.query, "I" in spec.query_modality), Form(spec.target, "I" in spec.target_modality)
    return read_eval(root, spec.name, spec.path, image_root, forms=forms)


def read_eval(
    root: Path,
    name: str,
    path: str | None = None,
    image_root: Path | None = None,
    split: str = "test",
    forms: tuple[Form, Form] = (Form(), Form()),
) -> EvalSet:
    """The evaluation set in `root/path` (None: `root/name`); pictures lie under `image_root` (None: `root`). `forms`: queries, candidates.

    A candidate with neither text nor picture is left out, as one that no query could mean. Raises DataError naming the row for a query or
    gold of that kind, a row without candidates, lists that do not match, and an image root that is not there; PathError for a path that
    leaves it.
    """
    columns = [Column(EVAL_QUERY[0]), Column(EVAL_QUERY[1], required=forms[0].pictures)]
    columns += [Column(CANDIDATES[0], many=True), Column(CANDIDATES[1], many=True, required=forms[1].pictures)]
    columns += [Column(column, required=False) for column in INSTRUCTIONS]
    table = read_rows(find_files(root, path or name, split), columns)
    numbers, image_root = np.arange(len(table)), image_root or root
    check_sides(table, {"query": EVAL_QUERY}, name, numbers)
    _check_image_root(image_root, table, name)
    return _with_candidates(name, _queries(table, name, image_root, forms[0]), table, image_root, forms[1])


def _queries(table: pa.Table, name: str, image_root: Path, form: Form) -> list[Item]:
    cells = zip(*(table.column(column).to_pylist() for column in (INSTRUCTIONS[0], *EVAL_QUERY)), strict=True)
    return [_composed(said, text, path, image_root, f"{name} row {row}", form) for row, (said, text, path) in enumerate(cells)]


def _composed(instruction: str, text: str, path: str, image_root: Path, label: str, form: Form) -> Item:
    return make_item(instruct(instruction, text, bool(path), form.template) if instruction else text, path, image_root, label)


def _with_candidates(name: str, queries: list[Item], table: pa.Table, image_root: Path, form: Form) -> EvalSet:
    sides = _without_blanks(flat_sides(table, CANDIDATES, name, np.arange(len(queries))), name, len(queries))
    instruction_Q, instructions = numbered(table.column(INSTRUCTIONS[1]))
    first, index_N = appearance(instruction_Q[sides.row_N], sides.text_N, sides.path_N)
    candidates = []
    for place in first.tolist():
        row, text, path = int(sides.row_N[place]), sides.texts[int(sides.text_N[place])], sides.paths[int(sides.path_N[place])]
        instruction = instructions[int(instruction_Q[row])].as_py()
        candidates.append(_composed(instruction, text.as_py(), path.as_py(), image_root, f"{name} row {row}", form))
    sorted_N = np.sort(sides.row_N * len(candidates) + index_N)  # equal neighbours: the same candidate twice in a row
    duplicates = int(np.count_nonzero(sorted_N[1:] == sorted_N[:-1]))
    if duplicates:
        repeats = f"{duplicates} of {len(index_N)} candidates repeat another of their query"
        _logger.info("%s: %s; a repeat of the gold counts as the gold", name, repeats)
    candidates_QM = np.split(index_N, np.searchsorted(sides.row_N, np.arange(1, len(queries))))
    golds = [row[:1] for row in candidates_QM]
    return EvalSet(name, queries, candidates, candidates_QM, golds, [np.ones(1, np.float32) for _ in golds], duplicates)


def _without_blanks(sides: Sides, name: str, rows: int) -> Sides:
    """OK-VQA lists empty texts among its candidates. DataError for a row without candidates, or whose gold is one of those."""
    empty_Q = np.bincount(sides.row_N, minlength=rows) == 0
    if empty_Q.any():
        raise DataError(f"{name} row {int(np.argmax(empty_Q))}: no candidates; the first must be the gold")
    blank_N = sides.blank_N
    gold_N = np.diff(sides.row_N, prepend=-1) > 0
    if (blank_N & gold_N).any():
        raise DataError(f"{name} row {sides.row_N[int(np.argmax(blank_N & gold_N))]}: the gold has neither text nor image")
    if blank_N.any():
        _logger.warning("%s: %d candidates with neither text nor image are left out", name, int(blank_N.sum()))
    return sides.only(~blank_N)


def _check_image_root(image_root: Path, table: pa.Table, name: str) -> None:
    if image_root.is_dir():
        return
    paths = [table.column(EVAL_QUERY[1]), pc.list_flatten(table.column(CANDIDATES[1]))]
    if any(pc.any(pc.not_equal(column, "")).as_py() for column in paths):
        raise DataError(f"{name}: image root {image_root} does not exist; unpack the pictures of the benchmark there")
