"""The keys of a recipe: ranges, rules between keys, the digest, the reference."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from typing import Any

import pytest

from vlm2vec.config import (
    CheckpointConfig,
    DataConfig,
    EvaluateConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    Recipe,
    RunConfig,
    SourceConfig,
    TrainConfig,
    reference,
)
from vlm2vec.errors import RecipeError
from vlm2vec.schema import RANGES, violations

SECTIONS = [CheckpointConfig, DataConfig, EvaluateConfig, LoraConfig, LossConfig, ModelConfig, RunConfig, SourceConfig, TrainConfig]
RECIPE = Recipe(
    model=ModelConfig(path="m", train=("projector",)),
    lora=LoraConfig(),
    data=DataConfig(root="d", sources=(SourceConfig(name="a", weight=1.0), SourceConfig(name="b", weight=0.0))),
    train=TrainConfig(steps=10, global_batch=8, lr=1e-4),
)


def changed(section: str, **values: Any) -> Recipe:
    return replace(RECIPE, **{section: replace(getattr(RECIPE, section), **values)})


def test_the_recipe_itself_is_valid() -> None:
    RECIPE.validate()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (changed("loss", temperature=0.0), "loss.temperature must be > 0 and finite, got 0.0"),
        (changed("loss", temperature=float("nan")), "loss.temperature must be > 0 and finite, got .nan"),
        (changed("train", lr=float("inf")), "train.lr must be > 0 and finite, got .inf"),
        (changed("train", betas=(0.9, 1.0)), "train.betas[1] must be in [0, 1) and finite, got 1.0"),
        (changed("train", global_batch=1), "train.global_batch must be >= 2, got 1"),
        (changed("train", epochs=1.0), "train.steps (10) and train.epochs (1.0): exactly one must be given"),
        (changed("train", steps=None), "train.steps (null) and train.epochs (null): exactly one must be given"),
        (changed("train", warmup=10), "train.warmup (10) must be smaller than train.steps (10)"),
        (changed("train", global_batch=6, clip=-1.0), "train.clip must be >= 0"),
        (changed("data", block=3), "data.block (3) must divide train.global_batch (8)"),
        (changed("data", sources=()), "data.sources must not be empty"),
        (changed("data", sources=(SourceConfig(name="a"),) * 2), "data.sources names 'a' 2 times"),
        (changed("data", sources=(SourceConfig(name="a", weight=0.0),)), "data.sources have weights that are all zero"),
        (changed("data", sources=(SourceConfig(name="a", weight=-1.0),)), "data.sources[0].weight must be >= 0 and finite, got -1.0"),
        (changed("data", sources=(SourceConfig(name=""),)), "data.sources[0].name must not be empty"),
        (changed("data", root=""), "data.root must not be empty"),
        (changed("run", timeout=0.0), "run.timeout must be in (0, 10080] and finite, got 0.0"),
        (changed("run", timeout=1e300), "run.timeout must be in (0, 10080] and finite, got 1.0e+300"),
        (changed("lora", rank=0), "lora.rank must be >= 1, got 0"),
        (changed("lora", parts=()), "lora.parts must not be empty"),
        (changed("lora", targets=()), "lora.targets must not be empty"),
        (changed("lora", parts=("language", "language")), "lora.parts names 'language' 2 times"),
        (changed("lora", parts=("language", "projector")), "model.train and lora.parts both name projector"),
        (replace(changed("model", train=()), lora=None), "model.train is empty and lora is null: nothing would be trained"),
        (replace(changed("model", train=()), train=replace(RECIPE.train, projector_lr=1e-3)), "train.projector_lr is given but"),
        (changed("model", path=""), "model.path must not be empty"),
        (changed("model", trust_remote_code=True), "model.trust_remote_code needs model.revision as a 40-character commit"),
        (changed("model", trust_remote_code=True, revision="main"), "model.trust_remote_code needs model.revision as a 40-character"),
        (changed("model", trust_remote_code=True, revision="a" * 39), "model.trust_remote_code needs model.revision as a 40-character"),
        (changed("model", system="Say."), "model.system belongs to a chat; write model.prompt: chat"),
        (changed("model", ending="</s>"), "model.ending belongs to a chat; write model.prompt: chat"),
        (changed("model", resize=0), "model.resize must be >= 1, got 0"),
        (changed("model", min_pixels=9, max_pixels=4), "model.min_pixels (9) must not exceed model.max_pixels (4)"),
    ],
)
def test_violations(recipe: Recipe, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.validate()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "recipe",
    [
        changed("model", trust_remote_code=True, revision="0123456789abcdef" * 2 + "01234567"),
        changed("train", steps=None, epochs=0.5, warmup=100),
        changed("data", block=4),
        changed("train", projector_lr=1e-3),
        replace(RECIPE, lora=None),
        changed("model", train=()),
        changed("data", sources=(SourceConfig(name="a", weight=0.0), SourceConfig(name="b"))),
    ],
)
def test_no_violation(recipe: Recipe) -> None:
    assert list(violations(recipe)) == []


def test_sections_are_frozen_and_keyword_only() -> None:
    with pytest.raises(FrozenInstanceError):
        RECIPE.train.lr = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        SourceConfig("a")  # type: ignore[misc]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_has_a_meaning_and_every_number_a_range(section: Any) -> None:
    for entry in fields(section):
        assert entry.metadata["help"], entry.name
        number = re.search(r"\b(int|float)\b", str(entry.type)) is not None
        assert (entry.metadata["range"] in RANGES) == number, entry.name


def test_digest_leaves_out_what_does_not_change_the_result() -> None:
    moved = changed("run", dir="elsewhere", trackers=("tensorboard",), timeout=5.0)
    assert moved.digest == RECIPE.digest and len(RECIPE.digest) == 64
    others = [changed("run", seed=18), changed("train", lr=2e-4), replace(RECIPE, lora=None), changed("data", block=4)]
    assert len({recipe.digest for recipe in [RECIPE, *others]}) == 5


def test_reference_lists_every_key_once() -> None:
    rows = reference()
    keys = [key for key, *_ in rows]
    leaves = [entry for section in [*SECTIONS, Recipe] for entry in fields(section) if not is_dataclass(entry.default)]
    required_sections = {"model", "data", "train"}
    assert len(keys) == len(set(keys)) == len(leaves) - len(required_sections) + len(["base"])
    assert all(all(row) for row in rows)


@pytest.mark.parametrize(
    ("key", "kind", "default"),
    [
        ("train.lr", "number > 0", "required"),
        ("train.betas", "list of 2 numbers in [0, 1)", "[0.9, 0.999]"),
        ("model.pooling", "one of last, mean", "last"),
        ("lora", "mapping or null", "null"),
        ("lora.parts", "list of language, projector, vision", "[language]"),
        ("data.sources[].cap", "integer >= 1 or null", "null"),
        ("run.dir", "string", '""'),
    ],
)
def test_reference_rows(key: str, kind: str, default: str) -> None:
    assert {row[0]: row[1:3] for row in reference()}[key] == (kind, default)
