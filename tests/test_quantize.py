"""Codes against their definitions, one row at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm2vec.errors import DataError, InputError, NonFiniteError
from vlm2vec.quantize import PRECISIONS, Codes, Quantized, exact, quantize, truncate
from vlm2vec.ranking import similarity


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def some(seed: int, count: int, dims: int) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(count, dims)))


def equal(left: Codes, right: Codes) -> bool:
    return np.array_equal(left.code_ND, right.code_ND) and left.factor_N.tobytes() == right.factor_N.tobytes()


def test_grid_is_finer_than_float32_at_one() -> None:
    rows = some(0, 50, 384)
    codes = exact(rows)
    assert np.array_equal(codes.code_ND, np.rint(codes.code_ND)) and set(codes.factor_N) == {2.0**-26}
    assert np.abs(codes.code_ND.astype(np.float64) * 2.0**-26 - rows).max() <= 2.0**-27
    assert exact([[2.0**-28, 1]]).code_ND.tolist() == [[0, 2**26]]


def test_sums_of_codes_are_exact() -> None:
    """Python's whole numbers are the oracle; sums of the rows themselves depend on the order in which they are taken."""
    query, target = some(1, 20, 1537), some(2, 20, 1537)
    order = np.random.default_rng(3).permutation(1537)
    plain = [a.astype(np.float64) @ b.astype(np.float64).T for a, b in ((query, target), (query[:, order], target[:, order]))]
    assert not np.array_equal(*plain)
    codes = [[[int(number) for number in row] for row in exact(rows).code_ND] for rows in (query, target)]
    sums = [[sum(a * b for a, b in zip(q, t, strict=True)) for t in codes[1]] for q in codes[0]]
    assert similarity(exact(query), exact(target)).tolist() == (np.array(sums, dtype=object) / 2**52).astype(np.float32).tolist()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), dims=st.integers(1, 33), precision=st.sampled_from(PRECISIONS))
def test_codes_and_scores_of_a_row_are_its_own(seed: int, dims: int, precision: str) -> None:
    rows = some(seed, 40, 33)
    asked, codes = quantize(rows[:5], dims, precision), quantize(rows, dims, precision)
    scores = similarity(asked, codes)
    shuffle = np.random.default_rng(seed).permutation(40)
    assert equal(quantize(rows[shuffle], dims, precision), codes[shuffle])
    assert np.array_equal(similarity(asked, codes[shuffle]), scores[:, shuffle])
    for index in (0, 17, 39):
        alone = quantize(np.asfortranarray(rows[[index]]), dims, precision)
        assert equal(alone, codes[index : index + 1])
        assert np.array_equal(similarity(asked, alone)[:, 0], scores[:, index])


@pytest.mark.parametrize("dims", [1, 7, 64, 200])
def test_truncated_rows_are_unit_rows_of_the_first_numbers(dims: int) -> None:
    rows = some(4, 30, 200)
    np.testing.assert_allclose(truncate(rows, dims), unit(rows[:, :dims].astype(np.float64)), atol=2e-7)
    cosine = [[np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)) for b in rows[:, :dims]] for a in rows[:, :dims]]
    codes = quantize(rows, dims)
    np.testing.assert_allclose(similarity(codes, codes), cosine, atol=1e-6)


def test_all_numbers_in_float32_are_the_rows_themselves() -> None:
    rows = some(5, 30, 64)
    assert equal(quantize(rows), exact(rows)) and equal(quantize(rows, 64), exact(rows))


def test_int8_by_hand_and_by_its_error() -> None:
    codes = quantize(np.float32([[0.8, -0.6, 0], [0, 0, 0]]), precision="int8")
    assert codes.code_ND.dtype == np.int8 and codes.code_ND.tolist() == [[127, -95, 0], [0, 0, 0]]  # -0.6 / 0.8 * 127 = -95.25
    assert codes.factor_N[0] == float(np.float32(0.8)) / 127 and codes.factor_N[1] > 0
    rows = some(6, 100, 256)
    codes = quantize(rows, precision="int8")
    back = codes.code_ND * codes.factor_N[:, None]
    assert np.abs(back - rows).max(axis=1) == pytest.approx(codes.factor_N / 2, rel=0.1)  # half a step at most, and nearly reached
    assert (np.abs(codes.code_ND).max(axis=1) == 127).all()
    np.testing.assert_allclose(similarity(codes, codes), back @ back.T, atol=1e-7)


@pytest.mark.parametrize("dims", [1, 2, 3, 7, 8, 31, 32, 384, 1000, 3072])
def test_binary_is_the_hamming_distance(dims: int) -> None:
    query, target = some(7, 6, dims), some(8, 40, dims)
    target[0] = query[0]
    target[1] = -query[0]
    codes = [quantize(rows, precision="binary") for rows in (query, target)]
    assert set(codes[0].code_ND.ravel()) <= {-1, 1}
    bits = [np.packbits(rows > 0, axis=1) for rows in (query, target)]
    hamming = [[sum(int(a ^ b).bit_count() for a, b in zip(q, t, strict=True)) for t in bits[1]] for q in bits[0]]
    scores = similarity(*codes)
    assert scores.tolist() == ((dims - 2 * np.array(hamming)) / dims).astype(np.float32).tolist()
    assert (scores[0, 0], scores[0, 1]) == (1, -1)


def test_zero_is_not_above_zero() -> None:
    assert quantize(np.float32([[0.0, -0.0, 1e-30, 1]]), precision="binary").code_ND.tolist() == [[-1, -1, 1, 1]]


def test_lazy_targets_are_coded_slice_by_slice() -> None:
    rows = some(9, 20, 16)
    lazy = Quantized(rows, 8, "int8")
    assert len(lazy) == 20 and equal(lazy[3:9], quantize(rows, 8, "int8")[3:9]) and len(lazy[15:99]) == 5
    rows[12, 0] = np.nan
    with pytest.raises(NonFiniteError, match="embedding of target 12 is NaN or infinite"):
        lazy[10:15]


@pytest.mark.parametrize("dims", [0, -1, 17])
def test_dims_must_be_there(dims: int) -> None:
    with pytest.raises(InputError, match=f"dims: expected 1 to 16, the size of the embeddings, got {dims}"):
        quantize(some(10, 2, 16), dims)


def test_what_cannot_be_coded_is_refused() -> None:
    with pytest.raises(InputError, match="unknown precision 'int4'; there are float32, int8, binary"):
        quantize(some(10, 2, 16), precision="int4")
    with pytest.raises(DataError, match="the first 2 numbers of row 1 are zero"):
        quantize(np.float32([[1, 0, 0], [0, 0, 1]]), 2)
    for precision in PRECISIONS:
        for dims in (None, 1):
            with pytest.raises(NonFiniteError, match="row 1 is NaN"):
                quantize(np.float32([[1, 0], [np.nan, 1]]), dims, precision)
            with pytest.raises(DataError, match="row 0 has length 2"):
                quantize(np.float32([[2, 0], [1, 0]]), dims, precision)
