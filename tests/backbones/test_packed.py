"""Items that share a row stay apart: every family that packs, against the item alone and the padded chunk, values and gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from tests.backbones.common import embed, mixed_items
from tests.backbones.test_sweep_training import CHUNKS, backward, contrast, gradients, six_items, unit, worst
from vlm2vec.backbones import load_backbone, packed, registry
from vlm2vec.backbones.base import Backbone
from vlm2vec.backbones.packed import CAUSAL, PACKED, boundaries, packed_attention
from vlm2vec.collate import Features, join_tokens
from vlm2vec.config import LoraConfig, ModelConfig
from vlm2vec.errors import ModelError, RecipeError
from vlm2vec.lora import add_lora
from vlm2vec.pooling import pool
from vlm2vec.replay import Replay

Tiny = Callable[..., Backbone]
PACKING = sorted(name for name, family in registry().items() if family.processor_class.packs)
each_family = pytest.mark.parametrize("model_type", PACKING)


def items(backbone: Backbone) -> list[Features]:
    """Text, pictures, both, several pictures, two of one length side by side, and as little as the tokenizer makes of a letter."""
    prepare = backbone.processor.features
    return [*mixed_items(backbone), prepare("one length", []), prepare("two length", []), prepare("a", [])]


# -- whole models


def test_the_families_that_pack() -> None:
    others = sorted(registry().keys() - set(PACKING))
    assert others == ["gemma3", "mllama", "paligemma"]  # masks of pictures, attention across, a prefix that sees both sides


@pytest.mark.parametrize("model_type", sorted(registry().keys() - set(PACKING)))
def test_other_families_refuse(tiny: Tiny, model_type: str) -> None:
    with pytest.raises(RecipeError, match=f"model.attention: packed is not for a {model_type} model .* use sdpa"):
        tiny(model_type, attention="packed")


@each_family
@pytest.mark.parametrize("how", ["last", "mean"])
def test_an_item_in_a_packed_chunk_is_the_item_alone(tiny: Tiny, model_type: str, how: str) -> None:
    backbone, padded = tiny(model_type, attention="packed"), tiny(model_type)
    rows = items(backbone)
    assert min(map(len, rows)) <= 3
    found = embed(backbone, rows, how)
    assert (found - torch.cat([embed(padded, [row], how) for row in rows])).abs().max() <= 1e-6
    assert (found - embed(padded, rows, how)).abs().max() <= 1e-6


@each_family
def test_a_packed_chunk_is_one_row_without_padding(tiny: Tiny, model_type: str) -> None:
    backbone = tiny(model_type, attention="packed")
    rows = items(backbone)
    batch = backbone.processor.collate(rows)
    assert torch.equal(batch["input_ids"], torch.cat([row.input_ids for row in rows])[None])
    assert batch["attention_mask"].sum(1).tolist() == [len(row) for row in rows]
    alone = [backbone.processor.collate([row])["position_ids"] for row in rows]
    assert torch.equal(batch["position_ids"], torch.cat(alone, dim=-1))


@each_family
def test_no_item_sees_another_in_any_bit(tiny: Tiny, model_type: str) -> None:
    backbone = tiny(model_type, attention="packed")
    rows = items(backbone)
    plain = embed(backbone, rows)
    for changed in (2, 3, 6):
        row = rows[changed]
        ids = row.input_ids.clone()
        words = ids != backbone.processor.image_token_id
        ids[words] = ids[words].flip(0)
        images = [{**one, "pixel_values": one["pixel_values"].flip(-1)} for one in row.images]
        found = embed(backbone, [*rows[:changed], Features(ids, images), *rows[changed + 1 :]])
        assert not torch.equal(found[changed], plain[changed])
        assert torch.equal(found[torch.arange(len(rows)) != changed], plain[torch.arange(len(rows)) != changed])


@each_family
def test_gradients_are_those_of_the_padded_chunk(tiny: Tiny, model_type: str) -> None:
    """To the last bits of float64, and in float32 as near to them as the padded chunk is."""
    found = {}
    for attention in ("packed", "sdpa"):
        backbone = tiny(model_type, attention=attention)
        torch.manual_seed(0)
        add_lora(backbone, LoraConfig(rank=2, parts=("language",)))
        for parameter in (parameter for parameter in backbone.model.parameters() if parameter.requires_grad):
            parameter.data.add_(0.05 * torch.randn(parameter.shape))
        backbone.model.eval()
        rows = six_items(backbone)
        for dtype in (torch.float32, torch.float64):
            backbone.model.to(dtype)
            contrast(unit(backbone, [rows[item] for chunk in CHUNKS for item in chunk]))[0].backward()
            found[attention, dtype] = gradients(backbone)
    exact = found["sdpa", torch.float64]
    assert len(exact) >= 8
    assert worst(found["packed", torch.float64], exact) <= 1e-13
    assert worst(found["packed", torch.float32], exact) <= 1.5 * worst(found["sdpa", torch.float32], exact) <= 2e-5


def test_two_passes_and_replayed_towers_change_no_gradient(tiny: Tiny) -> None:
    backbone = tiny("qwen3_vl", attention="packed")
    backbone.model.double().eval()
    for name, parameter in backbone.model.named_parameters():
        parameter.requires_grad_(backbone.part_of(name) == "language")
    rows = six_items(backbone)
    contrast(unit(backbone, [rows[item] for chunk in CHUNKS for item in chunk]))[0].backward()
    whole = gradients(backbone)
    with Replay(backbone.towers()) as replay:
        assert worst(backward(backbone, rows, replay=replay), whole) <= 1e-12
    assert replay.runs == [3] * len(backbone.towers())


@pytest.mark.parametrize("model_type", ["llava", "qwen3_vl", "vlm2vec_vista"])
def test_recomputed_layers_see_the_boundaries(tiny: Tiny, model_type: str) -> None:
    backbone = tiny(model_type, attention="packed")
    backbone.model.train()
    for name, parameter in backbone.model.named_parameters():
        parameter.requires_grad_(backbone.part_of(name) == "language")
    rows = six_items(backbone)
    plain = backward(backbone, rows, keep=len(CHUNKS))
    backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert worst(backward(backbone, rows, keep=len(CHUNKS)), plain) <= 1e-6


@each_family
def test_nothing_as_large_as_all_pairs_of_tokens_is_made(tiny: Tiny, model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny(model_type, attention="packed")
    rows = [backbone.processor.features("words " * 20, [])] * 8
    largest: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            largest.extend(one.numel() for one in (made if isinstance(made, tuple) else (made,)) if isinstance(one, Tensor))
            return made

    batch = backbone.processor.collate(rows)
    with Sizes():
        backbone.hidden(batch).sum().backward()
    weights = max(parameter.numel() for parameter in backbone.model.parameters())
    assert max(largest) <= max(weights, 5 * 64 * batch["input_ids"].numel()) < batch["input_ids"].numel() ** 2


@pytest.mark.parametrize("model_type", ["phi3_v", "qwen3_vl"])
def test_half_precision_in_weights_or_in_passing(tiny: Tiny, model_type: str) -> None:
    rows = items(tiny(model_type))
    expected = embed(tiny(model_type), rows)
    assert (embed(tiny(model_type, dtype="bfloat16", attention="packed"), rows) - expected).abs().max() < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        assert (embed(tiny(model_type, attention="packed"), rows) - expected).abs().max() < 0.1


@pytest.mark.parametrize("window", [3, 40])
def test_a_sliding_window_slides_within_each_item(tiny: Tiny, window: int) -> None:
    backbone, padded = tiny("llava_next", attention="packed"), tiny("llava_next")
    rows = items(backbone)
    without = embed(backbone, rows)
    for one in (backbone, padded):
        one.model.config.text_config.sliding_window = window
    found = embed(backbone, rows)
    assert (found - torch.cat([embed(padded, [row]) for row in rows])).abs().max() <= 1e-6
    assert (found - without).abs().max() > 1e-3


def test_long_and_short_items_choose_their_rotations_apart(tiny: Tiny) -> None:
    backbone, padded = (tiny("phi3_v", attention=attention, max_tokens=1000) for attention in ("packed", "sdpa"))
    rows = [backbone.processor.features(text, []) for text in ("few words\n", "x" * 126, "x" * 127, "x" * 128, "many words " * 40)]
    assert (embed(backbone, rows) - torch.cat([embed(padded, [row]) for row in rows])).abs().max() <= 1e-6


def test_a_row_longer_than_the_learned_positions(tiny: Tiny) -> None:
    backbone, padded = tiny("vlm2vec_vista", attention="packed"), tiny("vlm2vec_vista")
    rows = [backbone.processor.features("words " * count, []) for count in range(60, 80)]
    assert sum(map(len, rows)) > backbone.model.config.text_config.max_position_embeddings
    assert (embed(backbone, rows) - embed(padded, rows)).abs().max() <= 1e-6


def test_what_sees_pictures_keeps_its_attention_and_a_saved_model_names_ours_nowhere(tiny: Tiny, tmp_path: Path) -> None:
    backbone = tiny("phi3_v", attention="packed")
    assert backbone.model.config._attn_implementation == PACKED
    assert backbone.model.config.vision_config._attn_implementation == "sdpa"
    backbone.save_pretrained(tmp_path)
    assert PACKED not in (tmp_path / "config.json").read_text()


def test_a_chunk_from_elsewhere_is_refused(tiny: Tiny) -> None:
    backbone, padded = tiny("qwen2_vl", attention="packed"), tiny("qwen2_vl")
    batch = padded.processor.collate(items(padded))
    with pytest.raises(ModelError, match="packed reads chunks as the model's own processor collates them"):
        backbone.model.model(**batch)


def test_an_inferred_model_is_refused(tmp_path: Path, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm2vec.backbones.auto.AutoBackbone.model_types", ())
    with pytest.raises(ModelError, match="cannot infer whether items that share a row stay apart"):
        load_backbone(ModelConfig(path=str(tiny_folder("llava")), attention="packed"))


@pytest.mark.parametrize("text_type", CAUSAL)
def test_language_models_of_families_that_take_any(text_type: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(text_type, vocab_size=50, head_dim=8, initializer_range=0.3, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    rows = [torch.randint(50, (length,)) for length in (5, 9, 1, 9)]
    alone = [model(input_ids=row[None]).last_hidden_state for row in rows]
    model.set_attn_implementation(PACKED)
    ids, mask = join_tokens(rows)
    places = torch.cat([torch.arange(len(row)) for row in rows])[None]
    together = model(input_ids=ids, position_ids=places, **boundaries(mask)).last_hidden_state
    assert (together - torch.cat(alone, dim=1)).abs().max() <= 1e-5


# -- the attention itself


def blocks(lengths: list[int], causal: bool, window: int | None) -> Tensor:
    """Who sees whom in a row (T, T)."""
    item = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    back = torch.arange(len(item))[:, None] - torch.arange(len(item))
    seen = item[:, None] == item
    return seen & (back >= 0 if causal else True) & (back < window if window else True)


def reference(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scaling: float) -> Tensor:
    """(1, T, H, d) with all scores and a mask over them."""
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    scores = (query @ key.mT * scaling).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


LENGTHS = [7, 7, 7, 1, 12, 3, 3, 1]
MASK = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
RULES = [(True, None), (False, None), (True, 4), (True, 7), (True, 100)]


@pytest.fixture
def states() -> Iterator[list[Tensor]]:
    stream = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    yield [torch.randn(1, total, heads, 8, generator=stream).double().transpose(1, 2).requires_grad_() for heads in (6, 2, 2)]


def attend(states: list[Tensor], causal: bool, window: int | None) -> Tensor:
    module = SimpleNamespace(is_causal=causal)
    return packed_attention(module, *states, None, scaling=0.3, sliding_window=window, **boundaries(MASK))[0]


@pytest.mark.parametrize("short", [0, 7, 100])  # items up to it go by products
@pytest.mark.parametrize(("causal", "window"), RULES)
def test_attention_is_that_of_a_block_for_each_item(
    states: list[Tensor], causal: bool, window: int | None, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "HALF", (torch.float64,))
    monkeypatch.setattr(packed, "SHORT", short)
    weights = torch.randn(1, sum(LENGTHS), 6, 8, dtype=torch.float64)
    found, expected = attend(states, causal, window), reference(*states, blocks(LENGTHS, causal, window), 0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    ours, theirs = (torch.autograd.grad((made * weights).sum(), states) for made in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("causal", "window"), RULES)
def test_the_kernel_is_told_the_same(states: list[Tensor], causal: bool, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the signature and the meaning of torch's kernel, which no CPU has."""

    def kernel(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, also: Tensor, longest: int, same: int, **told: Any) -> Tensor:
        assert starts.dtype == torch.int32 and starts is also and longest == same == max(LENGTHS) and told["enable_gqa"]
        before, behind = told["window_size"]
        total = len(query)
        item = torch.bucketize(torch.arange(total), starts[1:], right=True)
        back = torch.arange(total)[:, None] - torch.arange(total)
        seen = (item[:, None] == item) & ((back <= before) | (before < 0)) & ((-back <= behind) | (behind < 0))
        return reference(*(tensor.transpose(0, 1)[None] for tensor in (query, key, value)), seen, told["scale"])[0]

    expected = attend(states, causal, window)
    monkeypatch.setattr(packed, "KERNEL", kernel)
    monkeypatch.setattr(packed, "_kernel_takes", lambda *_: True)
    torch.testing.assert_close(attend(states, causal, window), expected, rtol=0, atol=1e-14)


def test_torch_has_the_kernel_with_the_arguments_that_we_give() -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    assert packed.KERNEL is varlen.varlen_attn
    inspect.signature(varlen.varlen_attn).bind(*range(7), scale=1.0, window_size=(-1, 0), enable_gqa=True)


@pytest.mark.parametrize("half", [(), (torch.float64,)])
def test_dropout_reaches_the_scores(states: list[Tensor], half: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "HALF", half)
    torch.manual_seed(0)
    found, _ = packed_attention(SimpleNamespace(is_causal=True), *states, None, dropout=0.5, scaling=0.3, **boundaries(MASK))
    assert not torch.allclose(found, attend(states, True, None))


def test_boundaries() -> None:
    made = boundaries(torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]))
    assert made["cu_seq_lens_q"].tolist() == [0, 3, 4, 6] and made["cu_seq_lens_q"].dtype == torch.int32
    assert made["cu_seq_lens_k"] is made["cu_seq_lens_q"]
    assert made["max_length_q"] == made["max_length_k"] == 3


def test_no_device_is_waited_for() -> None:
    """On "meta" tensors have no values, so that whatever needs one, as the host does that waits for a GPU, fails."""
    mask = torch.ones(3, 5, device="meta")
    assert boundaries(mask)["cu_seq_lens_q"].shape == (4,)
    assert pool(torch.ones(1, 9, 2, device="meta"), mask, "last").shape == (3, 2)
