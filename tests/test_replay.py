"""Replayed modules: run once, handed out bit for bit, never at the expense of the gradient."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlm2vec.errors import Vlm2VecError
from vlm2vec.replay import Replay, leading_frozen

Named = namedtuple("Named", "first second")


class Tower(nn.Module):
    """A frozen module in evaluation mode; `shape` says what its output looks like."""

    def __init__(self, shape=lambda features: features) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.shape = shape
        self.eval().requires_grad_(False)

    def forward(self, pixels):
        return self.shape(self.layer(pixels).cos())


def pixels(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))


def test_runs_once_per_chunk_and_returns_the_same_bits():
    tower = Tower()
    expected = [tower(pixels(index)) for index in range(3)]
    with Replay([tower]) as replay:
        for visit in range(2):
            for index in range(3):
                with torch.set_grad_enabled(visit == 1), replay.chunk(index):
                    assert torch.equal(tower(pixels(index)), expected[index])
    assert replay.runs == [3]


def test_later_calls_in_a_chunk_get_their_own_output():
    tower, projector = Tower(), Tower()
    with Replay([tower, projector]) as replay:
        for _ in range(2):
            with replay.chunk("all"):
                assert torch.equal(tower(pixels(1)), tower.layer(pixels(1)).cos())
                assert torch.equal(projector(pixels(1)), projector.layer(pixels(1)).cos())
                assert torch.equal(tower(pixels(2)), tower.layer(pixels(2)).cos())
    assert replay.runs == [2, 1]


SHAPES = {
    "tuple": lambda t: (t, (t + 1, None)),
    "named tuple": lambda t: Named(t, [t + 1]),
    "list": lambda t: [t, {"deep": t + 1}],
    "dict": lambda t: {"a": t, "n": 7, "b": [t + 1]},
    "ModelOutput": lambda t: BaseModelOutputWithPooling(last_hidden_state=t, hidden_states=(t + 1, t + 2)),
}


def flat(value) -> list:
    if isinstance(value, dict):
        return [leaf for key, part in value.items() for leaf in (key, *flat(part))]
    return [leaf for part in value for leaf in flat(part)] if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_nested_outputs(shape):
    tower = Tower(shape)
    expected = tower(pixels())
    with Replay([tower]) as replay:
        for _ in range(2):
            with replay.chunk(0):
                found = tower(pixels())
            assert type(found) is type(expected)
            assert len(flat(found)) == len(flat(expected))
            for left, right in zip(flat(found), flat(expected), strict=True):
                assert torch.equal(left, right) if isinstance(right, torch.Tensor) else left == right
    assert replay.runs == [1]


def test_putting_something_else_into_a_returned_container_does_no_harm():
    """transformers stores the projector's output in the output of the tower."""
    tower = Tower(SHAPES["ModelOutput"])
    with Replay([tower]) as replay:
        for _ in range(2):
            with replay.chunk(0):
                output = tower(pixels())
            assert output.pooler_output is None
            output.pooler_output = output.last_hidden_state + 5
            output["last_hidden_state"] = output.last_hidden_state * 2


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_forward_is_restored_and_outputs_dropped_however_the_step_ends(error):
    tower, wrapped = Tower(), Tower()
    own_forward = wrapped.forward = lambda value: value * 2  # as tools do that wrap a forward on the instance
    replay = Replay([tower, wrapped])
    try:
        with replay, replay.chunk(0):
            tower(pixels())
            if error:
                raise error
    except RuntimeError:
        pass
    assert "forward" not in vars(tower)
    assert wrapped.forward is own_forward
    with replay, replay.chunk(0):  # the same chunk of the next step is computed anew
        assert torch.equal(tower(pixels(9)), tower.layer(pixels(9)).cos())
    assert replay.runs == [2, 0]


def test_hooks_still_run_and_outside_a_chunk_nothing_is_kept():
    tower = Tower()
    hooked = []
    tower.register_forward_hook(lambda *_: hooked.append(1))
    with Replay([tower]) as replay:
        for _ in range(2):
            with replay.chunk(0):
                tower(pixels())
        for seed in (1, 2):
            with replay.chunk("without pictures"):
                pass
            assert torch.equal(tower(pixels(seed)), tower.layer(pixels(seed)).cos())
    assert (replay.runs, len(hooked)) == ([3], 4)


def test_a_trainable_module_is_refused():
    with pytest.raises(Vlm2VecError, match="module 1 .Linear.: 2 trainable parameters, e.g. 'weight'"):
        Replay([Tower(), nn.Linear(2, 2)])


def test_a_module_in_training_mode_is_refused():
    tower = Tower()
    tower.layer.train()
    with pytest.raises(Vlm2VecError, match="'layer' is in training mode; call eval"), Replay([tower]):
        pass
    assert "forward" not in vars(tower)


def test_an_input_that_needs_a_gradient_is_refused():
    tower = Tower()
    learned = pixels().requires_grad_()
    with Replay([tower]) as replay:
        with torch.no_grad(), replay.chunk(0):
            tower(learned)
        with pytest.raises(Vlm2VecError, match="its input needs a gradient"), replay.chunk(0):
            tower(learned)


def test_an_output_changed_in_place_is_refused():
    tower = Tower()
    with Replay([tower]) as replay:
        with replay.chunk(0):
            tower(pixels()).add_(1)
        with pytest.raises(Vlm2VecError, match="changed in place"), replay.chunk(0):
            tower(pixels())


def test_leading_frozen_stops_at_the_first_trained_module():
    vision, projector, last = Tower(), Tower(), Tower()
    assert leading_frozen([vision, projector, last]) == [vision, projector, last]
    projector.layer.requires_grad_(True)
    assert leading_frozen([vision, projector, last]) == [vision]


def test_what_is_over_the_limit_is_computed_twice():
    """An output has 48 bytes: with 100 of them allowed, two of three chunks are held, and the bits are those of all."""
    tower = Tower()
    expected = [tower(pixels(index)) for index in range(3)]
    with Replay([tower], limit=100) as replay:
        for visit in range(2):
            for index in range(3):
                with torch.set_grad_enabled(visit == 1), replay.chunk(index):
                    assert torch.equal(tower(pixels(index)), expected[index])
        assert replay.held == 96
    assert replay.runs == [4] and replay.held == 0
