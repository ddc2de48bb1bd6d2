"""NaN and infinity wherever they can arise: exit code 3 before any update, finite weights on disk, the log of the steps before."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.common import changed, light_recipe
from tests.runs import start_run
from vlm2vec import checkpoint, trainer
from vlm2vec.encoder import Encoder
from vlm2vec.errors import NonFiniteError, RecipeError
from vlm2vec.io import read_jsonl
from vlm2vec.losses import InfoNCE
from vlm2vec.trainer import LOG

PLACES = ("loss", "embedding", "gradient", "adapter")
VALUES = (float("nan"), float("inf"), float("-inf"))
STEPS = 6


class Poison:
    """Puts a value into one number of one place, at the call with number `due`."""

    def __init__(self, value: float, due: int, chance: random.Random) -> None:
        self.value, self.left, self.chance = value, due, chance

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left != 0:
            return tensor
        factor = torch.ones_like(tensor)  # a factor, so that the gradient is spoiled too
        factor.view(-1)[self.chance.randrange(tensor.numel())] = self.value
        return tensor * factor


def poison(place: str, value: float, chance: random.Random, patch: pytest.MonkeyPatch) -> None:
    """Spoil a place by what all engines share: the encoder, the loss, and the parameters that they train."""
    drop = Poison(value, chance.randint(1, 4), chance)
    embed, forward, load = Encoder.embed, InfoNCE.forward, trainer.load_encoder

    def loss(self: InfoNCE, *arguments: Any, **options: Any) -> Any:
        found, stats = forward(self, *arguments, **options)
        return drop(found), stats

    def built(*arguments: Any) -> Encoder:
        encoder = load(*arguments)
        trained = [parameter for parameter in encoder.model.parameters() if parameter.requires_grad]
        target = chance.choice(trained)
        if place == "gradient":
            target.register_hook(drop)
        else:
            target.data.view(-1)[chance.randrange(target.numel())] = value
        return encoder

    if place == "embedding":
        patch.setattr(Encoder, "embed", lambda self, batch: drop(embed(self, batch)))
    elif place == "loss":
        patch.setattr(InfoNCE, "forward", loss)
    elif place in ("gradient", "adapter"):
        patch.setattr(trainer, "load_encoder", built)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", [VALUES[0], *(pytest.param(value, marks=pytest.mark.faults) for value in VALUES[1:])])
def test_stops_before_harm(place: str, value: float, tmp_path: Path, trials: Callable, tally: Callable[..., None]) -> None:
    def trial(chance: random.Random) -> None:
        run_dir = tmp_path / f"run-{chance.random()}"
        with pytest.MonkeyPatch.context() as patch:
            poison(place, value, chance, patch)
            with pytest.raises(NonFiniteError) as caught:
                start_run(changed(light_recipe(run_dir, steps=STEPS, every=1), "train", clip=0.0))
        assert caught.value.exit_code == 3 and "step" in str(caught.value)
        rows = read_jsonl(run_dir / LOG)
        newest = checkpoint.latest(run_dir)
        assert (int(newest.name[5:]) if newest else 0) == len(rows)
        for file in newest.glob("*.safetensors") if newest else ():
            assert all(torch.isfinite(tensor).all() for tensor in load_file(file).values())

    count = 2
    trials(count, trial)
    tally("F8", f"NaN or infinity in the {place}", "exit code 3 before the update; what is on disk is finite", count)


def test_an_update_that_overflows_is_never_saved(tmp_path: Path, tally: Callable[..., None]) -> None:
    """A learning rate beyond reason: the weights are infinite after the last step, or the next one is not a number."""
    for steps, rate in ((4, 1e37), (4, 1e34), (4, 1e30)):
        run_dir = tmp_path / f"{steps}-{rate}"
        with pytest.raises(NonFiniteError):
            start_run(changed(light_recipe(run_dir, every=9, lora="{rank: 4}"), "train", steps=steps, lr=rate, warmup=0))
        assert checkpoint.latest(run_dir) is None
    tally("F8", "a learning rate that overflows", "exit code 3; nothing saved", 3)


@pytest.mark.parametrize(("section", "key"), [("train", "lr"), ("loss", "temperature"), ("train", "clip"), ("train", "weight_decay")])
def test_numbers_that_are_none_are_refused_in_the_recipe(section: str, key: str, tmp_path: Path, tally: Callable[..., None]) -> None:
    for value in (*VALUES, -1.0):
        with pytest.raises(RecipeError, match=f"{section}.{key} must be"):
            changed(light_recipe(tmp_path), section, **{key: value}).validate()
    tally("F8", "NaN, infinity or a negative number in the recipe", "RecipeError naming the key", 4)
