"""The list of bad pairs: each once, in order, cut back to the checkpoint on resuming, and an end when they are too many."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm2vec.data.bad import FILE, BadPair, BadPairs, too_many
from vlm2vec.errors import DataError
from vlm2vec.io import read_jsonl


def bad(row: int, reason: str = "no such file: /data/x.png") -> BadPair:
    return BadPair(f"s:{row}", f"s row {row}: image '{row}.png': {reason}", f"s:{row + 1}")


def ids(folder: Path) -> list[tuple[int, str]]:
    return [(row["step"], row["id"]) for row in read_jsonl(folder / FILE)]


def test_each_pair_is_listed_once(tmp_path: Path) -> None:
    pairs = BadPairs(tmp_path, allowed=5, start=0)
    pairs.add(1, [bad(3), bad(3)])
    pairs.add(2, [bad(3), bad(4)])
    assert ids(tmp_path) == [(1, "s:3"), (2, "s:4")]
    assert read_jsonl(tmp_path / FILE)[0] == {
        "step": 1, "id": "s:3", "reason": "s row 3: image '3.png': no such file: /data/x.png", "replaced_by": "s:4",
    }  # fmt: skip


def test_what_was_met_after_the_checkpoint_is_forgotten_on_resuming(tmp_path: Path) -> None:
    BadPairs(tmp_path, allowed=5, start=0).add(2, [bad(3)])
    BadPairs(tmp_path, allowed=5, start=2).add(3, [bad(4)])
    resumed = BadPairs(tmp_path, allowed=2, start=2)
    assert ids(tmp_path) == [(2, "s:3")]
    resumed.add(3, [bad(3), bad(4)])
    with pytest.raises(DataError):
        resumed.add(4, [bad(5)])


def test_a_run_without_bad_pairs_leaves_no_file(tmp_path: Path) -> None:
    BadPairs(tmp_path, allowed=0, start=0).add(1, [])
    assert not (tmp_path / FILE).exists()


def test_the_one_too_many_is_listed_and_ends_the_run_with_a_table(tmp_path: Path) -> None:
    pairs = BadPairs(tmp_path, allowed=2, start=0)
    with pytest.raises(DataError, match=r"step 7: 3 pairs, listed in .*bad_samples.jsonl, have pictures .*") as caught:
        pairs.add(7, [bad(1), bad(2, "not an image (looks like HTML, 132 bytes)"), bad(3), bad(4)])
    assert "\n       2  no such file\n       1  not an image (looks like HTML, N bytes)" in str(caught.value)
    assert len(ids(tmp_path)) == 3


def test_reasons_are_counted_by_kind() -> None:
    reasons = [bad(row, f"image has {row}x{row} = {row * row:,} pixels, at most 64,000,000 are read").reason for row in (9000, 20000)]
    reasons += ["s row 1: image '../x': path leaves root: '../x': holds a '..' part (root: /d)"]
    lines = str(too_many(reasons, "3 pairs")).splitlines()
    assert lines[1:] == ["       2  image has N = N pixels, at most N are read", "       1  path leaves root"]
