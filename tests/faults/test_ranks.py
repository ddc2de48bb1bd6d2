"""What goes wrong on one rank: all stop at the same step, before harm, say why, and have something to go on from."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity import engines, warm_up
from tests.rank_runs import recipe_of, run_on_ranks, stop_at
from tests.runs import start_run
from vlm2vec import checkpoint, dist, io
from vlm2vec.budget import CHUNKS
from vlm2vec.encoder import Encoder
from vlm2vec.engines.base import Engine
from vlm2vec.errors import DataError, EnvError
from vlm2vec.step import Step
from vlm2vec.trainer import LOG, mixture_of

FULL = {"why": "memory was full", "chunk_tokens": 80, "keep_tokens": 0, "activation_checkpointing": False}


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    warm_up()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_any_rank_ends_all_after_the_same_step(number: int, tmp_path: Path) -> None:
    rank = number % 2
    assert run_on_ranks(recipe_of(tmp_path), stop_at(1, rank, number)) == [128 + number] * 2
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000002"
    assert len(io.read_jsonl(tmp_path / LOG)) == 2


@pytest.mark.parametrize("engine", [*engines("ddp"), *engines("fsdp2", mark=pytest.mark.faults)])
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


def test_a_rank_that_hears_nothing_is_ended_too(tmp_path: Path) -> None:
    """It waits for something else than the other ranks, so that no broken connection tells it."""

    def prepare() -> None:
        def embed(self: Step, *rest: Any) -> torch.Tensor:
            if dist.rank() == 1:
                raise DataError("row 7 is broken")
            time.sleep(60)
            raise AssertionError("nobody ended this rank")

        Step._embed = embed  # type: ignore[method-assign]

    started = time.monotonic()
    assert run_on_ranks(recipe_of(tmp_path), prepare) == [2, 2]
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("where", ["embedding", "gradient"])
@pytest.mark.parametrize("engine", [*engines("ddp", "fsdp2"), *engines("zero2", "zero3", mark=pytest.mark.faults)])
def test_a_nan_on_one_rank_stops_all_before_the_optimizer(engine: str, where: str, tmp_path: Path) -> None:
    def prepare() -> None:
        embed, reduce, call, now = Encoder.embed, Engine.reduce, Step.__call__, {"step": -1}

        def poisoned(self: Encoder, batch: Any) -> torch.Tensor:
            rows = embed(self, batch)
            if where == "embedding" and now["step"] == 2 and dist.rank() == 1:
                return rows * float("nan")
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


@pytest.mark.parametrize("engine", [*engines("ddp"), *engines("zero2", mark=pytest.mark.faults)])
@pytest.mark.parametrize(
    ("chunk", "second_pass"), [(2, True), *(pytest.param(*where, marks=pytest.mark.slow) for where in ((0, False), (2, False), (0, True)))]
)
def test_a_full_memory_shrinks_the_chunks_and_nothing_else(engine: str, chunk: int, second_pass: bool, tmp_path: Path) -> None:
    keys = {"lora": "{rank: 4}", "steps": 3}
    assert run_on_ranks(recipe_of(tmp_path / "calm", engine, **keys)) == [0, 0]
    assert run_on_ranks(recipe_of(tmp_path / "full", engine, **keys), fill_memory(1, 1, chunk, second_pass)) == [0, 0]
    assert io.read_jsonl(tmp_path / "full" / CHUNKS) == [{"step": 2, **FULL}]
    calm, full = (io.read_jsonl(tmp_path / name / LOG) for name in ("calm", "full"))
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in full] == pytest.approx([row[key] for row in calm], rel=1e-5)


@pytest.mark.parametrize("engine", [*engines("fsdp2", mark=pytest.mark.slow), *engines("zero3", mark=pytest.mark.faults)])
def test_where_ranks_meet_in_chunks_a_full_memory_ends_the_run_and_the_next_start_has_smaller_ones(
    engine: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tmp_path, engine, lora="{rank: 4}", steps=4)
    assert run_on_ranks(recipe, fill_memory(2, 1, 1, second_pass=False)) == [EnvError.exit_code] * 2
    assert "run the same command to go on" in capfd.readouterr().err.splitlines()[-1]
    assert io.read_jsonl(tmp_path / CHUNKS) == [{"step": 3, **FULL}]
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
