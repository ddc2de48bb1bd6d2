"""What must hold for every family in the registry, on its miniature."""

from __future__ import annotations

import hashlib
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.backbones.common import PROMPT, embed, mixed_items, picture
from vlm2vec.backbones import load_backbone, registry
from vlm2vec.backbones.base import Backbone, Processor
from vlm2vec.config import ModelConfig
from vlm2vec.errors import DataError

Tiny = Callable[..., Backbone]
pytestmark = pytest.mark.parametrize("model_type", sorted(registry()))


def test_every_parameter_belongs_to_a_part(tiny: Tiny, model_type: str) -> None:
    backbone = tiny(model_type)
    sizes = Counter()
    for name, parameter in backbone.model.named_parameters():
        sizes[backbone.part_of(name)] += parameter.numel()
    assert {"language", "projector", "vision"} <= set(sizes) <= {"language", "projector", "vision", "head"}
    assert sum(sizes.values()) < 200_000


def test_every_linear_layer_belongs_to_a_part(tiny: Tiny, model_type: str) -> None:
    backbone = tiny(model_type)
    parts = {backbone.part_of(name) for name, module in backbone.model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert "language" in parts  # the projector of one family is a bare matrix, the vision tower of another only convolves


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["last", "mean"])
def test_alone_equals_padded_with_others(tiny: Tiny, model_type: str, side: str, how: str) -> None:
    backbone = tiny(model_type, padding_side=side)
    rows = mixed_items(backbone)
    together = embed(backbone, rows, how)
    alone = torch.cat([embed(backbone, [row], how) for row in rows])
    assert len({len(row) for row in rows}) > 3
    assert (together - alone).abs().max() <= 1e-6


def test_padding_side_changes_nothing(tiny: Tiny, model_type: str) -> None:
    left, right = (tiny(model_type, padding_side=side) for side in ("left", "right"))
    assert (embed(left, mixed_items(left)) - embed(right, mixed_items(right))).abs().max() <= 1e-6


def test_an_embedding_depends_on_text_and_on_picture(tiny: Tiny, model_type: str) -> None:
    backbone = tiny(model_type)
    items = [(PROMPT, 0), (PROMPT, 1), ("<|image_1|>\nWhat is that?\n", 0)]
    rows = embed(backbone, [backbone.processor.features(prompt, [picture(64, 64, seed)]) for prompt, seed in items])
    assert (rows[0] - rows[1]).abs().max() > 1e-3
    assert (rows[0] - rows[2]).abs().max() > 1e-3


def test_pictures_follow_their_placeholders(tiny: Tiny, model_type: str) -> None:
    processor = tiny(model_type).processor
    one, two = picture(60, 60, 1), picture(40, 100, 2)
    straight = processor.features("<|image_1|> or <|image_2|>\n", [one, two])
    swapped = processor.features("<|image_2|> or <|image_1|>\n", [two, one])
    assert torch.equal(straight.input_ids, swapped.input_ids)
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(straight.images, swapped.images, strict=True))


def test_a_cut_text_loses_no_picture_and_keeps_its_last_newline(tiny: Tiny, model_type: str) -> None:
    backbone = tiny(model_type)
    processor = backbone.processor
    prompt, image = "Look at <|image_1|> here\nand say what it is.\n\n", picture(90, 60)
    whole = processor.features(prompt, [image])
    rest = len(processor.wrap([])) + processor.image_tokens_estimate(*image.size) + len("".join(processor.margin))
    text = len(whole) - rest
    newline = processor.features("\n", []).input_ids[-1 - len(processor.suffix)]
    cuts = []
    for limit in range(1, text + 2):
        processor.options = replace(processor.options, max_tokens=limit)
        cuts.append(cut := processor.features(prompt, [image]))
        assert _count(processor, cut.input_ids) == _count(processor, whole.input_ids) > 0
        assert len(cut) == rest + min(limit, text)
        assert cut.truncated == max(0, text - limit)
        assert cut.input_ids[len(cut) - 1 - len(processor.suffix)] == newline
    assert embed(backbone, cuts).isfinite().all()


def test_a_text_far_too_long_is_warned_of_once(tiny: Tiny, model_type: str, caplog: pytest.LogCaptureFixture) -> None:
    processor = tiny(model_type, max_tokens=5).processor
    cuts = [processor.features(text, []).truncated for text in ("x" * 50, "x" * 51, "y" * 60)]
    assert cuts == [45, 46, 55]
    assert [record.getMessage() for record in caplog.records if record.name.startswith("vlm2vec")] == [
        "a text of 51 tokens was cut to 5 (model.max_tokens); further ones are cut without a warning"
    ]


def test_no_text_becomes_a_control_token(tiny: Tiny, model_type: str) -> None:
    processor = tiny(model_type).processor
    added = [token.content for token in processor.tokenizer.added_tokens_decoder.values()]
    control = set(processor.tokenizer.all_special_ids) | set(processor.tokenizer.added_tokens_decoder)
    plain = processor.features(PROMPT, [picture(64, 64)])
    hostile = processor.features(f"{''.join(added)}<|image_1|>{' '.join(added)}<|image_1|>\n", [picture(64, 64)])
    assert len(added) > 2
    assert Counter(t for t in hostile.input_ids.tolist() if t in control) == Counter(t for t in plain.input_ids.tolist() if t in control)


def test_a_saved_folder_loads_bit_equal(tiny: Tiny, model_type: str, tmp_path: Path) -> None:
    backbone = tiny(model_type)
    backbone.save_pretrained(tmp_path)
    again = load_backbone(ModelConfig(path=str(tmp_path)))
    assert again.processor.fingerprint == backbone.processor.fingerprint
    batch, batch_again = (each.processor.collate(mixed_items(each)) for each in (backbone, again))
    assert all(torch.equal(batch[name], batch_again[name]) for name in batch)
    assert torch.equal(backbone.hidden(batch), again.hidden(batch_again))


def test_the_processor_pickles(tiny: Tiny, model_type: str) -> None:
    processor = tiny(model_type).processor
    again = pickle.loads(pickle.dumps(processor))
    here, there = (each.features(PROMPT, [picture(90, 60)]) for each in (processor, again))
    assert torch.equal(here.input_ids, there.input_ids)
    assert torch.equal(here.images[0]["pixel_values"], there.images[0]["pixel_values"])
    assert again.fingerprint == processor.fingerprint


def test_the_fingerprint_sees_the_options(tiny: Tiny, model_type: str) -> None:
    assert tiny(model_type).processor.fingerprint != tiny(model_type, max_tokens=17).processor.fingerprint
    assert tiny(model_type).processor.fingerprint == tiny(model_type, padding_side="left").processor.fingerprint


def test_the_estimate_is_the_number_of_image_tokens(tiny: Tiny, model_type: str) -> None:
    processor = tiny(model_type).processor
    without = processor.features("".join(processor.margin) + PROMPT.removeprefix("<|image_1|>"), [])
    for size in [(1, 1), (27, 27), (64, 64), (65, 64), (64, 33), (31, 200), (300, 100), (500, 499), (1000, 20)]:
        with_picture = processor.features(PROMPT, [picture(*size)])
        assert len(with_picture) - len(without) == processor.image_tokens_estimate(*size)


def test_pictures_are_squashed_before_the_family_sees_them(tiny: Tiny, model_type: str) -> None:
    plain, squashed = tiny(model_type).processor, tiny(model_type, resize=64).processor
    image = picture(150, 40)
    expected, found = plain.features(PROMPT, [image.resize((64, 64), Image.Resampling.BICUBIC)]), squashed.features(PROMPT, [image])
    assert torch.equal(found.input_ids, expected.input_ids)
    assert torch.equal(found.images[0]["pixel_values"], expected.images[0]["pixel_values"])
    assert squashed.image_tokens_estimate(150, 40) == plain.image_tokens_estimate(64, 64)
    assert squashed.fingerprint != plain.fingerprint


def test_towers_run_once_for_pictures_and_never_for_text(tiny: Tiny, model_type: str) -> None:
    backbone = tiny(model_type)
    calls: list[int] = []
    for index, tower in enumerate(backbone.towers()):
        tower.register_forward_hook(lambda *_, index=index: calls.append(index))
    embed(backbone, mixed_items(backbone))
    assert calls == list(range(len(backbone.towers())))
    embed(backbone, [backbone.processor.features("words\n", [])])
    assert len(calls) == len(backbone.towers())


def test_gradients_reach_every_part_but_the_head(tiny: Tiny, model_type: str) -> None:
    backbone = tiny(model_type)
    backbone.hidden(backbone.processor.collate(mixed_items(backbone))).square().sum().backward()
    largest: Counter[str] = Counter()
    for name, parameter in backbone.model.named_parameters():
        size = 0.0 if parameter.grad is None else float(parameter.grad.abs().max())
        largest[backbone.part_of(name)] = max(largest[backbone.part_of(name)], size)
    assert largest.pop("head", 0.0) == 0.0
    assert min(largest.values()) > 0


def test_equal_seeds_give_equal_checkpoints(tiny_folder: Callable[[str], Path], model_type: str, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    family = registry()[model_type]
    again, other = (family.tiny_checkpoint(tmp_path / str(seed), seed, model_type) for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert _files(again) == _files(tiny_folder(model_type))
    assert _files(again)["model.safetensors"] != _files(other)["model.safetensors"]


def test_a_checkpoint_has_the_usual_files(tiny_folder: Callable[[str], Path], model_type: str) -> None:
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"}
    assert names <= _files(tiny_folder(model_type)).keys()


def test_bfloat16_in_weights_or_in_passing(tiny: Tiny, model_type: str) -> None:
    backbone = tiny(model_type, dtype="bfloat16")
    rows = mixed_items(backbone)
    expected = embed(tiny(model_type), rows)
    assert (embed(backbone, rows) - expected).abs().max() < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        assert (embed(tiny(model_type), rows) - expected).abs().max() < 0.1


def test_what_cannot_be_embedded_is_said(tiny: Tiny, model_type: str) -> None:
    processor = tiny(model_type).processor
    with pytest.raises(DataError, match="no placeholder for picture 2 of 2"):
        processor.features(PROMPT, [picture(64, 64), picture(64, 64)])
    with pytest.raises(DataError, match="lone surrogate at character 3, after 'abc'"):
        processor.features("abc\ud800", [])
    if not processor.wrap([]):
        with pytest.raises(DataError, match="neither text nor image"):
            processor.features("", [])


def _count(processor: Processor, ids: torch.Tensor) -> int:
    return int((ids == processor.image_token_id).sum())


def _files(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
