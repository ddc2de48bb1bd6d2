"""The loop: exact gradients on real model classes, schedules in closed form, resuming bit for bit, stopping before harm."""

from __future__ import annotations

import json
import math
import os
import signal
from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import LORA, final_bytes, start_run, tiny_recipe
from vlm2vec import checkpoint, io
from vlm2vec.backbones import registry
from vlm2vec.batch import Batch, make_batch
from vlm2vec.chunks import plan_chunks
from vlm2vec.config import Recipe, TrainConfig
from vlm2vec.encoder import Encoder
from vlm2vec.engines import prepare, trainable
from vlm2vec.errors import EnvError, Interrupted, NonFiniteError, RecipeError
from vlm2vec.losses import InfoNCE
from vlm2vec.replay import Replay
from vlm2vec.signals import StopSignal
from vlm2vec.step import Step, set_training_mode, step_seed
from vlm2vec.trainer import (
    LOG,
    learning_rate,
    load_encoder,
    mixture_of,
    prepare_run_dir,
)

FAMILIES = sorted(registry())


def changed(recipe: Recipe, section: str, **keys: Any) -> Recipe:
    return replace(recipe, **{section: replace(getattr(recipe, section), **keys)})


def gradients(recipe: Recipe, double: bool = True) -> dict[str, torch.Tensor]:
    """Gradient of the first step, in float64 unless told otherwise, by parameter name."""
    encoder, loss = load_encoder(recipe, None), InfoNCE(recipe.loss)
    if double:
        encoder.model.double()
        loss.double()
    for parameter in (parameter for parameter in encoder.model.parameters() if parameter.requires_grad):
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(parameter.dtype)
    step = Step(recipe, prepare(recipe.train, encoder, loss))
    mixture = mixture_of(recipe)
    for micro in range(recipe.train.accumulate):
        batch = make_batch(mixture.pairs(micro), encoder.processor)
        if double:
            for features in batch.features:
                features.images = [
                    {key: value.double() if value.is_floating_point() else value for key, value in image.items()}
                    for image in features.images
                ]
        step._backward(0, micro, batch)
    return {name: parameter.grad for name, parameter in trainable(encoder, loss).items()}


def relative_errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    return {
        name: ((found[name] - grad).norm() / grad.norm().clamp(min=1e-12)).item() for name, grad in expected.items() if grad is not None
    }


VARIANTS = {
    "lora on language, frozen vision replayed": {},
    "everything trained": {"lora": "null", "parts": "[language, projector, vision]"},
    "lora on vision": {"lora": "{rank: 4, dropout: 0.1, parts: [language, vision]}"},
}


def families_and_variants() -> list[Any]:
    """Every pair; a third of them, each family and each variant among them, in every run of the tests, all in the slow ones."""
    return [
        pytest.param(family, variant, marks=[] if (number + place) % len(VARIANTS) == 0 else pytest.mark.slow)
        for number, family in enumerate(FAMILIES)
        for place, variant in enumerate(VARIANTS)
    ]


@pytest.mark.parametrize(("family", "variant"), families_and_variants())
def test_cached_gradients_equal_the_plain_ones_in_float64(family: str, variant: str, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, family, **VARIANTS[variant])
    try:
        cached = gradients(changed(recipe, "train", accumulate=2))
    except RecipeError:
        pytest.skip("no such layer in this family")
    plain = gradients(changed(recipe, "train", accumulate=2, keep_tokens=10**6))
    errors = relative_errors(cached, plain)
    assert max(errors.values()) <= 1e-9, errors
    assert sum(grad.abs().sum() > 0 for grad in plain.values() if grad is not None) >= 0.9 * len(errors)
    assert plain["loss.log_temperature"].abs() > 0


def test_chunks_do_not_change_the_gradient_without_dropout(tmp_path: Path) -> None:
    """Against one padded batch of everything, so that padding and chunking are in the comparison too."""
    recipe = tiny_recipe(tmp_path, lora=LORA.replace("0.1", "0.0"))
    whole = gradients(changed(recipe, "train", chunk_tokens=10**6, keep_tokens=10**6), double=False)
    errors = relative_errors(gradients(changed(recipe, "train", chunk_tokens=60), double=False), whole)
    assert max(errors.values()) <= 2e-5, errors


@pytest.mark.parametrize("chunk_tokens", [60, 10**6])
def test_packed_chunks_change_no_gradient(chunk_tokens: int, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, lora=LORA.replace("0.1", "0.0"))
    padded = gradients(changed(recipe, "train", keep_tokens=10**6))
    errors = relative_errors(gradients(changed(changed(recipe, "model", attention="packed"), "train", chunk_tokens=chunk_tokens)), padded)
    assert max(errors.values()) <= 1e-9, errors


def test_packed_chunks_hold_no_padding(tmp_path: Path) -> None:
    """Chunks are filled by the tokens of their items, and so is what keeps its graph."""
    recipe = changed(changed(tiny_recipe(tmp_path), "model", attention="packed"), "train", chunk_tokens=60, keep_tokens=120)
    encoder = load_encoder(recipe, None)
    calls: list[tuple[int, ...]] = []
    encoder.model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: calls.append(tuple(inputs[0].shape)))
    batch = make_batch(mixture_of(recipe).pairs(0), encoder.processor)
    found = Step(recipe, prepare(recipe.train, encoder, InfoNCE(recipe.loss)))._backward(0, 0, batch)
    assert found["padding_share"] == 0
    chunks = plan_chunks([len(features) for features in batch.features], 60, packed=True)
    tokens = [sum(len(batch.features[row]) for row in chunk) for chunk in chunks]
    kept = bisect_right(list(accumulate(tokens)), 120)
    assert 0 < kept < len(chunks)
    assert calls == [(1, count) for count in [*tokens, *tokens[kept:]]]


@pytest.mark.parametrize("chunk_tokens", [60, 10**6])
def test_the_loss_is_that_of_the_pairs_as_they_were_drawn(chunk_tokens: int, tmp_path: Path) -> None:
    """Items embedded one by one in the order of the pairs: whoever mixes up rows while chunking fails here."""
    recipe = changed(tiny_recipe(tmp_path, lora="{rank: 4}"), "train", chunk_tokens=chunk_tokens)
    encoder, loss = load_encoder(recipe, None), InfoNCE(recipe.loss)
    pairs = mixture_of(recipe).pairs(0)
    step = Step(recipe, prepare(recipe.train, encoder, loss))
    found = step._backward(0, 0, make_batch(pairs, encoder.processor))
    targets = [pair.positive for pair in pairs] + [negative for pair in pairs for negative in pair.negatives]
    ids = {item.key: index for index, item in enumerate([*targets, *(pair.query for pair in pairs)])}
    expected, stats = loss(
        encoder.encode([pair.query for pair in pairs]),
        encoder.encode(targets),
        positive_B=torch.arange(len(pairs)),
        target_id_N=torch.tensor([ids[item.key] for item in targets]),
        query_id_B=torch.tensor([ids[pair.query.key] for pair in pairs]),
    )
    assert any(pair.negatives for pair in pairs)
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert found["positive_similarity"] == pytest.approx(stats["positive_similarity"].item(), abs=1e-5)


def test_chunks_that_fit_are_encoded_once_and_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by padded tokens: of the chunks in their order, as many keep their graph as `keep_tokens` holds, and the first always."""
    recipe = tiny_recipe(tmp_path)
    embed, tokens = Step._embed, []

    def counted(self: Step, batch: Batch, chunk: list[int], replay: Replay) -> torch.Tensor:
        tokens.append(len(chunk) * len(batch.features[chunk[0]]))
        return embed(self, batch, chunk, replay)

    monkeypatch.setattr(Step, "_embed", counted)
    expected = gradients(recipe)
    chunks = tokens[: (len(tokens) + 1) // 2]
    assert tokens == [*chunks, *chunks[1:]] and len(chunks) > 2
    for keep_tokens, kept in [(chunks[0] - 1, 1), (sum(chunks[:2]), 2), (sum(chunks), len(chunks))]:
        tokens.clear()
        errors = relative_errors(gradients(changed(recipe, "train", keep_tokens=keep_tokens)), expected)
        assert tokens == chunks + chunks[kept:]
        assert max(errors.values()) <= 1e-9, errors


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, lora="{rank: 4, dropout: 0.1}")
    errors = relative_errors(gradients(changed(recipe, "train", activation_checkpointing=True)), gradients(recipe))
    assert max(errors.values()) <= 1e-9, errors


def test_schedules_in_closed_form() -> None:
    options = TrainConfig(steps=10, global_batch=8, lr=2.0, warmup=4)
    rates = [learning_rate(options, step, 10) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 10 / 6, 8 / 6, 1.0, 4 / 6, 2 / 6])
    cosine = replace(options, schedule="cosine")
    assert learning_rate(cosine, 7, 10) == pytest.approx(1 + math.cos(math.pi / 2))
    assert learning_rate(replace(options, schedule="constant"), 9, 10) == 2.0


def test_seeds_differ_in_every_argument() -> None:
    assert len({step_seed(*parts) for parts in [(1, 0, 0, 0, 0), (0, 1, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 1, 0), (0, 0, 0, 0, 1)]}) == 5
    assert 0 <= step_seed(1, 2, 3) < 2**63


def test_frozen_modules_evaluate_while_trained_ones_train() -> None:
    encoder = Encoder.from_pretrained("builtin/tiny-smolvlm")
    encoder.train_only(("language",))
    set_training_mode(encoder.model)
    for name, module in encoder.model.named_modules():
        trained = any(parameter.requires_grad for parameter in module.parameters())
        assert module.training == trained or not list(module.parameters()), name


def test_training_lowers_the_loss_and_moves_only_what_is_trained(tmp_path: Path) -> None:
    recipe = changed(tiny_recipe(tmp_path, steps=20), "train", lr=3e-3)
    before = load_encoder(recipe, None).model.state_dict()
    after = start_run(recipe).model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name].cpu())}
    assert moved == {name for name in before if "lora_" in name}
    losses = [row["loss"] for row in io.read_jsonl(tmp_path / LOG)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_a_run_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = changed(tiny_recipe(tmp_path / "whole", steps=6), "checkpoint", every=1)
    start_run(whole)
    for cut in (1, 4):
        parted = changed(tiny_recipe(tmp_path / f"cut{cut}", steps=6), "checkpoint", every=1)
        stopping = StopAfter(cut)
        with pytest.raises(Interrupted):
            start_run(parted, stop=stopping)
        start_run(parted)
        assert final_bytes(tmp_path / f"cut{cut}") == final_bytes(tmp_path / "whole")


class StopAfter(StopSignal):
    """Asks to stop once `steps` steps were taken."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps + 1
        self.number = signal.SIGTERM

    @property
    def requested(self) -> bool:
        self.left -= 1
        return self.left <= 0


def test_workers_do_not_change_a_run(tmp_path: Path) -> None:
    for workers in (0, 2):
        start_run(changed(tiny_recipe(tmp_path / str(workers), steps=3), "data", workers=workers))
    assert final_bytes(tmp_path / "0") == final_bytes(tmp_path / "2")


def test_a_full_model_resumes_too(tmp_path: Path) -> None:
    options = {"lora": "null", "parts": "[language, projector, vision]", "steps": 4}
    start_run(changed(tiny_recipe(tmp_path / "whole", **options), "checkpoint", every=2))
    parted = changed(tiny_recipe(tmp_path / "cut", **options), "checkpoint", every=2)
    with pytest.raises(Interrupted):
        start_run(parted, stop=StopAfter(3))
    start_run(parted)
    assert final_bytes(tmp_path / "cut") == final_bytes(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_its_code(number: int, tmp_path: Path) -> None:
    with StopSignal() as stop:
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted, match="run the same command to go on") as caught:
            start_run(tiny_recipe(tmp_path), stop=stop)
    assert caught.value.exit_code == 128 + number
    assert checkpoint.latest(tmp_path).name == "step-000000"


@pytest.mark.parametrize("where", ["embedding", "gradient", "loss"])
def test_a_nan_stops_before_the_optimizer_and_names_the_pairs(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = changed(tiny_recipe(tmp_path, steps=4), "checkpoint", every=1)
    poison(where, monkeypatch)
    with pytest.raises(NonFiniteError, match=r"step 3, rank 0.*batch ids dumped to .*nonfinite-3.json") as caught:
        start_run(recipe)
    assert caught.value.exit_code == 3
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-000001", "step-000002"]
    dumped = json.loads((tmp_path / "nonfinite-3.json").read_text())
    assert dumped["pair_ids"] == [mixture_of(recipe).batch_ids(2)]
    assert len(io.read_jsonl(tmp_path / LOG)) == 2


def poison(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a NaN into the third step, at one of the three places where it can arise."""
    real_backward, real_embed, real_forward = Step._backward, Encoder.embed, InfoNCE.forward
    current = {"step": 0}

    def backward(self: Step, step: int, *rest: Any, **options: Any) -> Any:
        current["step"] = step
        result = real_backward(self, step, *rest, **options)
        if where == "gradient" and step == 2:
            next(iter(self.engine.parameters.values())).grad.view(-1)[0] = float("nan")
        return result

    def embed(self: Encoder, batch: Any) -> torch.Tensor:
        rows = real_embed(self, batch)
        return rows * float("nan") if where == "embedding" and current["step"] == 2 else rows

    def forward(self: InfoNCE, *args: Any, **options: Any) -> Any:
        loss, stats = real_forward(self, *args, **options)
        return (loss * float("inf") if where == "loss" and current["step"] == 2 else loss), stats

    monkeypatch.setattr(Step, "_backward", backward)
    monkeypatch.setattr(Encoder, "embed", embed)
    monkeypatch.setattr(InfoNCE, "forward", forward)


def test_the_folder_of_another_recipe_is_not_touched(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    prepare_run_dir(recipe)
    prepare_run_dir(recipe)
    other = changed(recipe, "train", lr=5e-4)
    with pytest.raises(RecipeError, match=r"train.lr: 0.001 -> 0.0005.*--fresh"):
        prepare_run_dir(other)
    (tmp_path / "notes.txt").write_text("mine")
    prepare_run_dir(other, fresh=True)
    assert (tmp_path / "notes.txt").exists()


def test_a_run_folder_that_cannot_be_made_is_an_environment_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvError, match="cannot write"):
        prepare_run_dir(tiny_recipe(tmp_path / "file" / "run"))


def test_the_projector_has_its_own_learning_rate(tmp_path: Path) -> None:
    recipe = changed(tiny_recipe(tmp_path, "smolvlm", parts="[projector]"), "train", projector_lr=5e-3, weight_decay=0.1)
    encoder = load_encoder(recipe, None)
    optimizer = prepare(recipe.train, encoder, InfoNCE(recipe.loss)).optimizer
    ratios = {group["lr_ratio"]: group for group in optimizer.param_groups}
    projector = [parameter for name, parameter in encoder.model.named_parameters() if encoder.backbone.part_of(name) == "projector"]
    assert {id(p) for p in ratios[5.0]["params"]} == {id(p) for p in projector}
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups if any(p.ndim <= 1 for p in group["params"]))
