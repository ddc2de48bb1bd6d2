"""Compiled layers: the gradient of eager ones, dropout included, and a model that looks the same from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.common import changed
from tests.runs import tiny_recipe
from vlm2vec.batch import make_batch
from vlm2vec.config import Recipe
from vlm2vec.engines import compiled as module
from vlm2vec.engines import prepare
from vlm2vec.engines.compiled import compiled
from vlm2vec.engines.launch import start
from vlm2vec.errors import EnvError, RecipeError
from vlm2vec.losses import InfoNCE
from vlm2vec.step import Step
from vlm2vec.trainer import load_encoder, mixture_of

PLAIN = "{rank: 4, alpha: 8}"
DROPOUT = "{rank: 4, alpha: 8, dropout: 0.2}"
DORA = "{rank: 4, alpha: 8, dropout: 0.1, dora: true}"


def recipe_for(lora: str, compile: bool = True, **train: Any) -> Recipe:
    return changed(tiny_recipe(Path("unused"), lora=lora), "train", global_batch=8, chunk_tokens=120, compile=compile, **train)


def gradients(recipe: Recipe) -> dict[str, torch.Tensor]:
    """Of one step in float64: two passes over several chunks, with pictures and without."""
    encoder, loss = load_encoder(recipe, None), InfoNCE(recipe.loss)
    encoder.model.double()
    loss.double()
    noise = torch.Generator().manual_seed(1)
    for parameter in (parameter for parameter in encoder.model.parameters() if parameter.requires_grad):
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=noise).to(parameter.dtype)
    engine = prepare(recipe.train, encoder, loss)
    step = Step(recipe, engine)
    batch = make_batch(mixture_of(recipe).pairs(0), encoder.processor)
    for features in batch.features:
        features.images = [{n: t.double() if t.is_floating_point() else t for n, t in image.items()} for image in features.images]
    with compiled(encoder, recipe.train):
        step._backward(0, 0, batch)
    engine.reduce()
    return {name: parameter.grad for name, parameter in engine.parameters.items() if parameter.grad is not None}


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys() and all(gradient.any() for gradient in expected.values())
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


def check(monkeypatch: pytest.MonkeyPatch, lora: str, **train: Any) -> None:
    traced: list[int] = []
    real = module._compile
    monkeypatch.setattr(module, "_compile", lambda function: traced.append(1) or real(function))
    expected = gradients(recipe_for(lora, compile=False, **train))
    assert not traced
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = gradients(recipe_for(lora, **train))
    assert len(traced) == 3 and torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # two layers and the trial
    assert worst(found, expected) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_that_of_eager_layers(monkeypatch: pytest.MonkeyPatch, checkpointing: bool) -> None:
    """What torch captures of a layer, run without generating code, in the two passes of GradCache; dropout draws the same masks."""
    monkeypatch.setattr(module, "BACKEND", "aot_eager")
    check(monkeypatch, DROPOUT, activation_checkpointing=checkpointing)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [PLAIN, DORA], ids=["plain", "dora, dropout"])
def test_the_gradient_is_that_of_eager_layers_with_generated_code(monkeypatch: pytest.MonkeyPatch, lora: str) -> None:
    check(monkeypatch, lora)


@pytest.mark.slow
@torch.no_grad()
def test_each_kind_of_layer_is_one_graph_for_all_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer among them, which computes no more tokens than are read. A chunk of one item, or without padding, has another."""
    graphs: list[Any] = []
    monkeypatch.setattr(module, "BACKEND", lambda graph, _: graphs.append(graph) or graph)
    torch._dynamo.reset()
    recipe = recipe_for(PLAIN)
    encoder = load_encoder(recipe, None)
    texts = [["a", "bcd"], ["ef", "g", "hi"], ["words", "w", "o", "r", "d"]]
    batches = [encoder.processor.collate([encoder.processor.features(text, []) for text in chunk]) for chunk in texts]
    expected = [encoder.embed(batch) for batch in batches]
    with compiled(encoder, recipe.train):
        found = [encoder.embed(batch) for batch in batches]
    assert max(float((ours - plain).abs().max()) for ours, plain in zip(found, expected, strict=True)) <= 1e-6
    assert len(graphs) == 3  # the trial, a layer, the last one


def test_names_and_layers_are_the_models_own_inside_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKEND", "eager")
    recipe = recipe_for(PLAIN)
    encoder = load_encoder(recipe, None)
    names, layers = list(encoder.model.state_dict()), encoder.model.model.language_model.layers
    with compiled(encoder, recipe.train):
        assert list(encoder.model.state_dict()) == names and all("forward" in vars(layer) for layer in layers)
    assert not any("forward" in vars(part) for part in encoder.model.modules())


def test_the_layers_are_put_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKEND", "eager")
    recipe = recipe_for(PLAIN)
    encoder = load_encoder(recipe, None)
    with pytest.raises(KeyError), compiled(encoder, recipe.train):
        raise KeyError
    assert not any("forward" in vars(part) for part in encoder.model.modules())


def test_a_machine_without_a_compiler_is_an_error_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    recipe = recipe_for(PLAIN)
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}),
        pytest.raises(EnvError, match="train.compile: torch cannot compile here.*or write false"),
        compiled(load_encoder(recipe, None), recipe.train),
    ):
        pass


@pytest.mark.parametrize("engine", ["fsdp2", "zero1", "zero3"])
def test_spread_weights_are_refused(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=f"train.compile works with train.engine: ddp, not {engine}"):
        recipe_for(PLAIN, engine=engine).validate()
    monkeypatch.setattr("vlm2vec.engines.launch.implied_engine", lambda environment: engine)
    with pytest.raises(RecipeError, match=f"not {engine}"):  # asked for by the launcher
        start(recipe_for(PLAIN))


def test_kernels_are_not_compiled_again() -> None:
    with pytest.raises(RecipeError, match="train.compile would compile the kernels of liger again"):
        changed(recipe_for(PLAIN), "model", kernels="liger").validate()
