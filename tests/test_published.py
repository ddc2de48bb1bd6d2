"""Models that others published, through `Encoder.from_pretrained`: exact where the published code's output is at hand, else refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm2vec import Encoder
from vlm2vec.backbones import registry
from vlm2vec.errors import AdapterError, ModelError

DATA = Path(__file__).parent / "data"
BASE = DATA / "qwen2vl"  # one folder is the base model and holds its adapter
ADAPTER = BASE / "adapter_dora"
LLAVA = DATA / "llava_next"
CLOSE = 2e-5  # largest difference of a hidden state from the published code's
FLAT = {"positions": "flat", "padding_side": "left", "device": "cpu"}


@torch.no_grad()
def states(encoder: Encoder) -> Tensor:
    """Last hidden states (3, L, D) of the three items that the published code was run on."""
    first, third = (Image.open(BASE / f"image_row{row}.png").convert("RGB") for row in (0, 2))
    items = [("<|image_1|> Represent the given image\n", [first]), ("What is the question", []), ("<|image_1|> What\n", [third])]
    return encoder.backbone.hidden(encoder.processor.collate([encoder.processor.features(*item) for item in items]))


def farthest(found: Tensor, folder: Path = ADAPTER) -> float:
    """The largest difference of real positions from the states stored in `folder`."""
    real = load_file(BASE / "expected.safetensors")["attention_mask"].bool()
    return float((found - load_file(folder / "expected.safetensors")["last_hidden_state"])[real].abs().max())


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A copy of the published adapter that names its base, to be changed."""
    folder = Path(shutil.copytree(ADAPTER, tmp_path / "adapter"))
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(BASE)}))
    return folder


def to_pickle(folder: Path) -> None:
    """Keep the tensors the way the first models were published."""
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


# -- the same numbers as the published code


def test_a_published_base_gives_the_states_of_the_published_code() -> None:
    assert farthest(states(Encoder.from_pretrained(BASE, **FLAT)), BASE) <= CLOSE


@pytest.mark.parametrize("pickled", [False, True])
def test_an_adapter_in_the_old_layout_gives_the_states_of_the_published_code(adapter: Path, pickled: bool, tmp_path: Path) -> None:
    if pickled:
        to_pickle(adapter)
    encoder = Encoder.from_pretrained(adapter, **FLAT)
    assert farthest(states(encoder)) <= CLOSE
    assert farthest(states(Encoder.from_pretrained(adapter, **{**FLAT, "positions": "native"}))) > 0.1
    encoder.save_pretrained(tmp_path / "ours")
    names = load_file(tmp_path / "ours" / "adapter_model.safetensors").keys()
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    again = Encoder.from_pretrained(tmp_path / "ours", device="cpu")
    assert (again.options.positions, again.options.padding_side) == ("flat", "left")
    assert torch.equal(states(again), states(encoder))


def test_every_tensor_of_the_adapter_is_used() -> None:
    encoder = Encoder.from_pretrained(BASE, adapter=ADAPTER, **FLAT)
    before = states(encoder)
    factors = [parameter for name, parameter in encoder.model.named_parameters() if "lora_" in name]
    assert len(factors) == len(load_file(ADAPTER / "adapter_model.safetensors"))
    for parameter in factors:
        kept = parameter.detach().clone()
        parameter.data += 0.1
        assert not torch.equal(states(encoder), before)
        parameter.data.copy_(kept)


def test_an_explicit_base_wins_over_the_one_that_the_adapter_names(adapter: Path) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "/somewhere/else"}))
    with pytest.raises(ModelError, match="/somewhere/else: no such folder"):
        Encoder.from_pretrained(adapter, **FLAT)
    assert farthest(states(Encoder.from_pretrained(BASE, adapter=adapter, **FLAT))) <= CLOSE


@pytest.mark.skipif("llava_next" not in registry(), reason="no family of this version reads it")
@pytest.mark.parametrize(("adapter", "name"), [(None, "base_hidden_state"), (LLAVA / "adapter_dora", "last_hidden_state")])
def test_another_family_with_adapters_in_two_towers(adapter: Path | None, name: str) -> None:
    encoder = Encoder.from_pretrained(LLAVA, adapter=adapter, padding_side="left", device="cpu")
    expected = load_file(LLAVA / "adapter_dora" / "expected.safetensors")
    features = encoder.processor.features("<|image_1|> Represent the given image\n", [Image.open(LLAVA / "low_128.png").convert("RGB")])
    batch = encoder.processor.collate([features])
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    with torch.no_grad():
        found = encoder.backbone.hidden(batch)[:, expected["kept"]]
    assert (found - expected[name]).abs().max() <= CLOSE


# -- adapters that do not fit, and bases that are not theirs


def change(folder: Path, harm: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    harm(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


NAME = "base_model.model.model.layers.1.self_attn.v_proj"
A, B, MAGNITUDE = f"{NAME}.lora_A.weight", f"{NAME}.lora_B.weight", f"{NAME}.lora_magnitude_vector"


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda tensors: tensors.update({f"x.{A}": tensors.pop(A)}), "layers.1.self_attn.v_proj.lora_A.weight is missing"),
        (lambda tensors: tensors.pop(MAGNITUDE), "layers.1.self_attn.v_proj.lora_magnitude_vector is missing"),
        (lambda tensors: tensors.update({f"{NAME}.lora_C": torch.ones(1)}), f"tensor {NAME}.lora_C is unexpected"),
        (lambda tensors: tensors.update({A: torch.ones(8, 64)}), rf"{A} has shape \(8, 64\), the model needs \(4, 64\)"),
        (lambda tensors: tensors.update({B: torch.ones(64, 4)}), rf"{B} has shape \(64, 4\), the model needs \(32, 4\)"),
        (lambda tensors: tensors[B].view(-1)[:3].fill_(float("nan")), f"tensor {B} holds 3 non-finite values"),
    ],
    ids=["renamed", "missing", "extra", "wrong rank", "wrong shape", "NaN"],
)
def test_a_damaged_adapter_is_refused_by_the_name_of_its_tensor(harm: Callable, words: str, pickled: bool, adapter: Path) -> None:
    change(adapter, harm)
    if pickled:
        to_pickle(adapter)
    with pytest.raises(AdapterError, match=words):
        Encoder.from_pretrained(adapter, **FLAT)


def test_another_rank_than_the_settings_say(adapter: Path) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "r": 16}))
    with pytest.raises(AdapterError, match=r"lora_A.weight has shape \(4, 96\), the model needs \(16, 96\)"):
        Encoder.from_pretrained(adapter, **FLAT)


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("builtin/tiny-qwen2_vl", r"layers.0.mlp.down_proj.lora_A.weight has shape \(4, 96\), the model needs \(4, 64\)"),
        ("builtin/tiny-smolvlm", r"tensor base_model.model.model.text_model.layers.0.mlp.down_proj.lora_A.weight is missing"),
        ("builtin/tiny-vlm2vec_vista", r"so tensor base_model.model.model.layers.0.mlp.down_proj.lora_A.weight has no place"),
    ],
    ids=["another width", "another architecture", "no layer of these names"],
)
def test_a_base_that_is_not_the_adapters_is_refused(base: str, words: str, adapter: Path) -> None:
    with pytest.raises(AdapterError, match=words):
        Encoder.from_pretrained(base, adapter=adapter, device="cpu")


def test_a_whole_model_in_the_old_layout_must_be_complete(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(BASE, tmp_path / "model", ignore=shutil.ignore_patterns("expected*", "adapter*")))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_projection.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 missing tensor, first model.language_model.layers.1.mlp.up_proj.weight"):
        Encoder.from_pretrained(folder, **FLAT)


def test_an_adapter_that_does_nothing_is_refused_unless_it_is_ours(adapter: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(adapter, lambda tensors: [tensor.zero_() for name, tensor in tensors.items() if "lora_B" in name])
    with pytest.raises(AdapterError, match="every lora_B is zero, so the embeddings are those of the base model; the adapter is damaged"):
        Encoder.from_pretrained(adapter, **FLAT)
    (adapter / "vlm2vec.json").write_text(json.dumps({"format": 1, "model": {}, "base": {"path": str(BASE), "revision": None}}))
    with caplog.at_level(logging.WARNING, "vlm2vec"):
        Encoder.from_pretrained(adapter, **FLAT)
    assert "every lora_B is zero" in caplog.text


def test_an_adapter_of_unknown_positions_is_pointed_out(adapter: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "vlm2vec"):
        Encoder.from_pretrained(adapter, device="cpu")
        assert "nothing says which token positions it was trained with" in caplog.text
        caplog.clear()
        Encoder.from_pretrained(adapter, **FLAT)
    assert not caplog.text


# -- a Hub cache: snapshots are links into blobs


def cache_repository(cache: Path, name: str, files: list[Path], commit: str, ref: str = "main") -> Path:
    """Lay `files` out as the Hub's client does: bytes by their digest, a snapshot of relative links, a ref that names it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / ref).write_text(commit)
    for number, file in enumerate(files):
        shutil.copy(file, repository / "blobs" / f"{commit[:8]}{number}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{commit[:8]}{number}")
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache with a known adapter and its base, without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pickled = Path(shutil.copytree(ADAPTER, tmp_path / "pickled"))
    to_pickle(pickled)
    cache_repository(tmp_path / "hub", "TIGER-Lab/VLM2Vec-Qwen2VL-2B", [*pickled.glob("adapter_*"), BASE / "config.json"], "a" * 40)
    base = [file for file in BASE.iterdir() if file.suffix in (".json", ".safetensors") and file.stem != "expected"]
    cache_repository(tmp_path / "hub", "Qwen/Qwen2-VL-2B-Instruct", base, "b" * 40)
    return tmp_path / "hub"


def test_a_known_checkpoint_is_loaded_by_its_name_with_its_settings(cache: Path, tmp_path: Path) -> None:
    options = Encoder.from_pretrained("TIGER-Lab/VLM2Vec-Qwen2VL-2B", device="cpu").options
    assert (options.path, options.pooling, options.padding_side, options.positions) == ("Qwen/Qwen2-VL-2B-Instruct", "last", "left", "flat")
    assert (options.max_tokens, options.min_pixels, options.max_pixels) == (4096, 3136, 12845056)
    assert (options.prompt, options.resize) == ("raw", 1344)
    encoder = Encoder.from_pretrained("TIGER-Lab/VLM2Vec-Qwen2VL-2B", device="cpu", resize=None)  # the outputs are of small pictures
    assert farthest(states(encoder)) <= CLOSE
    assert Encoder.from_pretrained("TIGER-Lab/VLM2Vec-Qwen2VL-2B", device="cpu", max_tokens=9).options.max_tokens == 9
    encoder.save_pretrained(tmp_path / "ours")
    assert torch.equal(states(Encoder.from_pretrained(tmp_path / "ours", device="cpu")), states(encoder))


def test_a_known_adapter_on_a_base_elsewhere_and_a_snapshot_given_as_folder(cache: Path) -> None:
    options: dict[str, Any] = {"device": "cpu", "resize": None}  # the pictures are small
    expected = states(Encoder.from_pretrained("TIGER-Lab/VLM2Vec-Qwen2VL-2B", **options))
    assert torch.equal(states(Encoder.from_pretrained(BASE, adapter="TIGER-Lab/VLM2Vec-Qwen2VL-2B", **options)), expected)
    snapshot = cache / "models--TIGER-Lab--VLM2Vec-Qwen2VL-2B" / "snapshots" / ("a" * 40)
    assert torch.equal(states(Encoder.from_pretrained(snapshot, **options)), expected)


def test_a_cached_revision_is_found_by_its_commit_and_another_is_missed(cache: Path) -> None:
    assert Encoder.from_pretrained("Qwen/Qwen2-VL-2B-Instruct", revision="b" * 40, device="cpu").options.revision == "b" * 40
    with pytest.raises(ModelError, match=f"model Qwen/Qwen2-VL-2B-Instruct@{'c' * 40} not in cache and offline"):
        Encoder.from_pretrained("Qwen/Qwen2-VL-2B-Instruct", revision="c" * 40)


def test_a_base_that_is_not_cached_is_named(cache: Path) -> None:
    shutil.rmtree(cache / "models--Qwen--Qwen2-VL-2B-Instruct")
    with pytest.raises(ModelError, match="model Qwen/Qwen2-VL-2B-Instruct@main not in cache and offline"):
        Encoder.from_pretrained("TIGER-Lab/VLM2Vec-Qwen2VL-2B")
