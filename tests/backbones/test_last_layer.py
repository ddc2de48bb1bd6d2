"""The last layer at the tokens that are read: every family that does so against itself at every token, values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

from tests.backbones.common import mixed_items
from tests.backbones.test_sweep_training import gradients, worst
from vlm2vec.backbones import load_backbone, registry
from vlm2vec.backbones.base import Backbone
from vlm2vec.backbones.last_layer import READ, narrow_last
from vlm2vec.backbones.packed import CAUSAL
from vlm2vec.collate import Features
from vlm2vec.config import LoraConfig, ModelConfig
from vlm2vec.encoder import Encoder
from vlm2vec.lora import add_lora

Tiny = Callable[..., Backbone]
OTHERS = ["gemma3", "mllama", "paligemma", "vlm2vec_vista"]  # other layers, or nothing is known of what reaches them
FAMILIES = sorted(registry().keys() - set(OTHERS))
LAYOUTS: dict[str, dict[str, Any]] = {
    "right": {"padding_side": "right"},
    "left": {"padding_side": "left"},
    "packed": {"attention": "packed"},
}


def everywhere(backbone: Backbone) -> AbstractContextManager[Any]:
    """Inside, the last layer computes every token."""
    return mock.patch.object(backbone, "narrows", False)


def embed(backbone: Backbone, rows: Sequence[Features]) -> Tensor:
    """Embeddings (C, D) of one chunk with a graph; pixels follow the precision of the weights."""
    batch, dtype = backbone.processor.collate(rows), next(backbone.model.parameters()).dtype
    return Encoder(backbone).embed({name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in batch.items()})


def last_mlp(backbone: Backbone) -> Any:
    return backbone.model.get_decoder().layers[-1].mlp


def tokens_of_mlp(backbone: Backbone, rows: Sequence[Features]) -> int:
    """How many tokens the last MLP is given for one chunk."""
    seen: list[int] = []
    with last_mlp(backbone).register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[:-1].numel())):
        embed(backbone, rows)
    (found,) = seen
    return found


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_families_read_all(tiny: Tiny, model_type: str) -> None:
    assert not tiny(model_type).narrows


@pytest.mark.parametrize(("model_type", "layout"), [*product(FAMILIES, ["packed"]), ("qwen2_vl", "right"), ("qwen2_vl", "left")])
@torch.no_grad()
def test_embeddings_are_those_of_the_whole_layer(tiny: Tiny, model_type: str, layout: str) -> None:
    backbone = tiny(model_type, **LAYOUTS[layout])
    backbone.model.eval()
    rows = mixed_items(backbone)
    for dtype, chunk, bar in ((torch.float32, rows, 1e-6), (torch.float64, rows[1:2], 1e-12)):
        backbone.model.to(dtype)
        found = embed(backbone, chunk)
        with everywhere(backbone):
            assert (found - embed(backbone, chunk)).abs().max() <= bar


@pytest.mark.parametrize(("model_type", "layout"), [*product(FAMILIES, ["right"]), ("qwen2_vl", "packed"), ("qwen2_vl", "left")])
def test_gradients_are_those_of_the_whole_layer(tiny: Tiny, model_type: str, layout: str) -> None:
    """Of adapters on all linear layers in float64, with recomputed layers too."""
    backbone = tiny(model_type, **LAYOUTS[layout])
    torch.manual_seed(0)
    add_lora(backbone, LoraConfig(rank=2, parts=("language",)))
    backbone.model.double().train()
    for parameter in (parameter for parameter in backbone.model.parameters() if parameter.requires_grad):
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    rows = mixed_items(backbone)[:3]
    weight = torch.randn(len(rows), backbone.hidden_size, dtype=torch.float64)

    def found() -> tuple[Tensor, dict[str, Tensor]]:
        embedding = embed(backbone, rows)
        (embedding * weight).sum().backward()
        return embedding, gradients(backbone)

    with everywhere(backbone):
        whole, expected = found()
    assert sum(".layers.1.mlp." in name for name in expected) >= 4
    assert tokens_of_mlp(backbone, rows) == len(rows)
    for recomputed in (False, True):
        if recomputed:
            backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
        embedding, gradient = found()
        assert (embedding - whole).abs().max() <= 1e-12 and worst(gradient, expected) <= 1e-10


def test_the_last_layer_is_recomputed_like_the_others(tiny: Tiny) -> None:
    backbone = tiny("qwen2_vl")
    backbone.model.train()
    backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    runs: list[int] = []
    last_mlp(backbone).register_forward_pre_hook(lambda *_: runs.append(1))  # recomputing stops where all is there again
    embed(backbone, mixed_items(backbone)).sum().backward()
    assert len(runs) == 2


@pytest.mark.parametrize("layout", ["right", "packed"])
def test_as_many_operations_less_as_the_arithmetic_says(tiny: Tiny, layout: str) -> None:
    backbone = tiny("qwen2_vl", **LAYOUTS[layout])
    backbone.model.requires_grad_(False)
    rows = mixed_items(backbone)
    text = backbone.model.config.text_config

    def counted() -> int:
        with FlopCounterMode(display=False) as counter:
            embed(backbone, rows)
        return counter.get_total_flops()

    narrow = counted()
    with everywhere(backbone):
        whole = counted()
    tokens = backbone.processor.collate(rows)["input_ids"].numel()
    assert whole - narrow == (tokens - len(rows)) * 3 * 2 * text.hidden_size * text.intermediate_size


def test_a_mean_reads_every_token(tiny: Tiny) -> None:
    backbone = tiny("qwen2_vl", pooling="mean")
    rows = mixed_items(backbone)
    assert tokens_of_mlp(backbone, rows) == backbone.processor.collate(rows)["input_ids"].numel()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_half_precision_in_weights_or_in_passing(tiny: Tiny, dtype: str, precision: str) -> None:
    backbone = tiny("qwen2_vl", dtype=dtype)
    encoder, batch = Encoder(backbone), backbone.processor.collate(mixed_items(backbone))
    encoder.precision = precision
    found = encoder.embed(batch)
    with everywhere(backbone):
        assert (found - encoder.embed(batch)).abs().max() <= (1e-6 if (dtype, precision) == ("float32", "fp32") else 0.02)


def test_an_item_without_a_token_is_no_embedding_and_harms_no_other(tiny: Tiny) -> None:
    backbone = tiny("qwen2_vl")
    batch = backbone.processor.collate(mixed_items(backbone)[:3])
    expected = Encoder(backbone).embed(batch)
    found = Encoder(backbone).embed({**batch, "attention_mask": batch["attention_mask"] * torch.tensor([1, 0, 1])[:, None]})
    assert found[1].isnan().all() and torch.equal(found[[0, 2]], expected[[0, 2]])


def test_a_copy_is_a_model_of_its_own(tiny: Tiny) -> None:
    backbone = tiny("qwen2_vl")
    rows, copied = mixed_items(backbone), deepcopy(backbone)
    expected = embed(backbone, rows)
    assert torch.equal(embed(copied, rows), expected) and tokens_of_mlp(copied, rows) == len(rows)
    with torch.no_grad():
        last_mlp(copied).down_proj.weight.mul_(2)
    assert torch.equal(embed(backbone, rows), expected) and not torch.equal(embed(copied, rows), expected)


def test_names_are_the_models_own(tiny: Tiny) -> None:
    backbone = tiny("qwen2_vl")
    first, last = backbone.model.get_decoder().layers
    assert type(last) is not type(first) and isinstance(last, type(first)) and type(last).__name__ == type(first).__name__


# -- layers


def language_model(text_type: str, attention: str = "sdpa", **sizes: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, **sizes}
    config = AutoConfig.for_model(text_type, vocab_size=50, head_dim=8, num_hidden_layers=2, initializer_range=0.3, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    return AutoModel.from_config(config, attn_implementation=attention).double().eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("text_type", CAUSAL)
@torch.no_grad()
def test_language_models_of_families_that_take_any(text_type: str, attention: str) -> None:
    model, ids = language_model(text_type, attention), torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(0))
    plain = model(input_ids=ids).last_hidden_state.flatten(0, 1)
    assert narrow_last(model, CAUSAL)
    assert torch.equal(model(input_ids=ids).last_hidden_state.flatten(0, 1), plain)
    read, unread = [6, 9, 20], [0, 5, 7, 19]
    found = model(input_ids=ids, **{READ: torch.tensor(read)}).last_hidden_state.flatten(0, 1)
    assert (found - plain)[read].abs().max() <= 1e-12
    assert (found - plain)[unread].abs().amax(dim=1).min() > 1e-3


def test_what_is_not_known_is_left_alone(tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not narrow_last(language_model("llama"), ())
    assert not narrow_last(language_model("gemma2", "eager"), ("gemma2",))  # norms behind attention and MLP
    monkeypatch.setattr("vlm2vec.backbones.auto.AutoBackbone.model_types", ())
    assert not load_backbone(ModelConfig(path=str(tiny_folder("llava")))).narrows  # inferred


def test_dropout_behind_the_mlp_is_not_left_out(tiny: Tiny) -> None:
    model = tiny("phi3_v").model
    model.config.resid_pdrop = 0.1
    assert not narrow_last(model, ("phi3_v",))
