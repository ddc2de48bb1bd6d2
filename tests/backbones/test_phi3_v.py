"""Phi-3.5-vision against what the published implementation makes of tiny random weights, element by element; then what it lacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from tests.backbones.common import embed, mixed_items, picture
from vlm2vec.backbones import load_backbone
from vlm2vec.backbones.base import Backbone
from vlm2vec.backbones.phi3_v_image import Phi3VImageProcessor
from vlm2vec.backbones.phi3_v_model import LongRope, Phi3VConfig, Phi3VForCausalLM
from vlm2vec.collate import Features
from vlm2vec.config import ModelConfig
from vlm2vec.encoder import Encoder
from vlm2vec.errors import ModelError, RecipeError
from vlm2vec.lora import load_adapter
from vlm2vec.pooling import normalize, pool

DATA = Path(__file__).parents[1] / "data" / "phi3v"
CASES = json.loads((DATA / "cases" / "index.json").read_text("utf-8"))
PUBLISHED = try_to_load_from_cache("microsoft/Phi-3.5-vision-instruct", "tokenizer.json")
Tiny = Callable[..., Backbone]
each_kernel = pytest.mark.parametrize("attention", ["eager", "sdpa"])


def published(**options: Any) -> Backbone:
    return load_backbone(ModelConfig(path=str(DATA / "checkpoint"), **options))


def rows_of(backbone: Backbone, case: dict[str, Any]) -> list[Features]:
    """Features of a case. With `max_length` the published processor keeps that many tokens of a text without a picture, the first of
    them, and does not cut other texts; ours would keep the last newline.
    """
    rows, processor = [], backbone.processor
    for text, names in zip(case["texts"], case["images"], strict=True):
        cut = case["max_length"] and not names
        processor.options = replace(processor.options, max_tokens=case["max_length"] - 1 if cut else 10_000)
        images = [Image.open(DATA / "images" / f"{name}.png").convert("RGB") for name in names or ()]
        rows.append(processor.features(text.rstrip("\n") if cut else text, images))
    return rows


@torch.no_grad()
def states_of(backbone: Backbone, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """States of the tokens that are not padding, and unit embeddings."""
    hidden = backbone.hidden(batch)
    return hidden[batch["attention_mask"].bool()], normalize(pool(hidden, batch["attention_mask"], "last"))


def close(ours: Tensor, theirs: Tensor, bound: float) -> None:
    torch.testing.assert_close(ours, theirs, atol=bound, rtol=0)


# -- the published implementation


@each_kernel
@pytest.mark.parametrize("name", sorted(set(CASES) - {"text_special_tokens"}))
def test_ids_sizes_states_and_embeddings_equal_those_of_the_published_code(name: str, attention: str) -> None:
    expected = load_file(DATA / "cases" / f"{name}.safetensors")
    backbone = published(attention=attention, num_crops=CASES[name]["num_crops"])
    batch = backbone.processor.collate(rows_of(backbone, CASES[name]))
    assert torch.equal(batch["input_ids"], expected["input_ids"].clamp(min=-1))  # ours do not number the pictures
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert torch.equal(batch.get("image_sizes", torch.empty(0)), expected.get("image_sizes", torch.empty(0)))
    states, embeddings = states_of(backbone, batch)
    close(embeddings, expected["pooled_last_l2"], 1e-6)
    if name != "one_image":
        close(states, expected["states"], 2e-5)


@each_kernel
def test_control_tokens_have_the_states_of_the_published_code(attention: str) -> None:
    """Our processor never makes them of a text, so they are fed as ids."""
    expected = load_file(DATA / "cases" / "text_special_tokens.safetensors")
    backbone = published(attention=attention)
    ids = [backbone.processor.tokenizer(text)["input_ids"] for text in CASES["text_special_tokens"]["texts"]]
    batch = backbone.processor.collate([Features(torch.tensor(row)) for row in ids])
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    states, embeddings = states_of(backbone, batch)
    close(states, expected["states"], 2e-5)
    close(embeddings, expected["pooled_last_l2"], 1e-6)


@each_kernel
def test_gradients_equal_those_of_the_published_code(attention: str) -> None:
    expected = load_file(DATA / "cases" / "one_image.safetensors")
    backbone = published(attention=attention)
    batch = backbone.processor.collate(rows_of(backbone, CASES["one_image"]))
    embedding = normalize(pool(backbone.hidden(batch), batch["attention_mask"], "last"))
    (embedding * torch.linspace(-1, 1, 64)).sum().backward()
    gradients = {f"grad.{name}": parameter.grad for name, parameter in backbone.model.named_parameters()}
    stored = [name for name in expected if name.startswith("grad.")]
    assert len(stored) == 8
    for name in stored:
        close(gradients[name], expected[name], 1e-6)
    unread = {name.removeprefix("grad.") for name, gradient in gradients.items() if gradient is None}
    assert unread == {name for name, _ in backbone.model.named_parameters() if backbone.part_of(name) == "head"}
    assert len(unread) == 19


@each_kernel
@pytest.mark.parametrize("kind", ["adapter_dora", "adapter_lora"])
def test_adapters_in_the_published_layout_give_the_published_states(kind: str, attention: str) -> None:
    expected = load_file(DATA / kind / "expected.safetensors")["states"]
    backbone = published(attention=attention)
    adapter = load_adapter(backbone, DATA / kind)
    backbone.model.eval()
    batch = backbone.processor.collate(rows_of(backbone, CASES["one_image"]))
    close(states_of(backbone, batch)[0], expected, 2e-5)
    backbone.model = adapter.merge_and_unload()
    close(states_of(backbone, batch)[0], expected, 2e-5)


def test_the_tokenizer_gives_the_published_ids() -> None:
    tokenizer = published().processor.tokenizer
    for text, ids in json.loads((DATA / "tokenizer_golden.json").read_text("utf-8"))["with_bos"]:
        assert tokenizer(text)["input_ids"] == ids


@pytest.mark.skipif(not isinstance(PUBLISHED, str), reason="the published tokenizer is not in the Hub's cache")
def test_the_published_tokenizer_gives_the_published_ids() -> None:
    golden = json.loads((DATA / "tokenizer_golden_phi35.json").read_text("utf-8"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(PUBLISHED))
    for text, ids in golden["with_bos"]:
        assert tokenizer(text)["input_ids"] == ids
    processor = Phi3VImageProcessor()
    for _, names, runs in golden["processor_num_crops4_runlength"]:
        counts = [run[1] for run in runs if isinstance(run, list)]
        sizes = [map(int, name.rpartition("_")[2].split("x")) for name in names]
        assert counts == [processor.count_tokens(*processor.grid(*size)) for size in sizes]


def test_rotations_of_the_real_configuration_are_exact() -> None:
    expected = load_file(DATA / "rope.safetensors")
    scaling = {"type": "su", **{name: expected[name].tolist() for name in ("short_factor", "long_factor")}}
    rope = LongRope(Phi3VConfig(rope_scaling=scaling, max_position_embeddings=131072, original_max_position_embeddings=4096))
    assert rope.magnitude == pytest.approx(1.1902380714, abs=1e-10)
    for regime in ("short", "long"):
        cos, sin = rope(torch.zeros(1), expected[f"{regime}.position_ids"])
        assert torch.equal(cos, expected[f"{regime}.cos"]) and torch.equal(sin, expected[f"{regime}.sin"])


# -- independence of batch mates


def test_each_row_chooses_its_rope_factors_by_its_own_length(tiny: Tiny) -> None:
    config = tiny("phi3_v").model.config
    limit = config.original_max_position_embeddings
    lengths = [1, limit - 1, limit, limit + 1, limit + 40]
    positions = torch.stack([torch.arange(limit + 40).clamp(max=length - 1) for length in lengths])
    cos, sin = LongRope(config)(torch.zeros(1), positions)
    for row, length in enumerate(lengths):
        stock = Phi3RotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
        assert torch.equal(cos[row, :length], stock[0][0]) and torch.equal(sin[row, :length], stock[1][0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_short_row_beside_a_long_one_keeps_its_embedding(tiny: Tiny, side: str) -> None:
    backbone = tiny("phi3_v", padding_side=side, max_tokens=1000)
    rows = [backbone.processor.features(text, []) for text in ("few words\n", "x" * 126, "x" * 127, "x" * 128, "many words " * 40)]
    assert [len(row) for row in rows[1:4]] == [127, 128, 129]
    together, alone = embed(backbone, rows), torch.cat([embed(backbone, [row]) for row in rows])
    close(together, alone, 1e-6)


# -- what is computed


def test_only_crops_that_exist_and_layers_that_are_read_are_computed(tiny: Tiny) -> None:
    backbone = tiny("phi3_v")
    clip = backbone.model.model.vision_embed_tokens.img_processor.vision_model
    crops: list[int] = []
    layers: list[int] = []
    clip.embeddings.register_forward_hook(lambda module, inputs, output: crops.append(len(output)))
    for index, layer in enumerate(clip.encoder.layers):
        layer.register_forward_hook(lambda module, inputs, output, index=index: layers.append(index))
    embed(backbone, [backbone.processor.features("<|image_1|> <|image_2|>", [picture(56, 56), picture(200, 50)])])
    assert (crops, layers) == ([10], [0, 1])  # five crops each; the third of the three layers is not read


def test_gradients_are_the_same_when_activations_are_recomputed(tiny: Tiny) -> None:
    gradients = []
    for recompute in (False, True):
        backbone = tiny("phi3_v")
        calls = []
        backbone.model.model.layers[0].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        clip = backbone.model.model.vision_embed_tokens.img_processor.vision_model
        clip.encoder.layers[0].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if recompute:
            backbone.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        backbone.model.train()
        backbone.hidden(backbone.processor.collate(mixed_items(backbone))).square().sum().backward()
        assert len(calls) == (4 if recompute else 2)
        gradients.append({name: parameter.grad for name, parameter in backbone.model.named_parameters() if parameter.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-6)


def test_picture_tokens_without_their_features_are_refused(tiny: Tiny) -> None:
    backbone = tiny("phi3_v")
    batch = backbone.processor.collate([backbone.processor.features("<|image_1|> a", [picture(56, 56)])])
    with pytest.raises(ValueError, match="27 picture tokens, but 0 picture features"):
        backbone.hidden({name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")})
    with pytest.raises(ValueError, match="27 picture tokens, but 54 picture features"):
        backbone.hidden(batch | {name: torch.cat([batch[name]] * 2) for name in ("pixel_values", "image_sizes")})


# -- tokens


def test_every_piece_of_text_begins_anew_however_much_is_cut(tiny: Tiny) -> None:
    processor = tiny("phi3_v").processor
    first, second = picture(56, 56), picture(200, 50)
    counts = [processor.image_tokens_estimate(*image.size) - 1 for image in (first, second)]
    whole = processor.features("see <|image_1|><|image_2|> now\n", [first, second]).input_ids
    begin, newline = 1, int(whole[-1])
    for limit in range(1, 12):
        processor.options = replace(processor.options, max_tokens=limit)
        ids = processor.features("see <|image_1|><|image_2|> now\n", [first, second]).input_ids.tolist()
        assert ids.count(begin) == 3 and ids[0] == begin and ids[-1] == newline
        at = ids.index(-1)
        assert ids[at : at + sum(counts) + 2] == [-1] * counts[0] + [begin] + [-1] * counts[1] + [begin]
    assert torch.equal(torch.tensor(ids), whole)


def test_num_crops_bounds_the_crops_and_is_saved(tiny: Tiny, tmp_path: Path) -> None:
    own, one, many = (tiny("phi3_v", num_crops=crops).processor for crops in (None, 1, 9))
    assert [len(each.image_inputs(picture(80, 80))["pixel_values"]) for each in (own, one, many)] == [5, 2, 10]
    assert len({each.fingerprint for each in (own, one, many)}) == 3
    encoder = Encoder.from_pretrained("builtin/tiny-phi3_v", num_crops=1)
    encoder.save_pretrained(tmp_path)
    again = Encoder.from_pretrained(tmp_path)
    assert again.options.num_crops == 1 and again.fingerprint() == encoder.fingerprint()


@pytest.mark.parametrize("model_type", ["qwen2_vl", "idefics3", "vlm2vec_vista", "llava"])
def test_num_crops_is_refused_by_families_that_do_not_cut(tiny: Tiny, model_type: str) -> None:
    with pytest.raises(RecipeError, match="model.num_crops: this model does not cut pictures"):
        tiny(model_type, num_crops=4)


@pytest.mark.parametrize("key", ["min_pixels", "max_pixels"])
def test_an_area_is_refused(tiny: Tiny, key: str) -> None:
    with pytest.raises(RecipeError, match=f"model.{key}: this model has one fixed picture size"):
        tiny("phi3_v", **{key: 10_000})


# -- folders


def copied(tmp_path: Path, tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict, **changes: Any) -> Path:
    """The checkpoint with other tensors or keys of config.json."""
    for file in (DATA / "checkpoint").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    save_file(tensors(load_file(DATA / "checkpoint" / "model.safetensors")), tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def embedding(folder: Path, **options: Any) -> Tensor:
    backbone = load_backbone(ModelConfig(path=str(folder), **options))
    return embed(backbone, [backbone.processor.features("<|image_1|> a cat", [picture(50, 60)])])


def test_the_published_configuration_is_read_and_its_runtime_keys_are_dropped(tmp_path: Path) -> None:
    stated = json.loads((DATA / "checkpoint" / "config.json").read_text("utf-8"))
    assert stated["_attn_implementation"] == "flash_attention_2" and stated["auto_map"] and stated["rope_scaling"]["type"] == "su"
    backbone = published()
    assert backbone.model.config._attn_implementation == "sdpa"
    backbone.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert not {"auto_map", "_attn_implementation"} & saved.keys()
    assert saved["architectures"] == stated["architectures"]
    names = load_file(DATA / "checkpoint" / "model.safetensors").keys()
    assert load_file(tmp_path / "model.safetensors").keys() == names
    assert torch.equal(embedding(tmp_path), embedding(DATA / "checkpoint"))


def test_the_real_sizes_are_the_defaults() -> None:
    rope = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    with torch.device("meta"):
        model = Phi3VForCausalLM(Phi3VConfig(rope_scaling=rope, max_position_embeddings=131072, eos_token_id=2))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    picture_sizes = {name: size for name, size in sizes.items() if ".vision_embed_tokens." in name}
    assert (len(sizes), sum(sizes.values())) == (592, 4_146_621_440)
    assert (len(picture_sizes), sum(picture_sizes.values())) == (397, 303_507_456 + 22_026_240 + 8_192)


def with_alias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"model.vision_embed_tokens.wte.weight": tensors["model.embed_tokens.weight"].clone()}


def only_alias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in with_alias(tensors).items() if name != "model.embed_tokens.weight"}


@pytest.mark.parametrize("tensors", [with_alias, only_alias])
def test_word_embeddings_are_found_under_their_other_name(tmp_path: Path, tensors: Callable[..., dict[str, Tensor]]) -> None:
    folder = copied(tmp_path, tensors)
    expected = embedding(DATA / "checkpoint")
    assert torch.equal(embedding(folder), expected)
    again = tmp_path / "again"
    load_backbone(ModelConfig(path=str(folder))).save_pretrained(again)
    assert torch.equal(embedding(again), expected)


def test_word_embeddings_under_no_name_are_missed(tmp_path: Path) -> None:
    folder = copied(tmp_path, lambda tensors: {name: tensors[name] for name in tensors if name != "model.embed_tokens.weight"})
    with pytest.raises(ModelError, match=r"1 missing tensor, first model\.embed_tokens\.weight"):
        load_backbone(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("trusted", [{}, {"trust_remote_code": True, "revision": "0" * 40}])
def test_shipped_code_is_never_run(tmp_path: Path, trusted: dict[str, Any]) -> None:
    folder = copied(tmp_path)
    shipped = {
        "AutoImageProcessor": "shipped.Processor",
        "AutoProcessor": "shipped.Processor",
        "AutoTokenizer": [None, "shipped.Tokenizer"],
    }
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text("utf-8"))
        (folder / name).write_text(json.dumps({**settings, "auto_map": shipped}), encoding="utf-8")
    for name in ("shipped", "modeling_phi3_v", "configuration_phi3_v"):
        (folder / f"{name}.py").write_text("raise SystemExit('this must not run')\n", encoding="utf-8")
    assert torch.equal(embedding(folder, **trusted), embedding(DATA / "checkpoint"))


def test_another_way_to_read_pictures_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path, embd_layer={"hd_transform_order": "glb_sub"})
    with pytest.raises(ModelError, match="hd_transform_order is 'glb_sub'; only 'sub_glb' is known"):
        load_backbone(ModelConfig(path=str(folder)))


def test_an_image_processor_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    Phi3VImageProcessor(num_img_tokens=4).save_pretrained(folder)
    with pytest.raises(ModelError, match="crops of 56 pixels, the model reads 336; num_img_tokens in preprocessor_config.json"):
        load_backbone(ModelConfig(path=str(folder)))
