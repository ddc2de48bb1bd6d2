"""The table of known checkpoints: every entry is complete and valid, and the page in docs/ says what the table says."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm2vec.backbones import registry
from vlm2vec.backbones.published import checkpoints, find, page, settings
from vlm2vec.config import ModelConfig
from vlm2vec.schema import violations
from vlm2vec.strict_yaml import build, dump_plain, parse

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "checkpoints.md"
each_checkpoint = pytest.mark.parametrize("name", checkpoints())
WANTED = {
    "TIGER-Lab/VLM2Vec-LoRA",
    "TIGER-Lab/VLM2Vec-Full",
    "TIGER-Lab/VLM2Vec-LLaVa-Next",
    "TIGER-Lab/VLM2Vec-Qwen2VL-2B",
    "TIGER-Lab/VLM2Vec-Qwen2VL-7B",
    "VLM2Vec/VLM2Vec-V2.0",
    "Qwen/Qwen3-VL-Embedding-2B",
    "Qwen/Qwen3-VL-Embedding-8B",
    "Alibaba-NLP/gme-Qwen2-VL-2B-Instruct",
    "Alibaba-NLP/gme-Qwen2-VL-7B-Instruct",
    "intfloat/mmE5-mllama-11b-instruct",
}


def test_the_table_holds_the_models_we_promise() -> None:
    assert set(checkpoints()) >= WANTED


@each_checkpoint
def test_the_settings_make_a_valid_section(name: str) -> None:
    entry = checkpoints()[name]
    text = dump_plain({"path": name, **entry.model})
    assert not list(violations(build(ModelConfig, parse(text.encode(), name))))
    assert {"pooling", "padding_side"} <= entry.model.keys()


@each_checkpoint
def test_an_entry_is_complete_and_its_oracle_is_there(name: str) -> None:
    entry = checkpoints()[name]
    assert entry.layout in ("adapter", "merged") and entry.base.count("/") == 1 and entry.width > 0 and entry.note
    assert entry.family in registry()
    assert entry.oracle is None or (ROOT / entry.oracle / "expected.safetensors").is_file()


@pytest.mark.parametrize(
    "called",
    [
        "TIGER-Lab/VLM2Vec-LoRA",
        "/models/TIGER-Lab/VLM2Vec-LoRA",
        "models/TIGER-Lab/VLM2Vec-LoRA/",
        "/cache/hub/models--TIGER-Lab--VLM2Vec-LoRA/snapshots/0123",
    ],
)
def test_a_checkpoint_is_found_by_its_id_and_by_a_copy_of_its_name(called: str) -> None:
    assert find(called) == "TIGER-Lab/VLM2Vec-LoRA"


@pytest.mark.parametrize(
    "called", ["VLM2Vec-LoRA", "someone/VLM2Vec-LoRA", "TIGER-Lab/VLM2Vec-LoRA/step-000005", "builtin/tiny-llava", "."]
)
def test_another_name_is_not_taken_for_a_known_one(called: str) -> None:
    assert find(called) is None and settings(called) == {}


def test_settings_are_those_of_an_encoder_of_ours() -> None:
    found = settings("VLM2Vec/VLM2Vec-V2.0")
    assert found["base"] == {"path": "Qwen/Qwen2-VL-2B-Instruct", "revision": None}
    assert (found["model"]["positions"], found["model"]["padding_side"]) == ("flat", "left")
    assert settings("Alibaba-NLP/gme-Qwen2-VL-2B-Instruct")["base"] is None


def test_the_page_says_what_the_table_says() -> None:
    assert PAGE.read_text("utf-8").endswith(page()), "put vlm2vec.backbones.published.page() after the introduction"
