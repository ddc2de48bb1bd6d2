"""The arithmetic of `--dry-run`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.runs import tiny_recipe
from vlm2vec.data.mixture import Mixture
from vlm2vec.data.types import Pair
from vlm2vec.plan import dry_run, memory, parameters_by_part
from vlm2vec.trainer import load_encoder, mixture_of, total_steps


def test_parameters_are_counted_by_part(tmp_path: Path) -> None:
    encoder = load_encoder(tiny_recipe(tmp_path), None)
    table = parameters_by_part(encoder)
    assert sum(total for _, total in table.values()) == sum(parameter.numel() for parameter in encoder.model.parameters())
    assert sum(trained for trained, _ in table.values()) == sum(p.numel() for p in encoder.model.parameters() if p.requires_grad)
    assert table["language"][0] > 0 and table["vision"][0] == 0


def test_memory_follows_the_sizes(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    encoder, mixture = load_encoder(recipe, None), mixture_of(recipe)
    total = sum(parameter.numel() for parameter in encoder.model.parameters())
    table = memory(recipe, encoder, mixture)
    assert table["weights"] == pytest.approx(4 * total / 1024**3)
    assert table["optimizer"] == pytest.approx(2 * table["gradients"])
    wider = replace(recipe, train=replace(recipe.train, chunk_tokens=2 * recipe.train.chunk_tokens))
    assert 1.5 < memory(wider, encoder, mixture)["activations"] / table["activations"] < 2.5
    saved = replace(recipe, train=replace(recipe.train, activation_checkpointing=True))
    assert memory(saved, encoder, mixture)["activations"] < table["activations"]


def test_epochs_become_steps(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    mixture = mixture_of(recipe)
    epochs = replace(recipe, train=replace(recipe.train, steps=None, epochs=2.0, accumulate=3))
    assert total_steps(recipe, mixture) == 12
    assert total_steps(epochs, mixture) == 2 * len(mixture) // (12 * 3)


def test_the_plan_names_what_a_user_asks_for(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    plan = dry_run(recipe, load_encoder(recipe, None), mixture_of(recipe), world_size=2)
    for words in (
        "12 pairs on 2 process(es)",
        "3 of 4 pairs of one source",
        "11 in the batch, and explicit ones",
        "12 = 144 pairs",
        "image_to_text",
    ):
        assert words in plan, plan


def test_it_looks_at_batches_all_over_the_run_and_decodes_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(tmp_path)
    recipe = replace(recipe, train=replace(recipe.train, accumulate=2))
    encoder, asked, pairs = load_encoder(recipe, None), [], Mixture.pairs

    def noted(mixture: Mixture, index: int, rank: int = 0, world_size: int = 1) -> list[Pair]:
        asked.append(index)
        return pairs(mixture, index, rank, world_size)

    monkeypatch.setattr(Mixture, "pairs", noted)
    monkeypatch.setattr("vlm2vec.batch.load_image", None)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    plan = dry_run(recipe, encoder, mixture_of(recipe))
    assert sorted(set(asked)) == [0, 3, 6, 9, 13, 16, 19, 23]
    assert "what a batch holds, over 8 of 24" in plan
    section = plan.split("sources per batch")[1].split("trainable parameters")[0].splitlines()
    assert [line.split()[0] for line in section[2:]] == ["composed", "image_to_text", "text_to_image", "all"]
