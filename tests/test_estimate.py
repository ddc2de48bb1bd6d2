"""Estimates: bytes against what autograd holds, every recipe on every kind of device, what is said when something does not fit."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import tiny_recipe
from vlm2vec.backbones import load_backbone
from vlm2vec.cli import main
from vlm2vec.config import Recipe, load_recipe
from vlm2vec.devices import devices, find
from vlm2vec.encoder import Encoder
from vlm2vec.errors import DataError, InputError, ModelError, RecipeError
from vlm2vec.estimate import Plan, estimate, kept_chunks, memory, operations, plan, times
from vlm2vec.flops import Chunk, Linear
from vlm2vec.footprint import Numbers, activations
from vlm2vec.inventory import take
from vlm2vec.step import set_training_mode
from vlm2vec.suite import load_suite
from vlm2vec.trainer import load_encoder
from vlm2vec.workload import _draws

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
H200 = devices()["h200"]


# -- bytes that autograd holds


class Saved:
    """A tensor that autograd saved, as long as it holds it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def held_bytes(encoder: Encoder, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes of the graph of one chunk, parameters and buffers apart, each storage once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*encoder.model.parameters(), *encoder.model.buffers())}
    live: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> Saved:
        saved = Saved(tensor)
        live.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        embedding_CD = encoder.embed(inputs)
    found = {saved.tensor.untyped_storage().data_ptr(): saved.tensor.untyped_storage().nbytes() for saved in live}
    assert embedding_CD.requires_grad
    return sum(size for place, size in found.items() if place not in own)


def widened(recipe: Recipe, folder: Path) -> Recipe:
    """The miniature with a text model of 6 layers, 256 wide: as wide as its tables and scores are small beside its states."""
    source = load_backbone(recipe.model)
    config = source.model.config
    wide: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    wide |= {"head_dim": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}}
    for key, value in wide.items():
        setattr(config.text_config, key, value)
    config.text_config.layer_types = ["full_attention"] * 6
    config.vision_config.hidden_size = 256
    type(source.model)(config).save_pretrained(str(folder))
    source.processor.save_pretrained(folder)
    return replace(recipe, model=replace(recipe.model, path=str(folder)))


def with_precision(recipe: Recipe, precision: Any) -> Any:
    return replace(recipe.train, precision=precision)


@pytest.mark.parametrize(
    "kind", ["sdpa/float32/fp32", "sdpa/float32/bf16", "sdpa/bfloat16/bf16", "eager/bfloat16/bf16", "packed/float32/fp32"]
)
@pytest.mark.parametrize(
    ("lora", "parts"),
    [
        ("{rank: 8}", "[]"),
        ("{rank: 8, dropout: 0.1}", "[]"),
        ("{rank: 8, dropout: 0.1, dora: true, targets: [q_proj, k_proj, v_proj, o_proj, down_proj]}", "[]"),
        ("null", "[language]"),
    ],
    ids=["lora", "dropout", "dora", "full"],
)
def test_activations_are_what_autograd_holds(tmp_path: Path, lora: str, parts: str, kind: str) -> None:
    attention, dtype, precision = kind.split("/")
    recipe = widened(tiny_recipe(tmp_path, lora=lora, parts=parts), tmp_path / "model")
    numbers_of: dict[str, Any] = {"attention": attention, "dtype": dtype}
    recipe = replace(recipe, model=replace(recipe.model, **numbers_of), train=with_precision(recipe, precision))
    language = take(load_backbone(recipe.model), recipe).stacks[-1]
    encoder = load_encoder(recipe, None)
    set_training_mode(encoder.model)
    rows = [encoder.processor.features("a" * count, []) for count in (60, 64, 50)]
    numbers = Numbers(4 if dtype == "float32" else 2, 4 if precision == "fp32" else 2, attention, mask=4)
    tokens = sum(map(len, rows)) if attention == "packed" else 3 * 64
    expected = activations(language, tokens, 64, numbers, behind=False)
    assert expected == pytest.approx(held_bytes(encoder, encoder.processor.collate(rows)), rel=0.1)


# -- recipes


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return {path.stem: plan(load_recipe(path), H200, 8) for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_an_estimate(path: Path, plans: dict[str, Plan]) -> None:
    found = estimate(plans[path.stem])
    ops, seconds, hours = found["operations"], found["seconds"], found["hours"]
    assert 0 < ops["useful"] <= ops["once"] <= ops["done"] < 8 * ops["useful"]
    assert sum(ops[part] for part in ("vision", "projector", "language")) == pytest.approx(ops["done"])
    assert 0 < seconds["floor"] < seconds["step_low"] <= seconds["step"] <= seconds["step_high"]
    assert hours["likely"] == pytest.approx(found["recipe"]["steps"] * seconds["step"] / 3600)
    assert found["memory"]["sum"] == pytest.approx(sum(value for name, value in found["memory"].items() if name != "sum"))
    assert found["fits"] and json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize("name", devices())
def test_every_device_gives_an_estimate(name: str, plans: dict[str, Plan]) -> None:
    made = replace(plans["qwen2vl_2b_lora"], device=devices()[name])
    found = estimate(made)
    assert found["fits"] == (found["memory"]["sum"] <= 1e9 * devices()[name].memory)
    if not found["fits"]:
        assert found["advice"][0].startswith("does not fit; train.chunk_tokens: ")


def at_every_token(made: Plan) -> Plan:
    stacks = [
        replace(stack, ops=tuple(replace(op, last=False) if isinstance(op, Linear) else op for op in stack.ops))
        for stack in made.inventory.stacks
    ]
    return replace(made, inventory=replace(made.inventory, stacks=tuple(stacks)))


def test_the_published_run_comes_out_at_the_right_order_of_magnitude(plans: dict[str, Plan]) -> None:
    """1 to 5 days on 8 H100, by backbone and resolution, are reported for the published code, which does more: the tower in both passes,
    a head over the vocabulary, the last layer at every token, pictures in the training process (115 ms each). The larger model lies in that
    range, the smaller one, at 0.76 days, below it: the share of the peak is an assumption that this does not confirm.
    """
    for name, vocabulary, chunk, days in (("qwen2vl_2b_lora", 151936, 8192, 0.76), ("qwen2vl_7b_lora", 152064, 4096, 1.34)):
        made = at_every_token(plans[name]).cut(chunk_tokens=chunk, keep_tokens=0)
        ops, inventory = operations(made), made.inventory
        pictures = sum(len(entry.pictures) for entry in made.work.entries)
        tokens = sum(entry.tokens for entry in made.work.entries)
        head = 3 * 2 * tokens * inventory.hidden * vocabulary
        step = (ops["done"] + ops["vision"] + head) / (1e12 * devices()["h100"].tflops * 0.35) + 0.115 * pictures
        assert 2000 * step / 86400 == pytest.approx(days, abs=0.01)


def test_what_is_said_follows_the_recipe(plans: dict[str, Plan]) -> None:
    made = plans["qwen2vl_7b_lora"].cut(chunk_tokens=4096, keep_tokens=0)
    held, spread = memory(made), memory(made.under("fsdp2"))
    assert spread["weights"] < 0.35 * held["weights"] and spread["optimizer"] == held["optimizer"] / 8
    assert memory(made.under("zero2"))["weights"] == held["weights"]
    assert memory(made.cut(activation_checkpointing=True))["activations"] < 0.2 * held["activations"]
    assert memory(made.cut(chunk_tokens=2048))["activations"] == pytest.approx(held["activations"] / 2, rel=0.25)
    plain = operations(made)["done"]
    assert operations(made.cut(keep_tokens=10**9))["done"] == operations(made)["once"] < plain
    assert operations(made.cut(activation_checkpointing=True))["done"] > plain
    assert operations(made.without_dropout())["done"] < 0.8 * plain


def test_a_small_device_is_told_what_would_fit(plans: dict[str, Plan]) -> None:
    made = replace(plans["qwen2vl_7b_lora"].cut(keep_tokens=0), device=devices()["4090"])
    found = estimate(made)
    assert not found["fits"] and "train.chunk_tokens: " in found["advice"][0]
    tokens = int(found["advice"][0].split("chunk_tokens: ")[1].split(",")[0].split()[0])
    changed = made.cut(chunk_tokens=tokens, activation_checkpointing="checkpointing" in found["advice"][0])
    changed = changed.under("fsdp2" if "fsdp2" in found["advice"][0] else made.engine)
    assert sum(memory(changed).values()) <= 24e9


def test_the_slowest_part_bounds_the_step(plans: dict[str, Plan]) -> None:
    made = plans["qwen2vl_2b_lora"]
    ops = operations(made)
    assert estimate(made)["bound"] == "matrix products" and estimate(plans["smollm2_gpu"])["bound"] == "starting kernels"
    waiting = estimate(plans["smolvlm_lora"])
    assert waiting["bound"] == "decoding on the host" and waiting["advice"][0].startswith("data.workers: more than 8")
    parts = times(made, ops["done"], ops["useful"])
    alone = replace(made, recipe=replace(made.recipe, data=replace(made.recipe.data, workers=0)))
    assert times(alone, ops["done"], ops["useful"])["step"] == pytest.approx(parts["products"] + parts["exchange"] + 8 * parts["host"])
    thin = replace(made.under("zero3"), device=replace(H200, link=0.1))
    assert estimate(thin)["bound"] == "exchange between devices"


def test_data_that_are_there_are_looked_at(tmp_path: Path) -> None:
    made = plan(tiny_recipe(tmp_path), H200, 2)
    assert made.work.basis.startswith("8 global batches of builtin/tiny") and made.work.steps == 12
    assert all(entry.tokens > sum(picture.tokens for picture in entry.pictures) for entry in made.work.entries)
    assert {len(entry.pictures) for entry in made.work.entries} >= {0, 1}


def test_what_a_recipe_leaves_open_is_filled_with_what_fits() -> None:
    """Large chunks and many graphs on a large device, less on a small one, and not much more would fit."""
    recipe = load_recipe(FOLDER / "qwen2vl_7b_lora.yaml")
    assert recipe.train.chunk_tokens is None and recipe.train.keep_tokens is None
    large, small = (plan(recipe, devices()[name], 8) for name in ("h200", "l40s"))
    assert large.budget.chunk_tokens > small.budget.chunk_tokens and large.budget.keep_tokens > small.budget.keep_tokens
    assert estimate(large)["fits"] and estimate(small)["fits"]
    assert not estimate(small.cut(chunk_tokens=4 * small.budget.chunk_tokens))["fits"]
    assert not estimate(large.cut(keep_tokens=2 * large.budget.keep_tokens))["fits"]


def test_kept_chunks_are_those_a_step_keeps() -> None:
    chunks = [Chunk((8, 8)), Chunk((5, 4)), Chunk((2,))]
    assert [kept_chunks(chunks, keep) for keep in (0, 15, 16, 26, 28)] == [1, 1, 1, 2, 3]


def test_sources_come_in_proportion_or_in_blocks() -> None:
    assert next(_draws([3, 1], 8, 0)) == [0] * 6 + [1] * 2
    batches = list(_draws([3, 1], 8, 4))
    assert all(batch[:4] == [batch[0]] * 4 for batch in batches)
    assert sum(sum(batch) for batch in batches) / sum(map(len, batches)) == pytest.approx(0.25, abs=0.05)


# -- devices and the command line


def test_devices_are_found_by_name_and_count() -> None:
    assert find("h200x8") == (H200, 8) and find("L40S")[1] == 1 and find("a100x4") == (devices()["a100-80g"], 4)
    assert find("4090x2") == (devices()["4090"], 2)
    for words in ("h300", "x8", "h200x0", ""):
        with pytest.raises(InputError, match="no such device.*There are: h200"):
            find(words)


def test_what_cannot_be_estimated_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe(FOLDER / "qwen2vl_2b_lora.yaml")
    with pytest.raises(RecipeError, match="not divisible by 3 devices"):
        plan(recipe, H200, 3)
    with pytest.raises(ModelError, match="neither in the cache nor in the table"):
        plan(replace(recipe, model=replace(recipe.model, path="nobody/nothing")), H200, 1)
    epochs = replace(recipe, train=replace(recipe.train, steps=None, epochs=1.0))
    assert plan(epochs, H200, 8).work.steps == sum(min(spec.rows, 50000) for spec in load_suite("mmeb").train) // 1024
    unknown = replace(epochs, evaluate=replace(epochs.evaluate, suite=None))
    with pytest.raises(DataError, match="give train.steps"):
        plan(unknown, H200, 8)


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(FOLDER / "qwen2vl_7b_lora.yaml")
    assert main(["estimate", recipe, "--gpu", "h100x8", "train.chunk_tokens=2048"]) == 0
    shown = capsys.readouterr().out
    for words in ("8 x NVIDIA H100 SXM", "8.291 B parameters", "41.7 MB", "lora.dropout", "is assumed", "mmeb/items.yaml"):
        assert words in shown, shown
    assert main(["estimate", recipe, "--gpu", "h200x8", "--mfu", "0.4", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["efficiency"] == {"assumed": 0.4, "low": 0.4, "high": 0.4} and found["device"]["count"] == 8
    assert main(["estimate", recipe, "--gpu", "h300"]) == 2
