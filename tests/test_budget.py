"""What a run settled about its chunks, in its folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.runs import final_bytes, start_run, tiny_recipe
from vlm2vec import budget, io
from vlm2vec.budget import CHUNKS, Budget
from vlm2vec.config import Recipe
from vlm2vec.errors import CheckpointError
from vlm2vec.trainer import LOG

WHOLE = Budget(chunk_tokens=1000, keep_tokens=5000, activation_checkpointing=False)


def open_recipe(run_dir: Path, steps: int) -> Recipe:
    recipe = tiny_recipe(run_dir, steps=steps)
    return replace(recipe, train=replace(recipe.train, chunk_tokens=None, keep_tokens=None, activation_checkpointing=None))


def test_less_is_kept_before_chunks_are_halved() -> None:
    sizes, now = [], WHOLE
    for _ in range(5):
        now = now.smaller()
        sizes.append((now.keep_tokens, now.chunk_tokens))
    assert sizes == [(2500, 1000), (1250, 1000), (0, 1000), (0, 500), (0, 250)]


def test_the_last_row_holds(tmp_path: Path) -> None:
    assert budget.read(tmp_path) is None
    WHOLE.write(tmp_path, 1, "tried out")
    WHOLE.smaller().write(tmp_path, 7, "memory was full")
    assert budget.read(tmp_path) == WHOLE.smaller()
    assert [(row["step"], row["why"]) for row in io.read_jsonl(tmp_path / CHUNKS)] == [(1, "tried out"), (7, "memory was full")]


@pytest.mark.parametrize("row", [{}, {"chunk_tokens": 1.5, "keep_tokens": 0, "activation_checkpointing": False}])
def test_a_row_of_another_kind_is_refused(row: dict, tmp_path: Path) -> None:
    io.append_jsonl(tmp_path / CHUNKS, row)
    with pytest.raises(CheckpointError, match=CHUNKS):
        budget.read(tmp_path)


def test_a_run_that_goes_on_has_the_same_chunks_and_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_run(open_recipe(tmp_path / "whole", steps=6))
    settled = budget.read(tmp_path / "whole")
    monkeypatch.setattr("vlm2vec.probe.try_out", lambda engine, batch: settled)  # chosen by time, which another run need not repeat
    start_run(open_recipe(tmp_path / "parts", steps=6))
    monkeypatch.setattr("vlm2vec.probe.try_out", pytest.fail)
    for path in (tmp_path / "parts").glob("step-000006/*"):
        path.unlink()
    (tmp_path / "parts" / "step-000006").rmdir()
    start_run(open_recipe(tmp_path / "parts", steps=6))
    assert len(io.read_jsonl(tmp_path / "parts" / CHUNKS)) == 1 and len(io.read_jsonl(tmp_path / "parts" / LOG)) == 6
    assert final_bytes(tmp_path / "whole") == final_bytes(tmp_path / "parts")
