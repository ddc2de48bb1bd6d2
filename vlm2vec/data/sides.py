"""From columns of texts and picture paths to items: the one place where paths are checked, lists are laid side by side, prompts composed.

Shape letters: Q rows, N entries of all rows one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vlm2vec import io
from vlm2vec.data.types import ImageRef, Item
from vlm2vec.errors import DataError, PathError
from vlm2vec.prompts import MARK, PLACEHOLDER


def make_item(text: str, path: str, image_root: Path, label: str) -> Item:
    """The path is checked, the picture not opened. Raises PathError when it leaves `image_root`."""
    if not path:
        return Item(text)
    label = f"{label}: image {path!r}"
    try:
        return Item(text, (ImageRef(io.safe_join(image_root, path), label),))
    except PathError as error:
        raise PathError(f"{label}: {error}") from None


# -- prompts -----------------------------------------------------------------------------------------------------------------------------


def fill(template: str, text: str) -> str:
    """The prompt that a suite's template makes of a text; an empty template leaves it as it is."""
    return _unescaped(template).replace("{text}", text) if template else text


def instruct(instruction: str, text: str, picture: bool, template: str) -> str:
    """The prompt of a row that keeps its instruction apart (MMEB-V2, arXiv 2507.04590), as version 1 writes it.

    A placeholder, where there is a picture or the instruction names one, stands on a line of its own; a space joins instruction and text.
    How the prompt ends is said by the suite's template (VisDial: two newlines, a cropped object: none); without one, by a newline.
    """
    words = MARK.sub("", instruction).strip()
    front = f"{PLACEHOLDER}\n" if picture or MARK.search(instruction) else ""
    plain = _unescaped(template) or "\n"
    return front + " ".join(filter(None, (words, text))) + plain[len(plain.rstrip("\n")) :]


def _unescaped(template: str) -> str:
    return template.replace("\\n", "\n")


# -- columns -----------------------------------------------------------------------------------------------------------------------------


def is_blank(texts: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """Whether each text holds no word besides placeholders."""
    return pc.equal(pc.utf8_trim_whitespace(pc.replace_substring_regex(texts, MARK.pattern, "")), "")


def check_sides(table: pa.Table, sides: dict[str, tuple[str, str]], label: str, numbers: NDArray[np.int64]) -> None:
    """DataError for the first row of which a side, given as its columns of texts and paths, has neither a picture nor a word."""
    for role, (text, path) in sides.items():
        row = pc.index(pc.and_(is_blank(table.column(text)), pc.equal(table.column(path), "")), True).as_py()
        if row >= 0:
            raise DataError(f"{label} row {numbers[row]}: {role} has neither text nor image ({text} and {path} are empty)")


@dataclass(frozen=True, eq=False)
class Sides:
    """Two parallel list columns, flat: entry n is of row `row_N[n]` and has the text `texts[text_N[n]]` and the path `paths[path_N[n]]`.

    Code 0 is the empty text and the empty path.
    """

    row_N: NDArray[np.int64]
    texts: pa.Array
    text_N: NDArray[np.int64]
    paths: pa.Array
    path_N: NDArray[np.int64]

    def only(self, keep_N: NDArray[np.bool_]) -> Sides:
        return Sides(self.row_N[keep_N], self.texts, self.text_N[keep_N], self.paths, self.path_N[keep_N])

    @property
    def blank_N(self) -> NDArray[np.bool_]:
        """Entries with neither a picture nor a word."""
        return is_blank(self.texts).to_numpy(zero_copy_only=False)[self.text_N] & (self.path_N == 0)


def flat_sides(table: pa.Table, names: tuple[str, str], label: str, numbers: NDArray[np.int64]) -> Sides:
    """The two list columns side by side; an empty list or a lone "" (older dumps) stands for as many absent entries as the other has.

    Raises DataError for the first row of which the lists differ in length otherwise.
    """
    columns = [_codes(table.column(name)) for name in names]
    count_Q = np.maximum(columns[0][0], columns[1][0])
    row_N = np.repeat(np.arange(len(count_Q)), count_Q)
    place_N = np.arange(len(row_N)) - (np.cumsum(count_Q) - count_Q)[row_N]
    codes = []
    for length_Q, code_N, _ in columns:
        start_Q = np.cumsum(length_Q) - length_Q
        full_Q = length_Q == count_Q
        lone_Q = length_Q == 0
        lone_Q[length_Q == 1] = code_N[start_Q[length_Q == 1]] == 0
        if not (full_Q | lone_Q).all():
            row = int(np.argmin(full_Q | lone_Q))
            lengths = " and ".join(f"{name} {column[0][row]}" for name, column in zip(names, columns, strict=True))
            raise DataError(f"{label} row {numbers[row]}: the lists differ in length: {lengths}")
        present_N = full_Q[row_N]
        side_N = np.zeros(len(row_N), dtype=np.int64)
        side_N[present_N] = code_N[(start_Q[row_N] + place_N)[present_N]]
        codes.append(side_N)
    return Sides(row_N, columns[0][2], codes[0], columns[1][2], codes[1])


def _codes(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], NDArray[np.int64], pa.Array]:
    """A list column as (length of each list, code of each entry, distinct entries by code); code 0 is ""."""
    lengths = pc.list_value_length(column).to_numpy().astype(np.int64)
    code_N, distinct = numbered(pc.list_flatten(column))
    return lengths, code_N, distinct


def numbered(texts: pa.ChunkedArray) -> tuple[NDArray[np.int64], pa.Array]:
    """(code of each text, distinct texts by code); code 0 is ""."""
    entries = pa.chunked_array([pa.array([""], pa.large_string()), *texts.chunks]).combine_chunks().dictionary_encode()
    return entries.indices.to_numpy()[1:].astype(np.int64), entries.dictionary


def appearance(*codes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Number equal rows of parallel codes alike, in order of first appearance: (place of each distinct row's first, number of each row)."""
    identity_N = codes[0]
    for code_N in codes[1:]:  # millions of texts, millions of paths and thousands of instructions stay below 2^63
        identity_N = identity_N * (int(code_N.max(initial=0)) + 1) + code_N
    _, first, inverse_N = np.unique(identity_N, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return first[order], np.argsort(order).astype(np.int32)[inverse_N]
