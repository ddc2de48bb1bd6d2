"""Sixty-four things that users hand in, and what they are told: the class, with it the exit code, and words that name what is wrong.

A case that a rule accepts provokes it and checks the outcome itself. Variants of a case stand with the module that they concern.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.faults.common import changed, light_recipe
from tests.faults.handed_in import (
    FINE,
    GOOD,
    Provoke,
    adapter,
    collapsed,
    cut_parquet,
    cut_weights,
    edit,
    encoded,
    evaluation,
    features,
    full_disk,
    gated,
    header_of,
    held,
    injected,
    jsonl,
    lone_surrogate,
    long_text,
    lost_shard,
    missing_recipe,
    mixture,
    model,
    newer_format,
    offline,
    only_a_pickle,
    overwrite,
    picture,
    rank_of_the_first,
    raw,
    recipe,
    repeats_share_their_label,
    resumed_with_a_warning,
    rows,
    run_twice,
    same_pixels,
    stray_and_missing_placeholders,
    suite,
    text_bomb,
    turned,
    vanished_cache,
    weights,
    with_code,
)
from tests.runs import start_run
from tests.suites import Broken, Compass
from vlm2vec import Encoder
from vlm2vec.data.mixture import build_mixture
from vlm2vec.data.readers import find_files
from vlm2vec.data.types import ImageRef, Item
from vlm2vec.errors import (
    AdapterError,
    CheckpointError,
    DataError,
    EnvError,
    ImageError,
    InputError,
    ModelError,
    NonFiniteError,
    PathError,
    RecipeError,
    RunLockedError,
)
from vlm2vec.trainer import mixture_of, prepare_run_dir

MODEL, DATA, PATHS = ModelError, DataError, PathError
RGB = Image.new("RGB", (40, 30), (200, 30, 60))

CASES: list[tuple[int, type[Exception] | None, str, Provoke]] = [
    # ---- the recipe
    (1, RecipeError, r"phi35.yaml not found; did you mean .*phi35_lora.yaml\?", missing_recipe),
    (2, RecipeError, r"r.yaml: recipe is empty", raw("")),
    (3, RecipeError, r"expected a mapping, got list", raw("- a\n")),
    (4, RecipeError, r":3: tab used for indentation", recipe("  rank", "\trank")),
    (5, RecipeError, r":15: key 'lr' given twice \(first at line 14\)", recipe(new="  lr: 1e-4\n")),
    (6, RecipeError, r"unknown key loss.temprature; did you mean temperature\?", recipe("temperature", "temprature")),
    (7, RecipeError, r"train.lr: expected number, got 'fast'", recipe("5e-5", '"fast"')),
    (8, FINE, "", lambda here, patch: recipe()(here, patch).train.lr == 5e-5 or pytest.fail("lr")),
    (9, RecipeError, r'expected true/false, got string "False"', recipe(new='  activation_checkpointing: "False"\n')),
    (10, RecipeError, r"loss.temperature must be > 0 and finite, got 0", recipe("0.03", "0")),
    (10, RecipeError, r"loss.temperature must be > 0 and finite, got .nan", recipe("0.03", ".nan")),
    (11, RecipeError, r"train.chunk_tokens must be > 0, got 0", recipe(new="  chunk_tokens: 0\n")),
    (12, RecipeError, r"train.global_batch \(8\) is not divisible by 3 processes; nearest: 12",
     lambda here, patch: mixture_of(light_recipe(here)).draws(0, 0, 3)),
    (12, RecipeError, r"data.block \(6\) must divide train.global_batch \(16\)", recipe("  sources", "  block: 6\n  sources")),
    (13, RecipeError, r"train.warmup \(100\) must be smaller than train.steps \(100\)", recipe(new="  warmup: 100\n")),
    (14, RecipeError, r"lora.rank must be >= 1, got 0", recipe("rank: 4", "rank: 0")),
    (14, InputError, r"no .*match.*'qkv_x'.* q_proj", lambda here, patch: start_run(light_recipe(here, lora="{targets: [qkv_x]}"))),
    (15, RecipeError, r":15: tags are not allowed", recipe(new="  clip: !!python/object/apply:os.mkdir ['canary']\n")),
    (16, RecipeError, r"recipe too large", recipe(new="#" * 10_000_000)),
    (16, RecipeError, r"recipe too deep", recipe(new="  clip: " + "[" * 5000)),
    (16, RecipeError, r"anchors and aliases are not allowed", recipe(new="  clip: &a [*a]")),
    (17, RecipeError, r"expected one document, found 2", recipe(new="---\n" + GOOD)),
    (18, RecipeError, rf"byte {len(GOOD)} is NUL", raw(GOOD.encode() + b"\0")),
    (18, RecipeError, rf"byte {len(GOOD)} is not UTF-8", raw(GOOD.encode() + b"\xe9")),
    (19, RecipeError, r"override must look like key=value", recipe("", "", "train.lr")),
    (20, RecipeError, r"needs model.revision as a 40-character commit", recipe("family:", "trust_remote_code: true, family:")),
    (21, EnvError, r"cannot write .*file/run",
     lambda here, patch: (here / "file").touch() or prepare_run_dir(light_recipe(here / "file/run"))),
    (22, RecipeError, r"holds a run of another recipe; differing: train.lr: 0.001 -> 0.5. .*--fresh", run_twice(lr=0.5)),
    # ---- the backbone and checkpoints
    (23, MODEL, r"unknown model_type 'qwen3_vx'; did you mean \w+\? Supported: ", model(edit("config.json", model_type="qwen3_vx"))),
    (24, MODEL, r"model owner/name@main not in cache and offline", offline),
    (25, MODEL, r"owner/name.*(Access to model owner/name is restricted|gated)", gated),
    (26, MODEL, r"code.*modeling_x.*refused|refused.*modeling_x", model(with_code, "smolvlm")),
    (27, MODEL, r"model.safetensors: file is a Git-LFS pointer", model(overwrite("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"))),
    (27, MODEL, r"model.safetensors: file is an HTML page", model(overwrite("model.safetensors", b"<!DOCTYPE html><html></html>"))),
    (28, MODEL, r"model.safetensors: truncated: \d+ bytes, its header says \d+", model(cut_weights)),
    (29, MODEL, r"lists model-00002-of-00002.safetensors, which is missing", model(lost_shard)),
    (30, AdapterError, r"adapter_model.safetensors: tensor \S+ is missing", adapter(lambda table: dict(sorted(table.items())[1:]))),
    (30, AdapterError, r"tensor \S*evil is unexpected", adapter(lambda table: table | {"base_model.model.evil": torch.zeros(1)})),
    (30, AdapterError, r"has shape \(8, \d+\), the model needs \(4, \d+\)", adapter(rank_of_the_first)),
    (31, AdapterError, r"tensor \S+ holds \d+ non-finite values",
     adapter(lambda table: table | {min(table): table[min(table)] * torch.nan})),
    (32, MODEL, r"only pytorch_model.bin: pickle weights are refused", model(only_a_pickle)),
    (33, MODEL, r"no such folder|does not exist|not found", lambda here, patch: Encoder.from_pretrained(here / "run/step-000500")),
    (34, FINE, "", resumed_with_a_warning),
    (35, CheckpointError, r"no checkpoint is intact:\n.*step-000004: manifest missing\n.*step-000002: manifest missing", run_twice(1, 2)),
    (36, RecipeError, r"differing: train.global_batch: 8 -> 4", run_twice(global_batch=4)),
    (36, RecipeError, r"differing: run.seed: 5 -> 6",
     lambda here, patch: run_twice()(here, patch) or prepare_run_dir(changed(light_recipe(here / "run", steps=4), "run", seed=6))),
    (37, CheckpointError, r"written in format 3; this version reads format 1", newer_format),
    # ---- rows
    (38, DATA, r"A has no split 'orginal'; available: original; did you mean original\?",
     lambda here, patch: ((here / "A").mkdir(), (here / "A/original.jsonl").touch(), find_files(here, "A", "orginal"))),
    (38, DATA, r"data folder .*nowhere does not exist", mixture(root="/nowhere")),
    (39, DATA, r"a.jsonl:2: not valid JSON \(.*\): '\{\"q\": \"b'", jsonl(b'{"q": "a"}\n{"q": "b')),
    (40, DATA, r"a.jsonl:1: not valid UTF-8 \(byte 0xff", jsonl(b'{"q": "\xff"}')),
    (40, FINE, "", lambda here, patch: jsonl(b'\xef\xbb\xbf{"q": "a"}')(here, patch) == [{"q": "a"}] or pytest.fail("BOM")),
    (41, DATA, r"a.jsonl: no rows", jsonl(b"")),
    (41, DATA, r"the mixture has 72 pairs, fewer than one global batch of 80",
     lambda here, patch: build_mixture(light_recipe(here).data, True, 80, 17)),
    (42, DATA, r"a.jsonl:1: row 0: q is missing; the line has p", jsonl(b'{"p": "a"}')),
    (42, DATA, r"A row 1: query has neither text nor image", rows(("q", "", "p", ""), (" \n", "", "p", ""))),
    (42, DATA, r"A row 0: positive has neither text nor image", rows(("q", "", None, ""))),
    (43, DATA, r"a.jsonl:3: row 2: q must be string, got int", jsonl(b'{"q": "a"}\n{"q": "b"}\n{"q": 3}\n')),
    (44, FINE, "", long_text),
    (45, FINE, "", injected),
    (46, FINE, "", stray_and_missing_placeholders),
    (47, DATA, r"labels row 0: no candidates; the first must be the gold", evaluation(("q", ""), [])),
    (47, DATA, r"labels row 0: the gold has neither text nor image", evaluation(("q", ""), [("", ""), ("b", "")])),
    (48, FINE, "", repeats_share_their_label),
    (49, RecipeError, r"data.sources have weights that are all zero", weights(0, 0)),
    (49, RecipeError, r"data.sources\[0\].weight must be >= 0 and finite, got -1", weights(-1, 1)),
    (49, RecipeError, r"data.sources\[1\].weight must be >= 0 and finite, got .nan", weights(1, ".nan")),
    (50, DATA, r"a.parquet: truncated or not a parquet file", cut_parquet),
    (50, DATA, r"a.parquet: row 0: q is not valid UTF-8", lone_surrogate),
    # ---- pictures
    (51, ImageError, r"A row 17: image 'x.png': no such file: .*/x.png", picture(lambda here: here / "x.png")),
    *((52, PATHS, r"A row 0: image '.*': path leaves root", rows(("look", path, "a cat", ""), index=0))
      for path in ("/etc/passwd", "../../etc/passwd", "a\0b", "x" * 5000, ".", "C:\\x.png")),
    (52, PATHS, r"A row 0: image 'pipe': path leaves root: 'pipe': not a regular file but a pipe",
     lambda here, patch: os.mkfifo(here / "pipe") or rows(("look", "pipe", "a cat", ""), index=0)(here, patch)),
    (52, PATHS, r"a symbolic link points outside",
     lambda here, patch: (here / "link").symlink_to("/etc/passwd") or rows(("look", "link", "a cat", ""), index=0)(here, patch)),
    (53, ImageError, r"A row 17: image 'x.png': not an image \(the file is empty\)", picture(b"")),
    *((53, ImageError, rf"not a.* image \(looks like {kind}", picture(data)) for kind, data in {
        "HTML": b"<!doctype html><html>404", "JSON": b'{"error": 404}', "PDF": b"%PDF-1.7", "SVG": b"<svg xmlns='x'/>",
        "HEIC": b"\0\0\0\x18ftypheic",
    }.items()),
    *((54, ImageError, r"A row 17: image 'x.png': image file is truncated", picture(encoded(RGB, kind)[:-30]))
      for kind in ("JPEG", "PNG", "GIF", "WEBP")),
    (55, ImageError, r"20000x20000 = 400,000,000 pixels|400,000,000 pixels, at most 64,000,000", picture(header_of(20000, 20000))),
    (55, ImageError, r"13000x13000 = 169,000,000 pixels, at most 64,000,000", picture(header_of(13000, 13000))),
    (55, ImageError, r"1x1000000, longer than 200:1", picture(header_of(1, 1_000_000))),
    (55, ImageError, r"A row 17: image 'x.png': ", picture(text_bomb())),
    (56, ImageError, r"truncated or damaged|image is empty", picture(header_of(0, 0))),
    (56, ImageError, r"image is 3x2000, longer than 200:1", picture(header_of(3, 2000))),
    (56, FINE, "", lambda here, patch: [features(Item("", (ImageRef(Image.new("RGB", size)),))) for size in ((1, 1), (27, 27))]),
    (57, FINE, "", same_pixels(Image.fromarray(np.full((9, 9), 128 * 257, np.uint16)), Image.new("RGB", (9, 9), (128,) * 3))),
    (57, ImageError, r"undeclared float image", picture(encoded(Image.new("F", (9, 9)), "TIFF"))),
    (58, FINE, "", same_pixels(RGB, RGB.convert("CMYK"), RGB.convert("RGBA"))),
    (58, FINE, "", same_pixels(Image.new("RGB", (9, 9), "white"), Image.new("RGBA", (9, 9), (1, 2, 3, 0)),
     Image.new("LA", (9, 9), (0, 0)))),
    (59, FINE, "", same_pixels(Image.new("RGB", (9, 9), (255, 0, 0)), encoded(
        Image.new("RGB", (9, 9), (255, 0, 0)), "WEBP", save_all=True, append_images=[Image.new("RGB", (9, 9))], lossless=True))),
    (60, FINE, "", same_pixels(*map(turned, range(1, 9)))),
    (60, FINE, "", same_pixels(encoded(RGB), encoded(RGB, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"))),
    (61, FINE, "",
     lambda here, patch: [(here / "x.png").write_bytes(encoded(RGB, "JPEG")), picture(lambda here: here / "x.png")(here, patch)]),
    # ---- the run
    (62, EnvError, r"cannot write .*No space left on device \(needs at least [\d,]+ bytes, [\d,]+ bytes free\)", full_disk),
    (62, EnvError, r"cannot write .*/cache/x: .* was removed while it was filled", vanished_cache),
    (63, RunLockedError, r"is held by pid \d+ on host \S+ since .* \(alive\)", held),
    (64, NonFiniteError, r"1 of \d+ embeddings are NaN or infinite, first 'cat @100'", suite(Broken())),
    (64, FINE, "", collapsed),
    (64, DATA, r"1 of 4 sets cannot be scored; nothing was encoded", suite(Compass(), lambda root: shutil.rmtree(root / "eval/answers"))),
]  # fmt: skip
EXIT_CODES = {NonFiniteError: 3, EnvError: 4, RunLockedError: 5}


@pytest.mark.parametrize(("number", "error", "words", "provoke"), CASES, ids=[f"{case[0]}-{index}" for index, case in enumerate(CASES)])
def test_bad_input(
    number: int,
    error: type[Exception] | None,
    words: str,
    provoke: Provoke,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tally: Callable[..., None],
) -> None:
    monkeypatch.chdir(tmp_path)
    if error is FINE:
        provoke(tmp_path, monkeypatch)
        tally("S17", "bad inputs that a rule accepts", "the outcome that the rule names", 1)
        return
    with pytest.raises(error, match=words) as caught:
        provoke(tmp_path, monkeypatch)
    assert caught.value.exit_code == EXIT_CODES.get(error, 2)
    assert not (tmp_path / "canary").exists()
    tally("S17", "bad inputs", "refused: class, exit code and words as owed", 1)


def test_all_sixty_four_are_there() -> None:
    assert sorted({case[0] for case in CASES}) == list(range(1, 65))


def test_every_class_has_its_exit_code() -> None:
    assert [kind("").exit_code for kind in (InputError, NonFiniteError, EnvError, RunLockedError)] == [2, 3, 4, 5]
