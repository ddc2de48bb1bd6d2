"""The same step on two ranks and on one process: situations that ranks can be in, and gradients, norm and update of both.

The single process is the oracle. It embeds the chunks of all ranks one after the other, keeps every graph, and differentiates the loss of
the whole batch once: no second pass, no gathering, no reduction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.ranks import fork_ranks
from tests.runs import tiny_recipe
from vlm2vec import dist
from vlm2vec.batch import Batch, make_batch
from vlm2vec.chunks import plan_chunks
from vlm2vec.config import Recipe
from vlm2vec.data.types import ImageRef, Item, Pair
from vlm2vec.engines import Engine, base, prepare, trainable, zero
from vlm2vec.gradcache import seeded
from vlm2vec.losses import InfoNCE
from vlm2vec.step import Layout, Step, step_seed
from vlm2vec.trainer import load_encoder

LORA = "{rank: 4, alpha: 8}"
LR = 100.0  # of the SGD step: with gradients clipped to 0.01 the update is as large as the weights
Pairs = list[list[Pair]]  # by rank


def text(*words: str) -> Item:
    return Item(" ".join(words))


def picture(number: int, side: int = 56) -> Item:
    return Item("look", (ImageRef(Image.new("RGB", (side, side + 28 * (number % 2)), (40 * number % 256, 90, 200 - 30 * number % 200))),))


def pair(number: int, query: Item, positive: Item, *negatives: Item) -> Pair:
    return Pair(f"made:{number}", "made", query, positive, negatives)


def mixed(start: int, count: int) -> list[Pair]:
    """Pictures and texts of different lengths, one negative every third pair."""
    numbers = range(start, start + count)
    return [pair(n, picture(n), text(*["word"] * (1 + n % 5), str(n)), *([text("not", str(n))] if n % 3 == 0 else [])) for n in numbers]


def words(start: int, count: int) -> list[Pair]:
    return [pair(n, text("question", "very " * (n % 4), str(n)), text("answer", str(n))) for n in range(start, start + count)]


@dataclass(frozen=True)
class Situation:
    """What the two ranks hold, and the keys of the recipe that matter."""

    pairs: Callable[[], list[Pairs]] = lambda: [[mixed(0, 3), mixed(3, 3)]]  # by micro-batch
    family: str = "qwen2_vl"
    lora: str = LORA
    parts: str = "[]"
    model: dict[str, Any] | None = None
    train: dict[str, Any] | None = None
    loss: dict[str, Any] | None = None

    def recipe(self, run_dir: Path, engine: str | None = None) -> Recipe:
        recipe = tiny_recipe(run_dir, self.family, self.lora, self.parts)
        train = {"chunk_tokens": 60, "accumulate": len(self.pairs()), "clip": 0.01, "engine": engine, **(self.train or {})}
        return replace(
            recipe,
            model=replace(recipe.model, **(self.model or {})),
            train=replace(recipe.train, **train),
            loss=replace(recipe.loss, **(self.loss or {})),
        )


FULL = {"lora": "null", "parts": "[language, projector, vision]"}
ON_VISION = {"lora": "{rank: 4, parts: [language, vision]}", "parts": "[projector]"}


def text_beside_pictures() -> list[Pairs]:
    return [[words(0, 3), mixed(3, 3)]]


SITUATIONS = {
    "lora": Situation(),
    "full": Situation(**FULL),
    "text beside pictures, lora": Situation(text_beside_pictures),
    "text beside pictures, vision trained": Situation(text_beside_pictures, **FULL),
    "text beside pictures, lora on vision": Situation(
        text_beside_pictures, lora="{rank: 4, parts: [language, vision]}", parts="[projector]"
    ),
    "text alone, everything trained": Situation(lambda: [[words(0, 3), words(3, 3)]], **FULL),
    "numbers of chunks differ": Situation(lambda: [[mixed(0, 1), mixed(1, 6)]], train={"chunk_tokens": 40}),
    "duplicates across ranks": Situation(lambda: [[mixed(0, 3), [*mixed(0, 1), *mixed(6, 2)]]]),
    "ragged negatives": Situation(lambda: [[[pair(0, picture(0), text("a"), *[text("no", str(n)) for n in range(5)])], mixed(1, 3)]]),
    "accumulated": Situation(lambda: [[words(0, 2), mixed(2, 2)], [mixed(4, 3), words(7, 2)], [mixed(9, 2), mixed(11, 2)]], **FULL),
    "dropout": Situation(lora="{rank: 4, dropout: 0.3, dora: true}"),
    "graphs kept": Situation(train={"keep_tokens": 90, "chunk_tokens": 40}),
    "bf16": Situation(train={"precision": "bf16"}),
    "bf16, full": Situation(text_beside_pictures, train={"precision": "bf16"}, **FULL),
    "frozen weights in bf16": Situation(model={"dtype": "bfloat16"}),
    "activation checkpointing": Situation(train={"activation_checkpointing": True}),
    "activation checkpointing, full": Situation(text_beside_pictures, train={"activation_checkpointing": True}, **FULL),
    "left padding, mean pooling": Situation(model={"padding_side": "left", "pooling": "mean"}),
    "own rate of the projector, decay": Situation(train={"projector_lr": 5e-3, "weight_decay": 0.1}, **FULL),
    "projector trained, layers adapted": Situation(
        lambda: [[[*mixed(0, 4), *words(4, 3)], words(7, 6)]], parts="[projector]", train={"chunk_tokens": 30, "keep_tokens": 60}
    ),
    "vision alone trained": Situation(text_beside_pictures, lora="null", parts="[vision]"),
    "packed": Situation(text_beside_pictures, model={"attention": "packed"}, train={"activation_checkpointing": True}),
    "smolvlm": Situation(text_beside_pictures, "smolvlm", **FULL),
    "vista": Situation(text_beside_pictures, "vlm2vec_vista", **FULL),
    "mllama": Situation(text_beside_pictures, "mllama", **FULL),
}


def disturbed(recipe: Recipe) -> Any:
    """An encoder whose adapters do something already."""
    encoder = load_encoder(recipe, None)
    noise = torch.Generator().manual_seed(1)
    for parameter in (parameter for parameter in encoder.model.parameters() if parameter.requires_grad):
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=noise).to(parameter.dtype)
    return encoder


def sgd(options: Any, groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=options.lr)


def oracle(situation: Situation, optimizer: str) -> dict[str, Tensor]:
    """Gradients before clipping, their norm, and weights after a step of one process."""
    recipe = situation.recipe(Path("unused"))
    encoder, loss = disturbed(recipe), InfoNCE(recipe.loss)
    engine = made(recipe, encoder, loss, optimizer)
    step = Step(recipe, engine)
    for micro, by_rank in enumerate(situation.pairs()):
        value = whole_loss(recipe, step, micro, by_rank)
        (value / recipe.train.accumulate).backward()
    return finish(recipe, engine)


def whole_loss(recipe: Recipe, step: Step, micro: int, by_rank: Pairs) -> Tensor:
    """The loss of all ranks' pairs, its whole graph held."""
    rows, ids, offset = [], [], 0
    indices: list[list[Tensor]] = [[], [], []]
    for rank, pairs in enumerate(by_rank):
        batch = make_batch(pairs, step.encoder.processor)
        chunks = plan_chunks([len(features) for features in batch.features], recipe.train.chunk_tokens, step.encoder.processor.packed)
        order = torch.tensor([row for chunk in chunks for row in chunk])
        for index, chunk in enumerate(chunks):
            with seeded(step_seed(recipe.run.seed, 0, micro, rank, index)):
                rows.append(step.encoder.embed(step.encoder.processor.collate([batch.features[row] for row in chunk])))
        ids.append(batch.item_id_I[order])
        for found, index in zip(indices, (batch.query_B, batch.positive_B, batch.negative_K), strict=True):
            found.append(torch.argsort(order)[index] + offset)
        offset += len(order)
    layout = Layout(torch.cat(ids), *[torch.cat(found) for found in indices])
    return layout.contrast(step.loss, torch.cat(rows))[0]


def made(recipe: Recipe, encoder: Any, loss: InfoNCE, optimizer: str) -> Engine:
    real = base.make_optimizer
    base.make_optimizer = sgd if optimizer == "sgd" else real
    try:
        return prepare(recipe.train, encoder, loss)
    finally:
        base.make_optimizer = real


def finish(recipe: Recipe, engine: Engine) -> dict[str, Tensor]:
    """Reduce, clip and step; gradients as `gradient/<name>`, `norm`, weights as `weight/<name>`."""
    engine.reduce()
    found = {f"gradient/{name}": tensor for name, tensor in full_gradients(engine).items()}
    found["norm"] = torch.tensor(engine.clip(recipe.train.clip))
    engine.step(LR if isinstance(engine.optimizer, torch.optim.SGD) else recipe.train.lr)
    with engine.whole():
        found |= {
            f"weight/{name}": tensor.detach().clone() for name, tensor in trainable(engine.encoder, engine.loss).items() if dist.is_main()
        }
    return found


def full_gradients(engine: Engine) -> dict[str, Tensor]:
    """By name, as a single process would hold them."""
    if engine.name.startswith("zero"):
        from deepspeed.utils import safe_get_full_grad

        spread = {name: safe_get_full_grad(parameter) for name, parameter in engine.parameters.items() if name not in engine.replicated}
        return {name: tensor.clone() for name, tensor in spread.items()} | {
            name: parameter.grad.clone() for name, parameter in engine.replicated.items()
        }
    found = {name: parameter.grad.detach() for name, parameter in engine.parameters.items()}
    return {name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone() for name, tensor in found.items()}


def on_ranks(situation: Situation, engine_name: str, optimizer: str, folder: Path) -> dict[str, Tensor]:
    """The same from two ranks, as rank 0 holds it."""
    file = folder / "found.safetensors"
    codes = fork_ranks(partial(_rank, situation, engine_name, optimizer, file), world=2)
    assert codes == [0, 0]
    return load_file(file)


def _rank(situation: Situation, engine_name: str, optimizer: str, file: Path, rank: int) -> None:
    recipe = situation.recipe(Path("unused"), engine_name)
    encoder, loss = disturbed(recipe), InfoNCE(recipe.loss)
    engine = made(recipe, encoder, loss, optimizer)
    assert engine.name == engine_name
    step = Step(recipe, engine)
    batches: Sequence[Batch] = [make_batch(by_rank[rank], encoder.processor) for by_rank in situation.pairs()]
    for micro, batch in enumerate(batches):
        step._backward(0, micro, batch, last=micro == len(batches) - 1)
    found = finish(recipe, engine)
    if rank == 0:
        save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, file)


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of every tensor; a tensor that is zero in the oracle must be zero."""
    assert found.keys() == expected.keys()
    return {
        name: ((found[name].double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1e-12)).item()
        for name, tensor in expected.items()
    }


def engines(*names: str, mark: Any = ()) -> list[Any]:
    """Parameters of a test, without those of a library that is not here."""
    absent = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra deepspeed")
    marks = [mark] if mark else []
    return [pytest.param(name, marks=[*marks, absent] if name.startswith("zero") else marks) for name in names]


def warm_up() -> None:
    """Import what every rank will need, once and before forking."""
    import_module("vlm2vec.engines.fsdp")
    if find_spec("deepspeed") is not None:
        zero.deepspeed()
        for name in ("muon.muon_optimizer", "stage3", "stage_1_and_2"):
            import_module(f"deepspeed.runtime.zero.{name}")
