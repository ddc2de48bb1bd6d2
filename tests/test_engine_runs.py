"""Whole runs on two ranks: they save what one process saves, resume bit for bit, stop together and say why."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.parity import warm_up
from tests.ranks import fork_ranks
from tests.runs import final_bytes, start_run, tiny_recipe
from vlm2vec import checkpoint, dist, io
from vlm2vec.config import Recipe
from vlm2vec.encoder import Encoder
from vlm2vec.engines import launch
from vlm2vec.engines.base import Engine
from vlm2vec.engines.together import ending_together
from vlm2vec.errors import DataError, EnvError, Vlm2VecError
from vlm2vec.signals import StopSignal
from vlm2vec.step import CHUNKS, Step
from vlm2vec.trainer import LOG, _batches, mixture_of, prepare_run_dir, train

ENGINES = ["ddp", "fsdp2", "zero1", "zero3"]
LORA = "{rank: 4, dropout: 0.1}"
FULL = {"lora": "null", "parts": "[language, projector, vision]"}


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    warm_up()


def recipe_of(run_dir: Path, engine: str | None = None, steps: int = 5, lora: str = LORA, **keys: Any) -> Recipe:
    recipe = tiny_recipe(run_dir, lora=lora, steps=steps, **keys)
    return replace(recipe, train=replace(recipe.train, engine=engine, warmup=0), checkpoint=replace(recipe.checkpoint, every=2))


def run(recipe: Recipe, prepare: Callable[[], None] = lambda: None, rank: int = 0) -> None:
    """One rank of `vlm2vec train`, less evaluation: ends with the exit code of the command line."""
    try:
        recipe = launch.start(recipe)
        with ending_together(), StopSignal() as stop:
            if dist.is_main():
                prepare_run_dir(recipe)
            dist.barrier()
            prepare()
            train(recipe, stop)
    except Vlm2VecError as error:
        os.write(2, f"error: {error}\n".encode())
        os._exit(error.exit_code)


def run_on_ranks(recipe: Recipe, prepare: Callable[[], None] = lambda: None, world: int = 2) -> list[int]:
    return fork_ranks(partial(run, recipe, prepare), world)


def stop_at(step: int, on_rank: int = 1, number: int = signal.SIGTERM) -> Callable[[], None]:
    """A signal to one rank while it takes `step` (counted from 0)."""

    def prepare() -> None:
        real = Step.__call__

        def call(self: Step, current: int, *rest: Any) -> Any:
            if current == step and dist.rank() == on_rank:
                os.kill(os.getpid(), number)
            return real(self, current, *rest)

        Step.__call__ = call  # type: ignore[method-assign]

    return prepare


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_resumes_bit_for_bit(engine: str, kind: str, tmp_path: Path) -> None:
    keys = FULL if kind == "full" else {}
    whole, cut = recipe_of(tmp_path / "whole", engine, **keys), recipe_of(tmp_path / "cut", engine, **keys)
    assert run_on_ranks(whole) == [0, 0]
    assert run_on_ranks(cut, stop_at(2)) == [143, 143]
    assert checkpoint.latest(tmp_path / "cut") == tmp_path / "cut" / "step-000003"
    assert run_on_ranks(cut) == [0, 0]
    assert final_bytes(tmp_path / "cut") == final_bytes(tmp_path / "whole")


@pytest.mark.parametrize("keys", [{"lora": "{rank: 4}"}, FULL], ids=["lora", "full"])
def test_all_engines_write_the_checkpoint_of_one_process(keys: dict[str, str], tmp_path: Path) -> None:
    """The same files and tensors up to rounding, whoever wrote them, and `Encoder.from_pretrained` reads them."""
    start_run(recipe_of(tmp_path / "one", **keys))
    expected = tensors(tmp_path / "one")
    for engine in ENGINES:
        assert run_on_ranks(recipe_of(tmp_path / engine, engine, **keys)) == [0, 0]
        found = tensors(tmp_path / engine)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(
                found[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, name=name, engine=engine: f"{engine} {name}: {text}"
            )
        rows = [Encoder.from_pretrained(tmp_path / folder / "step-000005").encode(["a", "b c"]) for folder in ("one", engine)]
        torch.testing.assert_close(*rows, rtol=0, atol=1e-4)


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint."""
    files = sorted((run_dir / "step-000005").glob("*.safetensors"))
    return {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


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
@pytest.mark.parametrize("world", [1, 2, 4])
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
        by_rank.append([batch.pair_ids for _, batches in _batches(recipe, mixture, encoder, 1, 4) for batch in batches])
    found = [[name for ids in of_ranks for name in ids] for of_ranks in zip(*by_rank, strict=True)]
    assert found == [mixture.batch_ids(index) for index in range(2, 8)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_any_rank_ends_all_after_the_same_step(number: int, tmp_path: Path) -> None:
    rank = number % 2
    assert run_on_ranks(recipe_of(tmp_path), stop_at(1, rank, number)) == [128 + number] * 2
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000002"
    assert len(io.read_jsonl(tmp_path / LOG)) == 2


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("error", [DataError("row 7 is broken"), KeyError("row 8")], ids=["ours", "any"])
def test_an_error_of_one_rank_ends_the_others_with_its_words(
    error: Exception, engine: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def prepare() -> None:
        real = Step._embed

        def embed(self: Step, *rest: Any) -> torch.Tensor:
            if dist.rank() == 1:
                raise error
            return real(self, *rest)

        Step._embed = embed  # type: ignore[method-assign]

    started = time.monotonic()
    codes = run_on_ranks(recipe_of(tmp_path, engine), prepare)
    assert time.monotonic() - started < 20
    assert codes == ([2, 2] if isinstance(error, DataError) else [1, 70])
    assert str(error) in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("where", ["embedding", "gradient"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_a_nan_on_one_rank_stops_all_before_the_optimizer(engine: str, where: str, tmp_path: Path) -> None:
    def prepare() -> None:
        embed, reduce, call, now = Encoder.embed, Engine.reduce, Step.__call__, {"step": -1}

        def poisoned(self: Encoder, batch: Any) -> torch.Tensor:
            rows = embed(self, batch)
            if where == "embedding" and now["step"] == 2 and dist.rank() == 1:
                raise_unless_finite(rows * float("nan"))
            return rows

        def poisoned_reduce(self: Engine) -> None:
            if where == "gradient" and now["step"] == 2 and dist.rank() == 1:
                parameter = self.parameters["encoder." + next(name for name, _ in self.encoder.model.named_parameters() if "lora" in name)]
                grad = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
                assert grad is not None
                grad.view(-1)[0] = float("nan")
            reduce(self)

        def counted(self: Step, step: int, *rest: Any) -> Any:
            now["step"] = step
            return call(self, step, *rest)

        Encoder.embed, Engine.reduce, Step.__call__ = poisoned, poisoned_reduce, counted  # type: ignore[method-assign]

    assert run_on_ranks(recipe_of(tmp_path, engine), prepare) == [3, 3]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000002"
    dumped = json.loads((tmp_path / "nonfinite-3.json").read_text())
    assert dumped["pair_ids"] == [mixture_of(recipe_of(tmp_path)).batch_ids(2)]
    assert dumped["rank"] == (1 if where == "embedding" else 0)


def raise_unless_finite(rows: torch.Tensor) -> None:
    from vlm2vec.pooling import normalize

    normalize(rows)


def fill_memory(step: int, on_rank: int, chunk: int, second_pass: bool, times: int = 1) -> Callable[[], None]:
    """Out of memory at the `chunk`-th chunk of a pass of a step on one rank."""

    def prepare() -> None:
        embed, backward, call, now = Step._embed, Engine.backward, Step.__call__, {"step": -1, "chunk": 0, "left": times}

        def full() -> None:
            if now["step"] == step and dist.rank() == on_rank and now["left"] and now["chunk"] == chunk:
                now["left"] -= 1
                now["chunk"] = -1
                raise torch.OutOfMemoryError("CUDA out of memory (made up)")
            now["chunk"] += 1

        def counted_embed(self: Step, *rest: Any) -> torch.Tensor:
            if not second_pass and not torch.is_grad_enabled():
                full()
            return embed(self, *rest)

        def counted_backward(self: Engine, *rest: Any) -> None:
            if second_pass:
                full()
            backward(self, *rest)

        def counted_call(self: Step, current: int, *rest: Any) -> Any:
            now["step"], now["chunk"] = current, 0
            return call(self, current, *rest)

        Step._embed, Engine.backward, Step.__call__ = counted_embed, counted_backward, counted_call  # type: ignore[method-assign]

    return prepare


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
@pytest.mark.parametrize(("chunk", "second_pass"), [(0, False), (2, False), (0, True), (2, True)])
def test_a_full_memory_shrinks_the_chunks_and_nothing_else(engine: str, chunk: int, second_pass: bool, tmp_path: Path) -> None:
    keys = {"lora": "{rank: 4}", "steps": 3}
    assert run_on_ranks(recipe_of(tmp_path / "calm", engine, **keys)) == [0, 0]
    assert run_on_ranks(recipe_of(tmp_path / "full", engine, **keys), fill_memory(1, 1, chunk, second_pass)) == [0, 0]
    assert io.read_jsonl(tmp_path / "full" / CHUNKS) == [{"step": 2, "from": 160, "to": 80}]
    calm, full = (io.read_jsonl(tmp_path / name / LOG) for name in ("calm", "full"))
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in full] == pytest.approx([row[key] for row in calm], rel=1e-5)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_where_ranks_meet_in_chunks_a_full_memory_ends_the_run_and_the_next_start_has_smaller_ones(
    engine: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tmp_path, engine, lora="{rank: 4}", steps=4)
    assert run_on_ranks(recipe, fill_memory(2, 1, 1, second_pass=False)) == [EnvError.exit_code] * 2
    assert "run the same command to go on" in capfd.readouterr().err.splitlines()[-1]
    assert io.read_jsonl(tmp_path / CHUNKS) == [{"step": 3, "from": 160, "to": 80}]
    assert run_on_ranks(recipe) == [0, 0]
    start_run(recipe_of(tmp_path / "one", lora="{rank: 4}", steps=4))
    losses = [[row["loss"] for row in io.read_jsonl(folder / LOG)] for folder in (tmp_path, tmp_path / "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_one_item_that_does_not_fit_ends_the_run(tmp_path: Path) -> None:
    assert run_on_ranks(recipe_of(tmp_path, "ddp", lora="{rank: 4}"), fill_memory(0, 0, 0, False, times=100)) == [EnvError.exit_code] * 2


def test_a_disk_that_refuses_rank_0_ends_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def prepare() -> None:
        if dist.is_main():
            os.environ["VLM2VEC_FAULT"] = "before-rename:1:enospc"

    assert run_on_ranks(recipe_of(tmp_path, "ddp"), prepare) == [EnvError.exit_code] * 2
    assert "No space left" in capfd.readouterr().err.splitlines()[-1]
