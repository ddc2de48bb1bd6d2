"""Exports through transformers alone and through sentence-transformers, and what the gate says of exports that were broken on purpose."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ProcessorMixin

from tests.backbones.common import picture
from vlm2vec import Encoder, backends, cli, io, samples
from vlm2vec.backbones import registry
from vlm2vec.backends import ST_MODULE
from vlm2vec.config import LoraConfig, ModelConfig
from vlm2vec.encoder import SETTINGS
from vlm2vec.errors import InputError, ModelError
from vlm2vec.export import export
from vlm2vec.pictures_only import pictures_only
from vlm2vec.probe_file import PROBES, read_probes
from vlm2vec.verify import Report, Row, verify

BAR = 1e-5  # largest difference of two numbers of an embedding, in float32
TINY = "builtin/tiny-qwen2_vl"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export to break; copy it first."""
    encoder = Encoder.from_pretrained(TINY)
    encoder.query_instruction = "Find a picture of this:"
    folder = tmp_path_factory.mktemp("exported")
    encoder.save_pretrained(folder / "model")
    export(str(folder), folder / "out")
    return folder / "out"


def worst(report: Report | None) -> dict[str, float]:
    """The largest difference of each tool."""
    assert report is not None
    return {tool: max(row.largest for row in report.rows if row.tool == tool) for tool in {row.tool for row in report.rows}}


def families() -> list[Any]:
    """Every second one in every run of the tests, all in the slow ones."""
    return [pytest.param(family, marks=[pytest.mark.slow] if number % 2 else []) for number, family in enumerate(sorted(registry()))]


@pytest.mark.parametrize("family", families())
def test_every_family_embeds_alike_in_every_tool_that_can_hold_it(family: str, tmp_path: Path) -> None:
    found = worst(report := export(f"builtin/tiny-{family}", tmp_path / "out"))
    assert max(found.values()) <= BAR
    assert report is not None and sum(row.items for row in report.rows if row.tool == "sentence-transformers") == 33
    alone = not registry()[family].differs_elsewhere
    assert found.keys() == {"before the export", "sentence-transformers"} | ({"transformers"} if alone else set())
    assert alone or registry()[family].differs_elsewhere in report.skipped["transformers"]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2_vl", {"prompt": "chat", "system": "Represent it.", "ending": "<|endoftext|>"}),
        ("qwen2_vl", {"positions": "flat", "padding_side": "left"}),
        ("internvl", {"pooling": "mean", "max_pixels": 2048}),
        ("llava_next", {"resize": 64}),
    ],
)
def test_what_a_recipe_says_of_the_model_reaches_every_tool(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(f"builtin/tiny-{family}", **options)
    encoder.save_pretrained(tmp_path / "model")
    assert max(worst(export(str(tmp_path), tmp_path / "out")).values()) <= BAR
    assert torch.equal(Encoder.from_pretrained(tmp_path / "out").encode(["x", picture(60, 90)]), encoder.encode(["x", picture(60, 90)]))


def test_an_adapter_alone_embeds_alike(tmp_path: Path) -> None:
    encoder = Encoder.build(ModelConfig(path="builtin/tiny-idefics3"), LoraConfig(rank=2))
    for name, parameter in encoder.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    encoder.save_pretrained(tmp_path / "model")
    found = worst(export(str(tmp_path), tmp_path / "out", "adapter"))
    assert found.keys() == {"before the export", "sentence-transformers", "transformers"} and max(found.values()) <= BAR


# ------------------------------------------------------------------------------------------------------------------------ as users do


def test_sentence_transformers_knows_our_prompts_by_itself(exported: Path) -> None:
    from sentence_transformers import SentenceTransformer

    pictures = [{"text": "words first", "image": picture(50, 90)}, picture(120, 40)]
    items = ["a", *pictures, "say <|image_pad|> and <|im_end|>", "<|image_1|>\nstray"]
    ours = Encoder.from_pretrained(exported)
    with pictures_only():
        model = SentenceTransformer(str(exported), device="cpu")
        for theirs, expected in (
            (model.encode(items, batch_size=2), ours.encode(items)),
            (model.encode(items, prompt="Find:"), ours.encode(items, instruction="Find:")),
            (model.encode_query(items), ours.encode_query(items)),
            (model.encode_document(items), ours.encode_target(items)),
        ):
            assert (torch.from_numpy(theirs) - expected).abs().max() <= BAR
        two = model.encode(["a", "b"])
        assert torch.allclose(model.similarity(two, two), ours.similarity(*[ours.encode(["a", "b"])] * 2), atol=1e-5)
    assert (ours.encode_query(items) - ours.encode(items)).abs().max() > 1e-2, "the instruction must do something"


def test_the_lines_of_the_card_run(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("apple.jpg", (60, 40)), ("pear.jpg", (40, 70))):
        picture(*size).save(tmp_path / name)
    shutil.copytree(exported, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    sections = (exported / "README.md").read_text().split("## ")[2:]
    snippets = {section.split("\n")[0].strip(): section.split("```")[1].removeprefix("python") for section in sections}
    found: dict[str, dict[str, Any]] = {}
    with pictures_only():
        for tool in ("vlm2vec", "sentence-transformers", "transformers"):
            found[tool] = {}
            exec(compile(snippets[tool], tool, "exec"), found[tool])
    assert (torch.as_tensor(found["sentence-transformers"]["queries"]) - found["vlm2vec"]["queries"]).abs().max() <= BAR
    with Image.open("apple.jpg") as apple:
        expected = Encoder.from_pretrained("out").encode(["a red apple", {"image": apple.copy(), "text": "an apple"}])
    assert (found["transformers"]["embeddings"] - expected).abs().max() <= BAR


def test_a_module_of_ours_is_not_run_without_its_users_word(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    export("builtin/tiny-phi3_v", tmp_path / "out", check=False)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(str(tmp_path / "out"), device="cpu")
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu", trust_remote_code=True)
    model.save_pretrained(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu", trust_remote_code=True)
    assert (again.encode(["a"]) == model.encode(["a"])).all() and again.get_embedding_dimension() == 32


def test_code_in_a_folder_is_never_run(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "out")
    (tmp_path / "out" / "evil.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'canary')!r}).touch()\nclass Module: pass\n")
    for kinds in (["evil.Module"], [ST_MODULE, "evil.Module"]):
        modules = [{"idx": place, "name": str(place), "path": "", "type": kind} for place, kind in enumerate(kinds)]
        (tmp_path / "out" / "modules.json").write_text(json.dumps(modules))
        change(SETTINGS, lambda found: found["export"].update(differences=["said"]))(tmp_path / "out")
        assert any("trust_remote_code" in problem for problem in verify(tmp_path / "out").problems)
    assert not (tmp_path / "canary").exists()


def test_processors_get_their_video_half_back() -> None:
    before = (ProcessorMixin.get_attributes.__func__, ProcessorMixin.from_args_and_dict.__func__)
    with pictures_only():
        pass
    assert (ProcessorMixin.get_attributes.__func__, ProcessorMixin.from_args_and_dict.__func__) == before
    assert not hasattr(ProcessorMixin, "video_processor")


# ------------------------------------------------------------------------------------------------------------------------ broken


def change(name: str, edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Edit a JSON file of a folder."""

    def harm(folder: Path) -> None:
        settings = json.loads((folder / name).read_text())
        edit(settings)
        (folder / name).write_text(json.dumps(settings))

    return harm


def change_template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("'\\n') * item.pictures", "' ') * item.pictures"))


def nudge_weight(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][3] += 2
    save_file(weights, file, metadata={"format": "pt"})


OTHER_STATES = "the same token ids and pixels but other states"
POOLING, PIXELS = "1_Pooling/config.json", "preprocessor_config.json"
HARM: dict[str, tuple[str, Callable[[Path], None], str]] = {  # the file, what happens to it, what is said of the numbers
    "template": ("chat_template.jinja", change_template, r"transformers, pictures: other token ids for pictures/\d, at place \d"),
    "pooling": (POOLING, change(POOLING, lambda found: found.update(pooling_mode="mean")), f"sentence-transformers, texts: {OTHER_STATES}"),
    "our pooling": (SETTINGS, change(SETTINGS, lambda found: found["model"].update(pooling="mean")), f"stored, texts: {OTHER_STATES}"),
    "weight": ("model.safetensors", nudge_weight, f"stored, texts: {OTHER_STATES}"),
    "pixels": (PIXELS, change(PIXELS, lambda found: found.update(image_mean=[0, 0, 0])), "stored, pictures: the same token ids but other"),
    "lost": (PIXELS, lambda folder: (folder / PIXELS).unlink(), f"vlm2vec: .*{PIXELS}"),
    "probes": (PROBES, lambda folder: (folder / PROBES).write_bytes(b"x" * 40), f"vlm2vec: .*{PROBES}"),
}


@pytest.mark.parametrize("kind", HARM)
def test_a_broken_export_is_caught_and_the_kind_of_break_named(kind: str, exported: Path, tmp_path: Path) -> None:
    file, harm, words = HARM[kind]
    shutil.copytree(exported, tmp_path / "out")
    harm(tmp_path / "out")
    files, *others = verify(tmp_path / "out").problems
    assert files.startswith("files:") and file in files
    assert any(re.match(words, problem) for problem in others), others


def test_an_intact_export_passes_whoever_wrote_its_card_anew(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(exported, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("another card")
    assert cli.main(["verify", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("1.0000000") == 21 and "vllm: left out: not installed" in shown and "FAILS" not in shown
    nudge_weight(tmp_path / "out")
    assert cli.main(["verify", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert "FAILS" in said.out and "files: " in said.err and "model.safetensors differs" in said.err


def test_what_is_no_export_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no export; make one with `vlm2vec export"):
        verify(TINY)
    Encoder.from_pretrained(TINY).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is no export"):
        verify(tmp_path)


def test_tools_that_are_absent_or_fail_are_told_apart(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> backends.Seen:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(backends, "OTHERS", {"no-such-tool": fails, "json": fails})
    report = verify(exported)
    assert report.skipped == {"no-such-tool": "not installed"} and report.problems == ["json: RuntimeError: no such kernel"]


def test_stored_samples_of_another_version_are_not_compared(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = read_probes(exported / PROBES)
    assert len(stored.fed) == 33 and stored.fed["texts/0"].pixels == (0.0, 0.0) != stored.fed["pairs/0"].pixels
    monkeypatch.setattr(samples, "VERSION", 2)
    with pytest.raises(InputError, match="samples of version 1, this version of vlm2vec has 2"):
        read_probes(exported / PROBES)


def test_the_samples_are_uneven_and_the_same_everywhere() -> None:
    bytes_of = [list(image.tobytes()) for image in (samples.picture(9, 5), samples.picture(4, 8))]
    assert io.digest(bytes_of) == "d63f73c4b0a777aad0f14fbff32d4c5165d85100faabc0f8415df000247f4844"
    names = [name for group in samples.groups() for name in group.ids]
    assert len(set(names)) == len(names) == 33


def test_a_table_has_a_line_for_each_row() -> None:
    rows = [Row("tool", "texts", 5, 1e-7, 0.99999999), Row("other", "pairs", 3, float("nan"), -1.0, "broken")]
    report = Report(Path("out"), "float32", rows)
    lines = report.table().splitlines()
    assert lines[1].split() == ["tool", "texts", "5", "1.0e-07", "1.0000000"] and lines[2].endswith("FAILS")
    assert report.problems == ["other, pairs: broken"]
