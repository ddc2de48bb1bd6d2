"""The arithmetic of `--dry-run`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.runs import tiny_recipe
from vlm2vec.config import Recipe, load_recipe
from vlm2vec.data.mixture import Mixture
from vlm2vec.data.types import Pair
from vlm2vec.devices import find
from vlm2vec.errors import DataError
from vlm2vec.estimate import Plan, plan
from vlm2vec.plan import dry_run, memory, parameters_by_part
from vlm2vec.trainer import load_encoder, mixture_of, total_steps

RECIPES = Path(__file__).parents[1] / "recipes"


def made(recipe: Recipe) -> Plan:
    return plan(recipe, find("h200")[0], 1)


def test_parameters_are_counted_by_part(tmp_path: Path) -> None:
    """From the configuration alone, against the model that a run loads."""
    recipe = tiny_recipe(tmp_path)
    table = parameters_by_part(made(recipe).inventory)
    encoder = load_encoder(recipe, None)
    loaded: dict[str, tuple[int, int]] = {}
    for name, parameter in encoder.model.named_parameters():
        trained, total = loaded.get(part := encoder.backbone.part_of(name), (0, 0))
        loaded[part] = (trained + parameter.numel() * parameter.requires_grad, total + parameter.numel())
    assert table == loaded
    assert table["language"][0] > 0 and table["vision"][0] == 0


def test_memory_follows_the_sizes(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    total = sum(parameter.numel() for parameter in load_encoder(recipe, None).model.parameters())
    table = memory(made(recipe))
    assert table["weights"] == pytest.approx(4 * total / 1024**3)
    assert table["optimizer"] == pytest.approx(2 * table["gradients"])
    wider = replace(recipe, train=replace(recipe.train, chunk_tokens=2 * recipe.train.chunk_tokens))
    assert 1.5 < memory(made(wider))["activations"] / table["activations"] < 2.5
    saved = replace(recipe, train=replace(recipe.train, activation_checkpointing=True))
    assert memory(made(saved))["activations"] < table["activations"]


def test_epochs_become_steps(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    mixture = mixture_of(recipe)
    epochs = replace(recipe, train=replace(recipe.train, steps=None, epochs=2.0, accumulate=3))
    assert total_steps(recipe, mixture) == 12
    assert total_steps(epochs, mixture) == 2 * len(mixture) // (12 * 3)


def test_the_plan_names_what_a_user_asks_for(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    plan = dry_run(recipe, world_size=2)
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
    asked, pairs = [], Mixture.pairs

    def noted(mixture: Mixture, index: int, rank: int = 0, world_size: int = 1) -> list[Pair]:
        asked.append(index)
        return pairs(mixture, index, rank, world_size)

    monkeypatch.setattr(Mixture, "pairs", noted)
    monkeypatch.setattr("vlm2vec.batch.load_image", None)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    plan = dry_run(recipe)
    assert sorted(set(asked)) == [0, 3, 6, 9, 13, 16, 19, 23]
    assert "what a batch holds, over 8 of 24" in plan
    section = plan.split("sources per batch")[1].split("trainable parameters")[0].splitlines()
    assert [line.split()[0] for line in section[2:]] == ["composed", "image_to_text", "text_to_image", "all"]


def test_without_weights_and_data_it_plans_from_the_configuration_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm2vec.backbones.loading.snapshot_download", None)
    monkeypatch.setattr("vlm2vec.backbones.base.load_model", None)
    plan = dry_run(load_recipe(RECIPES / "qwen2vl_2b_lora.yaml", ["data.root=no/such/folder"]))
    for words in (
        "sizes from               table of known models",
        "missing                  data folder no/such/folder does not exist",
        "assumed, no/such/folder is not there",
        "steps                    2000 = 2048000 pairs\n",
        "4,673,536 of 1,548,387,840",  # the adapter of rank 8 on 28 layers, and the language model with it
        "memory per device",
    ):
        assert words in plan, plan
    assert "what a batch holds" not in plan


def test_data_that_are_there_and_wrong_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ImageNet_1K"):
        dry_run(load_recipe(RECIPES / "qwen2vl_2b_lora.yaml", [f"data.root={tmp_path}"]))
