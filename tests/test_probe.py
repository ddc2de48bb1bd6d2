"""Trying chunks out: a made-up device with a speed for each size shows what is chosen; a real model shows what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import tiny_recipe
from vlm2vec import memory, probe
from vlm2vec.batch import Batch, make_batch
from vlm2vec.budget import Budget
from vlm2vec.config import TrainConfig
from vlm2vec.engines import Engine, prepare
from vlm2vec.errors import EnvError
from vlm2vec.losses import InfoNCE
from vlm2vec.probe import SPARE, Trial, settle, typical
from vlm2vec.trainer import load_encoder, mixture_of

EVEN = [64] * 512  # 32,768 tokens without padding
OPEN: dict[str, Any] = {"chunk_tokens": None, "keep_tokens": None, "activation_checkpointing": None}


def options(**keys: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 1, "global_batch": 4, "lr": 1.0, **OPEN, **keys})


class Device:
    """A chunk costs `start` seconds and one per token; a graph has 10 bytes a token, recomputed 1, and a third more time."""

    def __init__(self, lengths: Sequence[int], start: float, memory: float = float("inf")) -> None:
        self.lengths, self.start, self.memory = lengths, start, memory
        self.sizes: list[int] = []

    def __call__(self, rows: Sequence[int], recomputed: bool) -> Trial:
        tokens = len(rows) * max(self.lengths[row] for row in rows)
        graph = tokens * (1 if recomputed else 10)
        if graph > self.memory:
            raise torch.OutOfMemoryError("made up")
        self.sizes.append(tokens)
        return Trial(tokens, (self.start + tokens) * (4 / 3 if recomputed else 1), graph, 2 * graph)


@pytest.mark.parametrize(("start", "size"), [(0, 512), (100, 2048), (1000, 16384)])
def test_the_smallest_chunk_within_three_percent_of_the_fastest(start: float, size: int) -> None:
    """Sizes are doubled while that gains 3 %: with 100 seconds to start, 512 to 4096 take 1.195, 1.098, 1.049 and 1.024 a token."""
    found = settle(options(), EVEN, Device(EVEN, start), room=10**9)
    assert (found.chunk_tokens, found.activation_checkpointing) == (size, False)


def test_padding_counts() -> None:
    """As many tokens in items of every length: a large chunk is fast a token, and many of its tokens are padding."""
    lengths = list(range(16, 1024, 16))
    even, uneven = (settle(options(), rows, Device(rows, 1000), room=10**9).chunk_tokens for rows in (EVEN, lengths))
    assert uneven < even


def test_sizes_stop_where_memory_does() -> None:
    device = Device(EVEN, start=1000, memory=10 * 2048)
    assert settle(options(activation_checkpointing=False), EVEN, device, room=10**9).chunk_tokens == 2048
    assert max(device.sizes) == 2048


def test_activations_are_recomputed_only_where_larger_chunks_win() -> None:
    """Room for 512 tokens, or 5,120 recomputed: worth a third more time only where starting a chunk takes long."""
    found = [settle(options(), EVEN, Device(EVEN, start, memory=10 * 512), room=0) for start in (50, 5000)]
    assert found == [Budget(512, 0, False), Budget(4096, 0, True)]


def test_what_is_given_stays() -> None:
    device = Device(EVEN, start=1000)
    given = options(chunk_tokens=1024, keep_tokens=7, activation_checkpointing=True)
    assert settle(given, EVEN, device, room=10**9) == Budget(1024, 7, True) and set(device.sizes) == {1024}


def test_graphs_are_kept_as_far_as_the_room_goes() -> None:
    """What is left beside one chunk at its peak and a share to spare, at 10 bytes a token."""
    found = settle(options(chunk_tokens=512, activation_checkpointing=False), EVEN, Device(EVEN, 0), room=10**6)
    assert found.keep_tokens == int(((1 - SPARE) * 10**6 - 2 * 10 * 512) / 10)
    assert settle(options(chunk_tokens=512), EVEN, Device(EVEN, 0), room=100).keep_tokens == 0


def test_the_longest_items_must_fit_too() -> None:
    """The typical chunk fits and that of the longest items does not: chunks are halved; a single item that does not fit is an error."""
    lengths = [48] * 40 + [16] * 500

    class Hungry(Device):
        def __call__(self, rows: Sequence[int], recomputed: bool) -> Trial:
            if max(lengths[row] for row in rows) == 48 and len(rows) > 5:
                raise torch.OutOfMemoryError("made up")
            return super().__call__(rows, recomputed)

    assert settle(options(chunk_tokens=1024), lengths, Hungry(lengths, 0), room=0).chunk_tokens == 256
    with pytest.raises(EnvError, match="one item of 64 tokens"):
        settle(options(), EVEN, Device(EVEN, 0, memory=0), room=0)


def test_the_typical_chunk_holds_the_middle_token() -> None:
    rows, batch = typical([10, 100, 10, 100, 10], 100)
    assert rows in ([1], [3]) and batch == 230
    assert typical([10, 100, 10, 100, 10], 100, packed=True) == ([3], 230)


# -- on a model


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    recipe = tiny_recipe(tmp_path_factory.mktemp("run"))
    recipe = replace(recipe, train=replace(recipe.train, chunk_tokens=None, keep_tokens=None))
    encoder = load_encoder(recipe, None)
    return prepare(recipe.train, encoder, InfoNCE(recipe.loss))


@pytest.fixture(scope="module")
def batch(engine: Engine) -> Batch:
    return make_batch(mixture_of(tiny_recipe(Path("unused"))).pairs(0), engine.encoder.processor)


def test_trying_out_leaves_no_trace(engine: Engine, batch: Batch) -> None:
    before = {name: parameter.clone() for name, parameter in engine.parameters.items()}
    state = torch.get_rng_state()
    found = probe.try_out(engine, batch)
    assert found.chunk_tokens >= probe.SMALLEST and found.keep_tokens > 10**4 and not found.activation_checkpointing
    assert torch.equal(state, torch.get_rng_state()) and not engine.optimizer.state
    assert all(parameter.grad is None and torch.equal(parameter, before[name]) for name, parameter in engine.parameters.items())


def test_the_graph_is_what_autograd_holds() -> None:
    """A product of (8, 16) by (16, 4) keeps its two factors, one of which is a weight, and tanh what it gave."""
    weight = torch.ones(16, 4, requires_grad=True)
    rows = torch.ones(8, 16)
    trial = probe.measure(lambda: (rows @ weight).tanh(), [weight], [weight], tokens=8)
    assert trial.graph == 4 * (8 * 16 + 8 * 4) and trial.tokens == 8 and weight.grad is None


@pytest.mark.parametrize("recomputed", [False, True])
def test_the_graph_grows_with_the_chunk(recomputed: bool, engine: Engine, batch: Batch) -> None:
    encoder, weights = engine.encoder, list(engine.encoder.model.parameters())
    encoder.recompute_activations(recomputed)

    def graph(count: int) -> int:
        inputs = encoder.processor.collate([batch.features[0]] * count)
        return probe.measure(lambda: engine.embed(inputs), list(engine.parameters.values()), weights, 1).graph

    one, four = graph(1), graph(4)
    assert 2 * one < four < 4.1 * one
    encoder.recompute_activations(False)


def test_where_ranks_meet_nothing_is_tried(engine: Engine, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "meets", True, raising=False)
    monkeypatch.setattr(engine.encoder, "embed", pytest.fail)
    monkeypatch.setattr(engine, "options", options(chunk_tokens=777))
    assert probe.try_out(engine, batch) == Budget(777, 0, False)


def test_memory_of_processes_that_share_a_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    whole = memory.available(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 2**26 < memory.available(torch.device("cpu")) < whole / 3
    for limit, used, left in (("max", "5", 1 << 62), ("100", "30", 70)):
        (tmp_path / memory.LIMIT).write_text(limit + "\n")
        (tmp_path / memory.USED).write_text(used + "\n")
        assert memory.left_in_container(tmp_path) == left
    assert memory.left_in_container(tmp_path / "none") == 1 << 62
