"""What an export writes, piece by piece, without asking other tools; `test_verify.py` asks them."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils.chat_template_utils import render_jinja_template

from tests.backbones.common import picture
from tests.measured import results
from vlm2vec import Encoder, backends, prompts
from vlm2vec.backbones import base, resolve
from vlm2vec.config import LoraConfig, ModelConfig
from vlm2vec.data.types import ImageRef, Item
from vlm2vec.errors import AdapterError, EnvError, InputError, NonFiniteError, ParityError
from vlm2vec.export import export, model_of
from vlm2vec.export.card import card
from vlm2vec.export.template import chat_template, picture_mark

TINY = "builtin/tiny-qwen2_vl"
ITEMS = ["a red apple", {"text": "what is this?", "image": picture(60, 40), "instruction": "Answer:"}, picture(30, 80)]


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., str]:
    """A model folder with an adapter that does something; arguments are keys of the recipe's lora section."""

    def make(family: str = "qwen2_vl", whole: tuple[str, ...] = (), **lora: Any) -> str:
        encoder = Encoder.build(ModelConfig(path=f"builtin/tiny-{family}"), LoraConfig(rank=4, alpha=8.0, **lora))
        stream = torch.Generator().manual_seed(0)
        encoder.train_only(whole)
        with torch.no_grad():
            for name, parameter in encoder.model.named_parameters():
                if "lora_B" in name or parameter.requires_grad and "lora_" not in name:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=stream))
        folder = tmp_path / "run" / "model"
        encoder.save_pretrained(folder)
        return str(folder.parent)

    return make


# ------------------------------------------------------------------------------------------------------------------------ prompts


def rendered(template: str, item: dict[str, Any]) -> str:
    """The template on an item as sentence-transformers writes it: keys in the user's order, the instruction in a system message."""
    system = [{"role": "system", "content": [{"type": "text", "text": item["instruction"]}]}] if item.get("instruction") else []
    parts = [{"type": "text", "text": item["text"]}] if "text" in item else []
    parts += [{"type": "image"}] * len(item.get("image", []))
    found, _ = render_jinja_template(conversations=[[*system, {"role": "user", "content": parts}]], chat_template=template)
    return found[0]


TEXTS = [
    *("a", "a\n", "", " ", "two\nlines", "<|image_1|>\nfirst", "see <|image_1|> and <|image_2|>", "<|image_1|><|image_1|>"),
    *("<|image_7|>\nstray", "<|image_01|>", "<|image_0|>", "<|image_", "<|image_1", "<|image_x|>", "<|image_12345|>"),
    *("|><|image_1|>|>", "<|image_3|>\n\n<|image_1|>"),
]


@pytest.mark.parametrize("keep_stray", [False, True])
@pytest.mark.parametrize("instruction", ["", "Find it:", "Find it:\n", "Find <|image_1|> in", "stray <|image_9|>\nhere"])
def test_the_template_writes_our_prompts(instruction: str, keep_stray: bool) -> None:
    processor = Encoder.from_pretrained(TINY, keep_stray=keep_stray).processor
    template, mark, images = chat_template(processor), picture_mark(processor), [picture(8, 8), picture(9, 9)]
    compared = 0
    for text in TEXTS:
        for count in range(3):
            item = Item(text, tuple(map(ImageRef, images[:count])), instruction)
            pieces = prompts.split(prompts.render(item, keep_stray), count)
            order = [piece for piece in pieces if isinstance(piece, int)]
            seen = {piece for piece in prompts.split(f"{instruction} {text}", count) if isinstance(piece, int)}
            written = {"text": text, "image": images[:count], "instruction": instruction}
            if order != sorted(order) or (seen and len(seen) < count):
                with pytest.raises(Exception, match="placeholders"):
                    rendered(template, written)
            else:
                assert rendered(template, written) == "".join(mark if isinstance(piece, int) else piece for piece in pieces)
                compared += 1
    assert compared > 30


def test_placeholders_out_of_order_are_refused_rather_than_shown_the_wrong_picture() -> None:
    template = chat_template(Encoder.from_pretrained(TINY).processor)
    for text, words in (("<|image_2|> <|image_1|>", "in their order"), ("only <|image_1|>", "some of its pictures")):
        with pytest.raises(Exception, match=words):
            rendered(template, {"text": text, "image": [0, 0]})


def test_an_export_of_an_export_says_the_same(tmp_path: Path) -> None:
    Encoder.from_pretrained(TINY, prompt="chat", system="Represent it.", ending="<|endoftext|>").save_pretrained(tmp_path / "chat")
    export(str(tmp_path / "chat"), tmp_path / "one", check=False)
    export(str(tmp_path / "one"), tmp_path / "two", check=False)
    first, second = ((tmp_path / name / "chat_template.jinja").read_text() for name in ("one", "two"))
    assert first == second and "Represent it." in first
    expected = Encoder.from_pretrained(TINY, prompt="chat", system="Represent it.", ending="<|endoftext|>").encode(ITEMS)
    assert torch.equal(Encoder.from_pretrained(tmp_path / "two").encode(ITEMS), expected)


# ------------------------------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize(
    ("family", "lora"),
    [("qwen2_vl", {}), ("llava_next", {"dora": True}), ("gemma3", {"rslora": True, "parts": ("language", "vision")}), ("phi3_v", {})],
)
def test_merged_weights_embed_as_the_adapter_does(family: str, lora: dict[str, Any], trained: Callable[..., str], tmp_path: Path) -> None:
    run = trained(family, **lora)
    before = Encoder.from_pretrained(f"{run}/model").encode(ITEMS)
    export(run, tmp_path / "out", check=False)
    export(run, tmp_path / "adapter", "adapter", check=False)
    assert (Encoder.from_pretrained(tmp_path / "out").encode(ITEMS) - before).abs().max() <= 1e-5
    assert torch.equal(Encoder.from_pretrained(tmp_path / "adapter").encode(ITEMS), before)
    assert (Encoder.from_pretrained(f"builtin/tiny-{family}").encode(ITEMS) - before).abs().max() > 1e-3, "the adapter must do something"


def test_a_merged_matrix_is_the_sum_in_float64_rounded_once(trained: Callable[..., str], tmp_path: Path) -> None:
    run = trained()
    export(run, tmp_path / "out", dtype="bfloat16", check=False)
    layer = "language_model.layers.0.self_attn.q_proj"
    adapter = load_file(f"{run}/model/adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.model.{layer}.lora_{side}.weight"].double() for side in "AB")
    name = "model.layers.0.self_attn.q_proj.weight"
    plain, found = (load_file(folder / "model.safetensors")[name] for folder in (resolve(ModelConfig(path=TINY)), tmp_path / "out"))
    exact = plain.double() + 8 / 4 * b @ a
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().max() <= exact.abs().max() * 2**-8
    assert float((found == exact.to(torch.bfloat16)).float().mean()) > 0.99  # but where float32 lies on the border of two numbers


def test_parts_trained_in_full_are_merged_and_keep_an_adapter_from_being_exported(trained: Callable[..., str], tmp_path: Path) -> None:
    run = trained(whole=("projector",))
    with pytest.raises(AdapterError, match=r"tensors in full beside its adapter, first .*--merged"):
        export(run, tmp_path / "out", "adapter", check=False)
    before = Encoder.from_pretrained(f"{run}/model").encode(ITEMS)
    export(run, tmp_path / "out", check=False)
    assert (Encoder.from_pretrained(tmp_path / "out").encode(ITEMS) - before).abs().max() <= 1e-5
    with pytest.raises(AdapterError, match="has no adapter"):
        export(TINY, tmp_path / "other", "adapter", check=False)


def test_weights_have_the_format_of_the_base_unless_told_otherwise(tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(TINY, dtype="bfloat16")
    encoder.save_pretrained(tmp_path / "base")
    for dtype, expected in ((None, "bfloat16"), ("float16", "float16")):
        export(str(tmp_path / "base"), tmp_path / expected, dtype=dtype, check=False)
        weights = load_file(tmp_path / expected / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {getattr(torch, expected)}
        assert json.loads((tmp_path / expected / "config.json").read_text())["dtype"] == expected


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), None), (1e30, "float16")])
def test_weights_that_are_no_numbers_are_refused(value: float, dtype: str | None, tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(TINY)
    with torch.no_grad():
        encoder.model.lm_head.weight[0, 0] = value  # a tensor that no embedding reads
    encoder.save_pretrained(tmp_path / "bad")
    with pytest.raises(NonFiniteError, match=r"lm_head.weight holds 1 non-finite values"):
        export(str(tmp_path / "bad"), tmp_path / "out", dtype=dtype, check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_large_weights_are_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "SHARD", "100KB")
    export(TINY, tmp_path / "out", check=False)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1 and (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert torch.equal(Encoder.from_pretrained(tmp_path / "out").encode(ITEMS), Encoder.from_pretrained(TINY).encode(ITEMS))


# ------------------------------------------------------------------------------------------------------------------------ files


def test_processor_files_are_the_bases_own_bytes(trained: Callable[..., str], tmp_path: Path) -> None:
    export(trained(), tmp_path / "out", check=False)
    source = resolve(ModelConfig(path=TINY))
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("nested", [False, True])
def test_a_changed_size_of_pictures_is_all_that_changes_in_their_file(nested: bool, tmp_path: Path) -> None:
    Encoder.from_pretrained(TINY).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "preprocessor_config.json"
    if nested:  # as transformers 5 saves it
        settings = {"processor_class": "Qwen2VLProcessor", "image_processor": json.loads(file.read_text())}
        file.unlink()
        file = file.with_name("processor_config.json")
        file.write_text(json.dumps(settings))
    Encoder.from_pretrained(tmp_path / "base", max_pixels=6272).save_pretrained(tmp_path / "small")
    file.write_text(file.read_text().replace("{", '{"kept": 1, ', 1))
    (tmp_path / "small" / file.name).write_text(file.read_text())
    export(str(tmp_path / "small"), tmp_path / "out", check=False)
    found, expected = (json.loads((tmp_path / folder / file.name).read_text()) for folder in ("out", "base"))
    (expected["image_processor"] if nested else expected)["size"]["longest_edge"] = 6272
    assert found == expected


def test_the_layout_names_who_embeds(tmp_path: Path) -> None:
    cases = [({"pooling": "mean"}, ["Transformer", "Pooling", "Normalize"]), ({"positions": "flat"}, ["Vlm2Vec"])]
    for number, (options, modules) in enumerate(cases):
        encoder = Encoder.from_pretrained(TINY, **options)
        encoder.query_instruction = "Find a picture:"
        encoder.save_pretrained(tmp_path / str(number))
        folder = tmp_path / f"out{number}"
        export(str(tmp_path / str(number)), folder, check=False)
        assert [module["type"].rpartition(".")[2] for module in json.loads((folder / "modules.json").read_text())] == modules
        about = json.loads((folder / "config_sentence_transformers.json").read_text())
        assert about["prompts"] == {"query": "Find a picture:", "document": ""} and about["similarity_fn_name"] == "cosine"
    assert json.loads((tmp_path / "out0/1_Pooling/config.json").read_text())["pooling_mode"] == "mean"
    text = (tmp_path / "out1" / "README.md").read_text()
    assert "trust_remote_code=True" in text and "positions is flat" in text and "AutoModel" not in text


def test_an_adapter_says_that_its_base_lies_here(trained: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    export(trained(), tmp_path / "out", "adapter", check=False)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(resolve(ModelConfig(path=TINY)).resolve())
    assert not (tmp_path / "out" / "config.json").exists(), "transformers would then look for whole weights"
    words = f"The base {TINY} lies on this machine only"
    assert words in caplog.text and words in (tmp_path / "out" / "README.md").read_text()


def test_the_card_shows_no_tool_that_cannot_read_the_folder() -> None:
    settings = {"base": None, "model": {"pooling": "mean"}, "query_instruction": "", "target_instruction": "Represent it."}
    about = {"form": "merged", "dtype": "bfloat16", "differences": [], "notes": ["Cut."], "guarded": False}
    text = card("mine", {**settings, "export": about})
    assert "pool_mean" in text and "sanitize" not in text and "Targets are embedded under the instruction `Represent it.`" in text
    adapter = {**settings, "base": {"path": "b"}, "export": {**about, "form": "adapter"}}
    assert "vLLM" in text and "vLLM" not in card("mine", adapter)


# ------------------------------------------------------------------------------------------------------------------------ the folder


def test_a_folder_is_refused_replaced_or_left(tmp_path: Path) -> None:
    to = tmp_path / "out"
    assert export(TINY, to, check=False) is not None
    written = (to / "manifest.json").stat().st_mtime_ns
    assert export(TINY, to, check=False) is None and (to / "manifest.json").stat().st_mtime_ns == written
    with pytest.raises(InputError, match="another export; choose another folder, or replace it with --overwrite"):
        export(TINY, to, dtype="float16", check=False)
    assert export(TINY, to, dtype="float16", overwrite=True, check=False) is not None
    assert json.loads((to / "vlm2vec.json").read_text())["export"]["dtype"] == "float16"
    Encoder.from_pretrained(TINY).save_pretrained(tmp_path / "model")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="something that is no export"):
            export(TINY, tmp_path / "model", overwrite=overwrite, check=False)


def test_the_scores_of_a_run_travel_with_its_model(trained: Callable[..., str], tmp_path: Path) -> None:
    run = trained()
    (Path(run) / "results.json").write_text(json.dumps(told := results({"Names": [1.0, 0.0]})))
    export(run, tmp_path / "out", check=False)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["sets"] == told["sets"]
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match=r"other.json"):
        export(run, tmp_path / "else", results=tmp_path / "other.json", check=False)


def test_a_run_that_has_not_finished_is_said(tmp_path: Path) -> None:
    (tmp_path / "run" / "step-000003").mkdir(parents=True)
    with pytest.raises(InputError, match="has not finished; .*step-000003"):
        model_of(str(tmp_path / "run"))
    (tmp_path / "run" / "model").mkdir()
    assert model_of(str(tmp_path / "run")) == str(tmp_path / "run" / "model")
    assert model_of("owner/name") == "owner/name"


def test_nothing_is_left_of_an_export_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(folder: Path, *_: Any) -> backends.Seen:
        seen = backends.seen_by(Encoder.from_pretrained(folder))
        seen.embeddings["pairs"] = -seen.embeddings["pairs"]
        return seen

    monkeypatch.setattr(backends, "OTHERS", {"json": other})
    with pytest.raises(ParityError, match="json, pairs: the same token ids and pixels but other states"):
        export(TINY, tmp_path / "out")
    monkeypatch.setattr(backends, "OTHERS", {})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vlm2vec.export.write_st_layout", lambda *_, **__: full())
    with pytest.raises(EnvError, match="bytes free"):
        export(TINY, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_base_with_a_template_in_its_tokenizer_file_gets_ours(tmp_path: Path) -> None:
    Encoder.from_pretrained(TINY).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": "{{ 'theirs' }}"}))
    (tmp_path / "base" / "chat_template.jinja").unlink()
    export(str(tmp_path / "base"), tmp_path / "out", check=False)
    tokenizer = Encoder.from_pretrained(tmp_path / "out").processor.tokenizer
    assert tokenizer.apply_chat_template([{"role": "user", "content": "words"}], tokenize=False) == "words"


def test_a_damaged_file_keeps_an_equal_export_from_being_taken_for_done(tmp_path: Path) -> None:
    export(TINY, tmp_path / "out", check=False)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model.safetensors"):
        export(TINY, tmp_path / "out", check=False)
