"""Adapters touch the parts they name and nothing else, and load strictly or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from vlm2vec.backbones import load_backbone, registry
from vlm2vec.backbones.base import Backbone
from vlm2vec.config import LoraConfig, ModelConfig
from vlm2vec.errors import AdapterError, ModelError, RecipeError
from vlm2vec.lora import ADAPTER_WEIGHTS, add_lora, load_adapter, save_adapter

FAMILY = "qwen2_vl"


def backbone(family: str = FAMILY) -> Backbone:
    return load_backbone(ModelConfig(path=f"builtin/tiny-{family}"))


def adapter_names(model: torch.nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if "lora_" in name]


@pytest.mark.parametrize("family", sorted(registry()))
@pytest.mark.parametrize("part", ["language", "projector", "vision"])
def test_adapters_sit_in_the_named_part_only(family: str, part: str) -> None:
    base = backbone(family)
    linear = [n for n, m in base.model.named_modules() if isinstance(m, torch.nn.Linear) and base.part_of(n) == part]
    if not linear:
        pytest.skip(f"{family} has no linear layer in its {part}")
    add_lora(base, LoraConfig(rank=2, parts=(part,)))
    names = adapter_names(base.model)
    assert {base.part_of(name) for name in names} == {part}
    assert len([name for name in names if "lora_A" in name]) == len(linear)
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in base.model.named_parameters())


def test_targets_choose_layers_by_their_last_name() -> None:
    base = backbone()
    add_lora(base, LoraConfig(rank=2, targets=("q_proj",)))
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in adapter_names(base.model)} == {"q_proj"}


def test_targets_that_match_nothing_list_what_there_is() -> None:
    with pytest.raises(RecipeError, match=r"no module matches \['qkv'\].*this backbone has: .*q_proj"):
        add_lora(backbone(), LoraConfig(targets=("qkv",)))


@pytest.mark.parametrize("options", [LoraConfig(rank=2), LoraConfig(rank=2, dora=True), LoraConfig(rank=2, rslora=True, init="gaussian")])
def test_a_fresh_adapter_changes_nothing_and_a_saved_one_comes_back(options: LoraConfig, tmp_path: Path) -> None:
    base = backbone()
    batch = base.processor.collate([base.processor.features("some text\n", [])])
    base.model.eval()
    with torch.no_grad():
        plain = base.hidden(batch)
        adapter = add_lora(base, options)
        base.model.eval()
        torch.testing.assert_close(base.hidden(batch), plain, atol=1e-6, rtol=0)
        for name, parameter in base.model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        trained = base.hidden(batch)
    assert adapter.peft_config["default"].base_model_name_or_path == "builtin/tiny-qwen2_vl"
    assert (trained - plain).abs().max() > 1e-4
    save_adapter(adapter, tmp_path)
    again = backbone()
    load_adapter(again, tmp_path)
    again.model.eval()
    with torch.no_grad():
        assert torch.equal(again.hidden(batch), trained)


def test_peft_itself_reads_what_we_save(tmp_path: Path) -> None:
    base = backbone()
    adapter = add_lora(base, LoraConfig(rank=2))
    for parameter in (parameter for parameter in base.model.parameters() if parameter.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
    save_adapter(adapter, tmp_path / "adapter")
    backbone().save_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    batch = base.processor.collate([base.processor.features("some text\n", [])])
    base.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model.get_base_model().model(**batch).last_hidden_state, base.hidden(batch), atol=1e-6, rtol=0)


def rename(tensors: dict[str, Tensor]) -> None:
    first = sorted(tensors)[0]
    tensors[first.replace("language_model", "text_model")] = tensors.pop(first)


def repeat(tensors: dict[str, Tensor]) -> None:
    first = sorted(tensors)[0]
    tensors[first.replace("language_model.", "")] = tensors[first].clone()


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors[sorted(tensors)[0]]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.extra.lora_A.weight"] = torch.zeros(2, 2)


def reshape(tensors: dict[str, Tensor]) -> None:
    first = sorted(tensors)[0]
    tensors[first] = torch.zeros(3, 3)


def poison(tensors: dict[str, Tensor]) -> None:
    tensors[sorted(tensors)[0]].view(-1)[0] = float("nan")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (rename, "is missing"),
        (drop, "is missing"),
        (add, "extra.lora_A.weight is unexpected"),
        (repeat, "is there 2 times, under an old name and a new one"),
        (reshape, r"down_proj.lora_A.weight has shape \(3, 3\), the model needs \(2, 64\)"),
        (poison, "1 non-finite"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_the_name_of_its_tensor(harm: Callable, words: str, tmp_path: Path) -> None:
    save_adapter(add_lora(backbone(), LoraConfig(rank=2)), tmp_path)
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    harm(tensors)
    save_file(tensors, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(AdapterError, match=words):
        load_adapter(backbone(), tmp_path)


def test_an_adapter_of_another_family_is_refused(tmp_path: Path) -> None:
    save_adapter(add_lora(backbone(), LoraConfig(rank=2)), tmp_path)
    with pytest.raises(
        AdapterError, match=r"tensor base_model.model.model.language_model.layers.0.mlp.down_proj.lora_A.weight has no place"
    ):
        load_adapter(backbone("smolvlm"), tmp_path)


def test_a_truncated_adapter_file_is_named(tmp_path: Path) -> None:
    save_adapter(add_lora(backbone(), LoraConfig(rank=2)), tmp_path)
    file = tmp_path / ADAPTER_WEIGHTS
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match=f"{ADAPTER_WEIGHTS}: the safetensors header is damaged or cut off"):
        load_adapter(backbone(), tmp_path)


def test_an_adapter_that_is_no_lora_is_refused(tmp_path: Path) -> None:
    save_adapter(add_lora(backbone(), LoraConfig(rank=2)), tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "peft_type": "IA3"}))
    with pytest.raises(AdapterError, match="peft_type is 'IA3'; only LORA"):
        load_adapter(backbone(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": True, "r": "four"}))
    with pytest.raises(AdapterError, match="adapter_config.json"):
        load_adapter(backbone(), tmp_path)
