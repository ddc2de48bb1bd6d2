"""Embeddings as whole numbers: what makes a score exact, and what a store of less precision or fewer dimensions would keep.

A row is whole numbers times one factor. Whole numbers add up without rounding in any order, so the dot product of two rows depends on the
two alone: not on the shape of a matrix product, the number of threads, nor the rows beside them. Every row is coded by itself:
    * "float32": numbers on a grid of 2^-26, an error below that of float32 at one.
    * "int8": -127..127, the factor such that the largest number of the row is 127.
    * "binary": +1 where a number is above zero, -1 elsewhere; the dot product is (dims - 2 x Hamming distance) / dims, in [-1, 1].
Fewer dimensions are the first ones, brought back to unit length (Matryoshka embeddings, arXiv 2205.13147).

Shape letters: N rows, D numbers of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlm2vec.errors import DataError, InputError, NonFiniteError

PRECISIONS = ("float32", "int8", "binary")
GRID = 2.0**26
Names = Sequence[int] | NDArray[np.int64] | None  # numbers of rows, for errors
LONGEST = 1.2  # of a row; the product of two then stays below 2^53 grid steps, up to which float64 holds every whole number


@dataclass(frozen=True, eq=False)
class Codes:
    """Rows `code_ND` x `factor_N`: whole numbers in any dtype that holds them, one float64 factor per row."""

    code_ND: NDArray[Any]
    factor_N: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.code_ND)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Codes:
        return Codes(self.code_ND[rows], self.factor_N[rows])


def exact(rows_ND: ArrayLike, what: str = "row", names: Names = None) -> Codes:
    """Unit rows (N, D) with every number rounded to a multiple of 2^-26.

    Raises NonFiniteError for NaN or infinity, DataError for a row much longer than one; row i is called `what` `names[i]`, or `what` i.
    """
    row_ND = np.asarray(rows_ND, dtype=np.float32)
    if row_ND.ndim != 2:
        raise DataError(f"embeddings of shape {row_ND.shape}; expected rows (N, D)")
    square_N = np.einsum("nd,nd->n", row_ND, row_ND)
    wrong_N = ~(square_N <= LONGEST**2)  # NaN included
    if wrong_N.any():
        worst = int(wrong_N.argmax())
        name = f"the embedding of {what} {worst if names is None else names[worst]}"
        if not np.isfinite(row_ND[worst]).all():
            raise NonFiniteError(f"{name} is NaN or infinite; nothing was ranked")
        raise DataError(f"{name} has length {np.sqrt(square_N[worst]):.3g}; expected unit rows")
    code_ND = row_ND * np.float32(GRID)
    return Codes(np.rint(code_ND, out=code_ND), np.full(len(code_ND), 1 / GRID))


def truncate(rows_ND: ArrayLike, dims: int | None, what: str = "row", names: Names = None) -> NDArray[np.float32]:
    """The first `dims` numbers of unit rows (N, D) at unit length, float32; the rows as they are for all D or None.

    Raises InputError for `dims` outside 1..D, DataError where nothing but zeros would be left, and what `exact` raises.
    """
    row_ND = np.asarray(rows_ND, dtype=np.float32)
    if dims is None or dims == row_ND.shape[-1]:
        return row_ND
    if not 1 <= dims <= row_ND.shape[-1]:
        raise InputError(f"dims: expected 1 to {row_ND.shape[-1]}, the size of the embeddings, got {dims}")
    short_ND = exact(row_ND, what, names).code_ND[:, :dims].astype(np.float64)
    length_N = np.sqrt((short_ND**2).sum(axis=1))  # squares of whole numbers: the sum is exact
    if not length_N.all():
        zero = int(length_N.argmin())
        raise DataError(f"the first {dims} numbers of {what} {zero if names is None else names[zero]} are zero; use more dims")
    return (short_ND / length_N[:, None]).astype(np.float32)


def quantize(rows_ND: ArrayLike, dims: int | None = None, precision: str = "float32", what: str = "row", names: Names = None) -> Codes:
    """What a store keeps of unit rows (N, D), with as many numbers as `dims` says and in `precision`; errors as for `truncate`."""
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}; there are {', '.join(PRECISIONS)}")
    row_ND = truncate(rows_ND, dims, what, names)
    codes = exact(row_ND, what, names)
    if precision == "int8":
        peak_N = np.abs(row_ND).max(axis=1).astype(np.float64)
        factor_N = np.where(peak_N > 0, peak_N, 1) / 127
        return Codes(np.rint(row_ND / factor_N[:, None]).astype(np.int8), factor_N)
    if precision == "binary":
        return Codes(np.where(row_ND > 0, 1, -1).astype(np.int8), np.full(len(row_ND), row_ND.shape[1] ** -0.5))
    return codes


@dataclass(frozen=True, eq=False)
class Quantized:
    """Targets as `quantize` gives them, slice by slice as they are read: for corpora that do not fit in memory.

    `rows` is an (N, D) array or anything else with a length whose slices are rows.
    """

    rows: Any
    dims: int | None = None
    precision: str = "float32"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> Codes:
        return quantize(self.rows[part], self.dims, self.precision, "target", range(*part.indices(len(self))))
