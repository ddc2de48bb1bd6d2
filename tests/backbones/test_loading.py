"""What a folder must be to be loaded, and the words for each way in which it is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.backbones.common import embed, mixed_items
from vlm2vec.backbones import load_backbone, loading, resolve
from vlm2vec.config import ModelConfig
from vlm2vec.errors import InputError, ModelError

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the miniature SmolVLM, to be damaged."""
    return Path(shutil.copytree(tiny_folder("smolvlm"), tmp_path / "model"))


def _edit(file: Path, **changes: object) -> None:
    settings = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def _refused(folder: Path, match: str, **options: object) -> None:
    with pytest.raises(ModelError, match=match):
        load_backbone(ModelConfig(path=str(folder), **options))


def _shard(folder: Path) -> None:
    """Split model.safetensors into two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    places = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    for shard in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == shard}, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


# -- what the model is


def test_an_unknown_type_lists_the_known_ones(folder: Path) -> None:
    _edit(folder / "config.json", model_type="smolvln")
    _refused(folder, r"unknown model_type 'smolvln'; did you mean smolvlm\? Supported: .*idefics3, .*llava, .*vlm2vec_vista")


def test_the_type_comes_from_the_folder_or_from_the_recipe(folder: Path) -> None:
    _refused(folder, "model_type is 'smolvlm' but model.family says 'qwen2_vl'", family="qwen2_vl")
    _edit(folder / "config.json", model_type=None)
    _refused(folder, "no model_type; name it in model.family")


def test_code_in_a_repository_is_refused_and_never_run(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    (folder / "modeling_x.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Model: ...\nclass Processor: ...\n")
    _edit(folder / "config.json", auto_map={"AutoModel": "modeling_x.Model", "AutoConfig": "modeling_x.Model"})
    _refused(folder, r"config.json: repo ships code \(modeling_x.py\); refused")
    _edit(folder / "config.json", auto_map=None)
    _edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "owner/repo--modeling_x.Processor"]})
    _refused(folder, r"tokenizer_config.json: repo ships code \(modeling_x.py\)")
    _edit(folder / "tokenizer_config.json", auto_map=None)
    nested = {"image_processor": {"auto_map": {"AutoImageProcessor": "modeling_x.Processor"}}}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    _refused(folder, r"processor_config.json: repo ships code \(modeling_x.py\)")
    assert not canary.exists()


def test_code_that_is_trusted_is_not_refused(folder: Path) -> None:
    _edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.Model"})
    options = ModelConfig(path=str(folder), trust_remote_code=True, revision=COMMIT)
    assert load_backbone(options).model.config.model_type == "smolvlm"


# -- where the model is


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    _refused(tmp_path / "nothing", "nothing: no such folder; model.path is a folder, a Hub id")
    with pytest.raises(ModelError, match="runs/x/step-5: no such folder"):
        resolve(ModelConfig(path="runs/x/step-5"))


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    _refused(tmp_path, "no config.json; it is no model folder")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    _refused(tmp_path, f"no config.json; the model is in {tmp_path}/model")
    (tmp_path / "adapter_config.json").write_text("{}")
    _refused(tmp_path, "it is a LoRA adapter, give its base model as path")


def test_a_model_that_is_not_in_the_cache_while_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=f"model owner/name@{COMMIT} not in cache and offline"):
        resolve(ModelConfig(path="owner/name", revision=COMMIT))
    with pytest.raises(ModelError, match="model owner/name@main not in cache and offline"):
        resolve(ModelConfig(path="owner/name"))
    with pytest.raises(ModelError, match="model owner/na me@main cannot be had; check its name"):
        resolve(ModelConfig(path="owner/na me"))


def test_of_pickles_only_adapters_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(loading, "snapshot_download", lambda name, allow_patterns, **_: asked.extend(allow_patterns) or str(tmp_path))
    assert resolve(ModelConfig(path="owner/name")) == tmp_path
    files = ["adapter_model.bin", "adapter_model.safetensors", "adapter_config.json", "pytorch_model.bin", "training_args.bin", "model.pth"]
    assert [file for file in files if any(fnmatch(file, pattern) for pattern in asked)] == files[:3]


def test_a_model_that_the_network_does_not_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ModelError, match="model owner/name@main not in cache and offline"):
        resolve(ModelConfig(path="owner/name"))


# -- whether its files are whole


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_git_lfs_pointer(folder: Path, name: str) -> None:
    (folder / name).write_text(LFS_POINTER)
    _refused(folder, rf"{name}: file is a Git-LFS pointer \({len(LFS_POINTER)} bytes\); run `git lfs pull`")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_an_html_page(folder: Path, name: str) -> None:
    (folder / name).write_text("<!DOCTYPE html><html><body>404</body></html>")
    _refused(folder, rf"{name}: file is an HTML page \(44 bytes\)")


def test_a_file_that_is_not_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"a": 1,\n "b": ')
    with pytest.raises(InputError, match="tokenizer.json"):
        load_backbone(ModelConfig(path=str(folder)))
    (folder / "tokenizer.json").write_text("[]")
    _refused(folder, "tokenizer.json: expected a JSON object, got list")


def test_truncated_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    _refused(folder, rf"model.safetensors: truncated: {len(whole) - 100} bytes, its header says {len(whole)}")
    file.write_bytes(whole + b"x")
    _refused(folder, rf"model.safetensors: too long: {len(whole) + 1} bytes, its header says {len(whole)}")
    file.write_bytes(whole[:500])
    _refused(folder, r"model.safetensors: the safetensors header is damaged or cut off \(500 bytes\)")
    for start in (b"", b"abc", b"\xff" * 100):
        file.write_bytes(start)
        _refused(folder, rf"model.safetensors: not a safetensors file \({len(start)} bytes\)")


def test_shards(folder: Path) -> None:
    whole = load_backbone(ModelConfig(path=str(folder)))
    expected = embed(whole, mixed_items(whole))
    _shard(folder)
    again = load_backbone(ModelConfig(path=str(folder)))
    assert torch.equal(embed(again, mixed_items(again)), expected)
    second = folder / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-8])
    _refused(folder, "model-00002-of-00002.safetensors: truncated")
    second.unlink()
    _refused(folder, r"index.json: lists model-00002-of-00002.safetensors, which is missing \(of 2 shards\)")


def test_no_weights_or_only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    _refused(folder, "no model.safetensors; the folder holds no weights")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02N.")
    _refused(folder, "no model.safetensors, only pytorch_model.bin: pickle weights are refused")


# -- whether its tensors are the model's


def _change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_tensor(folder: Path) -> None:
    _change_tensors(folder, lambda tensors: tensors.pop("model.connector.modality_projection.proj.weight"))
    _refused(folder, "1 missing tensor, first model.connector.modality_projection.proj.weight")


def test_a_head_that_is_not_there_is_zero(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder("qwen2_vl"), tmp_path / "model"))
    _change_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    head = load_backbone(ModelConfig(path=str(folder))).model.get_output_embeddings()
    assert head.weight.shape[0] > 0 and not head.weight.any()
    _edit(folder / "config.json", tie_word_embeddings=True)
    _change_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "embed_tokens" in name])
    _refused(folder, "2 missing tensors, first lm_head.weight")  # a table is no head, even where the head is the table


def test_an_unexpected_tensor(folder: Path) -> None:
    _change_tensors(folder, lambda tensors: tensors.update(extra=torch.zeros(1), other=torch.zeros(1)))
    _refused(folder, "2 unexpected tensors, first extra")


def test_a_tensor_of_another_shape(folder: Path) -> None:
    _change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(3, 32)}))
    _refused(folder, r"1 mismatched tensor, first lm_head.weight with shape \(3, 32\), the model needs \(299, 32\)")


def test_a_tied_head_need_not_be_there(folder: Path) -> None:
    _edit(folder / "config.json", tie_word_embeddings=True)
    _change_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    model = load_backbone(ModelConfig(path=str(folder))).model
    assert model.lm_head.weight is model.get_input_embeddings().weight


# -- what is kept


def test_files_of_other_libraries_are_saved_with_the_settings_in_use(folder: Path, tmp_path: Path) -> None:
    image_processor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": image_processor, "video_processor": {"fps": 1}}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    backbone = load_backbone(ModelConfig(path=str(folder), max_pixels=32 * 32))
    backbone.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "processor_config.json").read_text())
    assert saved["video_processor"] == {"fps": 1} and saved["image_processor"]["size"] == {"longest_edge": 32}
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == "{{ messages }}"
    again = load_backbone(ModelConfig(path=str(tmp_path / "saved")))
    assert again.processor.image_tokens_estimate(64, 64) == backbone.processor.image_tokens_estimate(64, 64)


def test_a_kernel_that_is_not_installed(folder: Path) -> None:
    _refused(folder, r"pip install .vlm2vec\[flash\].", attention="flash_attention_2")
