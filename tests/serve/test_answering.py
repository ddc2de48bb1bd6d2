"""Rows to JSON and back, to the last bit."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from vlm2vec.serve.answering import PIECE, pieces


@pytest.mark.parametrize("as_base64", [False, True])
@pytest.mark.parametrize("shape", [(1, 3), (40, 700)])
def test_every_bit_arrives(shape: tuple[int, int], as_base64: bool) -> None:
    rows_ND = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    rows_ND[0, 0] = np.float32(1e-40)  # subnormal
    made = list(pieces(rows_ND, 'a "name"', 12, as_base64))
    answer = json.loads(b"".join(made))
    assert answer["object"] == "list" and answer["model"] == 'a "name"' and answer["usage"] == {"prompt_tokens": 12, "total_tokens": 12}
    assert [(row["object"], row["index"]) for row in answer["data"]] == [("embedding", index) for index in range(shape[0])]
    values = [row["embedding"] for row in answer["data"]]
    found = [np.frombuffer(base64.b64decode(value), "<f4") if as_base64 else np.float32(value) for value in values]
    assert np.array_equal(np.stack(found), rows_ND)
    assert max(map(len, made)) < PIECE + 40 * shape[1]


def test_not_a_number_is_never_written() -> None:
    with pytest.raises(ValueError):
        list(pieces(np.float32([[np.nan]]), "m", 1, False))
