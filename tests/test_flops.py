"""Operations of a step: what torch counts when miniatures of the families run, and what published models are said to cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from tests.runs import tiny_recipe
from vlm2vec.backbones import load_backbone
from vlm2vec.backbones.shapes import known, shape_of
from vlm2vec.config import Recipe, load_recipe
from vlm2vec.encoder import Encoder
from vlm2vec.flops import Attention, Chunk, Grid, Linear, Load, PerPicture, Stack, step_cost, useful_cost
from vlm2vec.inventory import Inventory, take
from vlm2vec.step import set_training_mode
from vlm2vec.trainer import load_encoder

RECIPES = Path(__file__).parents[1] / "recipes"
TRAINED = {  # what is trained: adapter, parts trained in full
    "adapters": ("{rank: 4, parts: [language, vision]}", "[]"),
    "magnitudes": ("{rank: 4, dora: true, dropout: 0.1}", "[]"),
    "everything": ("null", "[language, projector, vision]"),
    "projector": ("{rank: 4}", "[projector]"),
}
EXACT = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "paligemma")
CLOSE = ("phi3_v", "llava_next", "internvl", "gemma3")  # class tokens and line ends beside the patches; a matrix that is no layer


def prepared(family: str, trained: str) -> tuple[Encoder, Inventory]:
    lora, parts = TRAINED[trained]
    recipe = tiny_recipe(Path("unused"), family=family, lora=lora, parts=parts)
    recipe = replace(recipe, model=replace(recipe.model, attention="eager"))  # torch counts no fused kernel of a CPU
    inventory = take(load_backbone(recipe.model), recipe)
    encoder = load_encoder(recipe, None)
    set_training_mode(encoder.model)
    return encoder, inventory


def grids(inputs: list[dict[str, torch.Tensor]], patch: int) -> Counter[Grid]:
    found: Counter[Grid] = Counter()
    for one in inputs:
        if "image_grid_thw" in one:
            found.update({(height, width): time for time, height, width in one["image_grid_thw"].tolist()})
        else:
            *_, height, width = one["pixel_values"].shape
            found[height // patch, width // patch] += one["pixel_values"].numel() // (3 * height * width)
    return found


def counted(encoder: Encoder, inventory: Inventory, with_pictures: bool) -> tuple[Chunk, int, int]:
    """A chunk of three items or one, and the operations that torch counts in its forward and backward pass."""
    pictures = [[], [Image.new("RGB", (90, 70))], [Image.new("RGB", (60, 100))]] if with_pictures else [[]]
    rows = [encoder.processor.features("<|image_1|>\nwords" if images else "some words more", images) for images in pictures]
    inputs = [image for row in rows for image in row.images]
    with FlopCounterMode(display=False) as forward:
        embedding_CD = encoder.embed(encoder.processor.collate(rows))
    with FlopCounterMode(display=False) as backward:
        embedding_CD.sum().backward()
    chunk = Chunk(tuple(map(len, rows)), grids(inputs, inventory.patch), len(inputs))
    return chunk, forward.get_total_flops(), backward.get_total_flops()


def ours(inventory: Inventory, chunk: Chunk) -> tuple[float, float]:
    forward, backward, behind = 0.0, 0.0, False
    for stack in inventory.stacks if chunk.pictures else inventory.stacks[-1:]:
        cost = stack.cost(chunk.load(stack.part, inventory.extra, padded=True), behind)
        behind = behind or stack.learns
        forward, backward = forward + cost.forward, backward + cost.backward
    return forward, backward


@pytest.mark.parametrize("with_pictures", [True, False], ids=["pictures", "text"])
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("family", EXACT)
def test_forward_and_backward_are_what_torch_counts(family: str, trained: str, with_pictures: bool) -> None:
    encoder, inventory = prepared(family, trained)
    chunk, forward, backward = counted(encoder, inventory, with_pictures)
    assert ours(inventory, chunk) == (forward, backward)


@pytest.mark.parametrize("trained", ["adapters", "magnitudes"])
@pytest.mark.parametrize("family", CLOSE)
def test_other_families_come_within_two_per_cent(family: str, trained: str) -> None:
    encoder, inventory = prepared(family, trained)
    chunk, forward, backward = counted(encoder, inventory, with_pictures=True)
    assert ours(inventory, chunk) == (pytest.approx(forward, rel=0.02), pytest.approx(backward, rel=0.02))


@pytest.mark.parametrize("trained", ["magnitudes", "everything"])
@pytest.mark.parametrize("family", (*CLOSE, "qwen2_vl", "vlm2vec_vista"))
def test_trained_parameters_are_those_of_the_encoder(family: str, trained: str) -> None:
    encoder, inventory = prepared(family, trained)
    assert inventory.trained == sum(weight.numel() for weight in encoder.model.parameters() if weight.requires_grad)


# -- published models


def shaped(name: str) -> tuple[Recipe, Inventory]:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    return recipe, take(shape_of(recipe.model).backbone, recipe)


@pytest.mark.parametrize("name", ["llava16", "phi35", "qwen2vl_2b", "qwen2vl_7b", "qwen25vl_3b", "qwen3vl_2b", "smolvlm"])
def test_the_table_adds_up_to_the_published_number_of_parameters(name: str) -> None:
    recipe, inventory = shaped(f"{name}_lora")
    assert inventory.total == known()[recipe.model.path]["parameters"]


@pytest.mark.parametrize(("name", "megabytes"), [("qwen2vl_2b", 18.7), ("qwen2vl_7b", 41.7), ("qwen2vl_2b_v2", 76.4)])
def test_adapters_are_as_large_as_the_published_ones(name: str, megabytes: float) -> None:
    _, inventory = shaped(f"{name}_lora")
    assert 4e-6 * inventory.adapter == pytest.approx(megabytes, abs=0.06)


def test_a_picture_of_980_pixels_costs_what_is_known_of_it() -> None:
    """2 x 663 M weights x 4,900 patches are 6.5 TFLOP, their attention 3.9; 1,225 tokens of the language model 3.2 and 0.1 to 0.3."""
    vision, projector, language = shaped("qwen2vl_2b_lora")[1].stacks
    picture = Load({(70, 70): 1})
    products = sum(2 * op.inputs * op.outputs * 4900 for op in vision.ops if isinstance(op, Linear))
    merged = projector.cost(picture).forward
    assert (products + merged) / 1e12 == pytest.approx(6.4, abs=0.2)
    assert (vision.cost(picture).forward - products) / 1e12 == pytest.approx(4 * 4900**2 * 1280 * 32 / 1e12)
    text = Load({(1, 1225): 1})
    assert 3.2e12 < language.cost(text, lean=True).forward < language.cost(text).forward * 0.7 < 4.8e12


# -- rules, on numbers that can be checked by hand


def layer(**changes: Any) -> tuple[Linear | Attention, ...]:
    """Products of 8 x 8 around an attention of width 8, the first of them as `changes` say."""
    first = replace(Linear(8, 8, 1, block="0", role="query"), **changes)
    return first, Attention(8, backward=2.0, block="0"), Linear(8, 8, 2, block="0", role="out")


TEXT = Chunk((4, 2))  # 8 padded tokens: 1,024 a product; 2 x 16 pairs: 1,024 for scores and values


def test_a_frozen_model_has_no_backward_pass() -> None:
    cost = Stack("language", layer()).cost(TEXT.load("language", 0, padded=True))
    assert (cost.forward, cost.backward, cost.blocks) == (3 * 1024, 0, 3 * 1024)


def test_gradients_stop_at_the_first_trained_weight() -> None:
    cost = Stack("language", layer(trained=True)).cost(TEXT.load("language", 0, padded=True))
    assert cost.to_weights == 1024  # of the first alone
    assert cost.to_inputs == 2048 + 1024  # attention and the last product, not the first


def test_an_adapter_costs_its_rank_both_ways() -> None:
    cost = Stack("language", layer(rank=2)).cost(TEXT.load("language", 0, padded=True))
    assert cost.forward == 3 * 1024 + 2 * 256
    assert cost.to_weights == 2 * 256


def test_magnitudes_behind_dropout_compute_the_frozen_product_twice() -> None:
    load, norm = TEXT.load("language", 0, padded=True), 2 * 8 * 2 * 16
    plain, dropped = (Stack("language", layer(rank=2, dora=True, dropout=on)).cost(load).forward for on in (False, True))
    assert (plain, dropped) == (3 * 1024 + 512 + norm, 4 * 1024 + 512 + norm)


def test_useful_work_has_no_padding_no_second_pass_and_half_the_scores() -> None:
    stack = Stack("language", (Linear(8, 8, 1), Attention(8, causal=True, backward=2.0), Linear(8, 8, 2, trained=True)))
    useful = useful_cost([stack], [TEXT], 0)["language"]
    assert useful == (2 * 768) + 32 * (10 + 3) + 768  # 6 tokens; 10 and 3 pairs on or below the diagonal; one gradient
    kept, cached = (step_cost([stack], [TEXT], 0, kept)["language"] for kept in (1, 0))
    assert (kept, cached) == (3 * 1024 + 1024, 2 * 3 * 1024 + 1024)


def test_packed_chunks_have_no_padding_and_half_the_scores() -> None:
    ops = (Linear(8, 8, 1), Attention(8, causal=True, masked=False, backward=2.0), Linear(8, 8, 2, trained=True))
    stack, chunk = Stack("language", ops), replace(TEXT, packed=True)
    assert chunk.padded == 6
    assert step_cost([stack], [chunk], 0, kept=1) == useful_cost([stack], [TEXT], 0)


def test_replayed_towers_run_once_and_checkpointing_runs_layers_again() -> None:
    chunk = Chunk((4, 2), {(2, 2): 1}, pictures=1)
    vision = Stack("vision", layer())
    language = Stack("language", layer(trained=True))
    once, twice = (step_cost([replace(vision, replayed=replayed), language], [chunk], 0)["vision"] for replayed in (True, False))
    assert (once, twice) == (2 * 512 + 512, 2 * (2 * 512 + 512))
    plain, again = (step_cost([language], [chunk], 0, checkpointing=on)["language"] for on in (False, True))
    assert again - plain == 3 * 1024


def test_windows_and_class_tokens() -> None:
    assert Load({(5, 8): 2}).pairs(window=4) == 2 * (16 + 1) * (16 + 16)
    assert Load({(5, 8): 2}).pairs() == 2 * 40**2
    assert (Load({(2, 2): 3}, extra=1).rows, Load({(2, 2): 3}, extra=1).pairs()) == (15, 75)


def test_a_tower_of_convolutions_costs_by_picture() -> None:
    stack = Stack("vision", (PerPicture(100, trained=True),))
    assert stack.cost(Load({}, pictures=3)).forward == 300 and stack.cost(Load({}, pictures=3)).backward == 600
    assert not replace(stack, ops=(PerPicture(100),)).learns
