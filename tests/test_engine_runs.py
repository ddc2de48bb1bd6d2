"""Whole runs on several ranks: they read the pairs of one process, save what it saves, and resume bit for bit."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.parity import engines, warm_up
from tests.rank_runs import FULL, recipe_of, run_on_ranks, stop_at
from tests.runs import final_bytes, start_run
from vlm2vec import checkpoint, dist, io
from vlm2vec.encoder import Encoder
from vlm2vec.feed import read_steps
from vlm2vec.trainer import LOG, mixture_of


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    warm_up()


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("engine", engines("ddp", "fsdp2", "zero1", "zero2", "zero3"))
def test_a_run_resumes_bit_for_bit(engine: str, keys: dict[str, str], tmp_path: Path) -> None:
    whole, cut = recipe_of(tmp_path / "whole", engine, **keys), recipe_of(tmp_path / "cut", engine, **keys)
    assert run_on_ranks(whole) == [0, 0]
    assert run_on_ranks(cut, stop_at(2)) == [143, 143]
    assert checkpoint.latest(tmp_path / "cut") == tmp_path / "cut" / "step-000003"
    assert run_on_ranks(cut) == [0, 0]
    assert final_bytes(tmp_path / "cut") == final_bytes(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("engine", engines("ddp", "fsdp2", "zero1", "zero2", "zero3"))
@pytest.mark.parametrize("keys", [{"lora": "{rank: 4}"}, FULL], ids=["lora", "full"])
def test_all_engines_write_the_checkpoint_of_one_process(keys: dict[str, str], engine: str, tmp_path: Path) -> None:
    """The same files and tensors up to rounding, whoever wrote them, and `Encoder.from_pretrained` reads them."""
    start_run(recipe_of(tmp_path / "one", **keys))
    assert run_on_ranks(recipe_of(tmp_path / engine, engine, **keys)) == [0, 0]
    expected, found = tensors(tmp_path / "one"), tensors(tmp_path / engine)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-5)] == []
    rows = [Encoder.from_pretrained(tmp_path / folder / "step-000005").encode(["a", "b c"]) for folder in ("one", engine)]
    torch.testing.assert_close(*rows, rtol=0, atol=1e-4)


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint."""
    files = sorted((run_dir / "step-000005").glob("*.safetensors"))
    return {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra deepspeed")
def test_a_run_goes_on_under_another_engine_and_another_number_of_processes(tmp_path: Path) -> None:
    """Two ranks under ZeRO-3, four under DDP, two under FSDP2, one alone: one run, the same to rounding."""
    keys = {"lora": "{rank: 4}", "steps": 8}
    start_run(recipe_of(tmp_path / "one", **keys))
    parts = [("zero3", 2, stop_at(1)), ("ddp", 4, stop_at(3)), ("fsdp2", 2, stop_at(5)), (None, 1, lambda: None)]
    for engine, world, prepare in parts:
        codes = run_on_ranks(recipe_of(tmp_path / "parted", engine, **keys), prepare, world)
        assert codes == [143 if engine else 0] * world
    rows = [io.read_jsonl(tmp_path / name / LOG) for name in ("one", "parted")]
    assert [row["step"] for row in rows[1]] == list(range(1, 9))
    assert [row["loss"] for row in rows[1]] == pytest.approx([row["loss"] for row in rows[0]], rel=1e-4)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_processes_and_workers_reads_the_same_pairs(
    world: int, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path)
    recipe = replace(recipe, data=replace(recipe.data, workers=workers), train=replace(recipe.train, accumulate=2))
    mixture, encoder = mixture_of(recipe), Encoder.from_pretrained("builtin/tiny-qwen2_vl")
    monkeypatch.setattr(dist, "world_size", lambda: world)
    by_rank = []
    for rank in range(world):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        by_rank.append([batch.pair_ids for _, batches in read_steps(recipe, mixture, encoder.processor, 1, 4) for batch in batches])
    found = [[name for ids in of_ranks for name in ids] for of_ranks in zip(*by_rank, strict=True)]
    assert found == [mixture.batch_ids(index) for index in range(2, 8)]
