"""A thousand damaged pictures on their way to a model: each is decoded or refused with its label, in bounded time and memory."""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable

import pytest

from tests.data.test_images import mutate, seeds
from vlm2vec.backbones import load_backbone
from vlm2vec.batch import featurize
from vlm2vec.config import ModelConfig
from vlm2vec.data.types import ImageRef, Item
from vlm2vec.errors import ImageError


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [150, pytest.param(1000, marks=pytest.mark.faults)])
def test_mutated_pictures_become_features_or_are_refused(count: int, trials: Callable, tally: Callable[..., None]) -> None:
    processor, sound = load_backbone(ModelConfig(path="builtin/tiny-qwen2_vl", resize=56)).processor, seeds()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB

    def trial(chance: random.Random) -> bool:
        data = mutate(chance.choice(sound), chance)
        began = time.process_time()
        try:
            featurize(processor, Item("", (ImageRef(data, "A row 17"),)))
            decoded = True
        except ImageError as error:
            assert str(error).startswith("A row 17: ")
            decoded = False
        assert time.process_time() - began < 2
        return decoded

    decoded = sum(trials(count, trial))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 400 * 1024
    if count < 1000:  # a part of them
        return
    tally("F9", "mutated pictures of 7 formats: decoded by the rules", "features of the right shape", decoded)
    tally("F9", "mutated pictures of 7 formats: refused", "ImageError with the row; no crash, no hang, bounded memory", count - decoded)
