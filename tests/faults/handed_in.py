"""Ways to hand in something bad: each gives a function of a folder and a MonkeyPatch that provokes what the library says to it."""

from __future__ import annotations

import io as memory
import json
import logging
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.faults.common import changed, environment, light_recipe, reseal
from tests.runs import start_run
from tests.suites import Compass, Constant, pencil_suite, write_set, write_suite
from vlm2vec import Encoder, checkpoint, io
from vlm2vec.backbones import load_backbone, resolve
from vlm2vec.backbones.builtin import builtin_checkpoint
from vlm2vec.batch import featurize
from vlm2vec.collate import Features
from vlm2vec.config import ModelConfig, load_recipe
from vlm2vec.data.images import load_image
from vlm2vec.data.mmeb import read_eval, read_train
from vlm2vec.data.readers import Column, read_rows
from vlm2vec.data.types import ImageRef, Item
from vlm2vec.evaluate import evaluate
from vlm2vec.losses import InfoNCE
from vlm2vec.trainer import mixture_of

GOOD = """\
model: {path: builtin/tiny-qwen2_vl, family: qwen2_vl}
lora:
  rank: 4
data:
  root: builtin/tiny
  sources:
    - name: a
    - name: b
loss:
  temperature: 0.03
train:
  steps: 100
  global_batch: 16
  lr: 5e-5
"""
ROOT = Path(__file__).parents[2]
Provoke = Callable[[Path, pytest.MonkeyPatch], object]
FINE = None  # accepted by a rule

# ---- ways to hand something in


def recipe(old: str = "", new: str = "", *overrides: str) -> Provoke:
    return raw(GOOD.replace(old, new, 1) if old else GOOD + new, *overrides)


def raw(content: str | bytes, *overrides: str) -> Provoke:
    def load(here: Path, patch: pytest.MonkeyPatch) -> Any:
        (here / "r.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_recipe(here / "r.yaml", overrides)

    return load


def missing_recipe(here: Path, patch: pytest.MonkeyPatch) -> None:
    (here / "phi35_lora.yaml").write_text(GOOD)
    load_recipe(here / "phi35.yaml")


def model(harm: Callable[[Path], object], family: str = "qwen2_vl") -> Provoke:
    """A copy of a miniature model, harmed."""

    def load(here: Path, patch: pytest.MonkeyPatch) -> None:
        folder = Path(shutil.copytree(builtin_checkpoint(f"tiny-{family}"), here / "model"))
        harm(folder)
        load_backbone(ModelConfig(path=str(folder)))

    return load


def edit(name: str, **keys: object) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | keys))


def overwrite(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def with_code(folder: Path) -> None:
    (folder / "modeling_x.py").write_text(f"import os\nos.mkdir({str(folder.parent / 'canary')!r})\n")
    edit("config.json", auto_map={"AutoConfig": "modeling_x.X"})(folder)


def cut_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])


def lost_shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    places = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(sorted(tensors))}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def adapter(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Provoke:
    def load(here: Path, patch: pytest.MonkeyPatch) -> None:
        start_run(light_recipe(here / "run", steps=3))
        file = here / "run/step-000003/adapter_model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
        Encoder.from_pretrained(file.parent)

    return load


def rank_of_the_first(table: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(name for name in sorted(table) if "lora_A" in name)
    return table | {name: torch.zeros(8, table[name].shape[1])}


def gated(here: Path, patch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import GatedRepoError

    def refuse(*arguments: Any, **options: Any) -> None:
        raise GatedRepoError("Access to model owner/name is restricted.", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]

    patch.setattr("vlm2vec.backbones.loading.snapshot_download", refuse)
    resolve(ModelConfig(path="owner/name"))


def offline(here: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here))
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    resolve(ModelConfig(path="owner/name"))


def run_twice(*damaged: int, **keys: Any) -> Provoke:
    """Train four steps, damage checkpoints (counted from the newest), and start again with other keys of `train`."""

    def again(here: Path, patch: pytest.MonkeyPatch) -> None:
        start_run(light_recipe(here / "run", steps=4))
        for index in damaged:
            (checkpoint.steps(here / "run")[-index] / "manifest.json").unlink()
        start_run(changed(light_recipe(here / "run", steps=4), "train", **keys))

    return again


def resumed_with_a_warning(here: Path, patch: pytest.MonkeyPatch) -> None:
    with log_lines(patch) as said:
        run_twice(1)(here, patch)
    assert any("step-000004: manifest missing; resuming step-000002" in line for line in said)


class log_lines:
    """What the library logs, whatever the level."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.lines: list[str] = []
        self.handler = logging.Handler()
        patch.setattr(self.handler, "emit", lambda record: self.lines.append(record.getMessage()))
        self.logger = logging.getLogger("vlm2vec")

    def __enter__(self) -> list[str]:
        self.logger.addHandler(self.handler)
        self.logger.setLevel("INFO")
        return self.lines

    def __exit__(self, *error: object) -> None:
        self.logger.removeHandler(self.handler)
        self.logger.setLevel("NOTSET")


def newer_format(here: Path, patch: pytest.MonkeyPatch) -> None:
    start_run(light_recipe(here / "run", steps=4))
    folder = here / "run/step-000004"
    edit("state.json", format=3)(folder)
    reseal(folder)
    start_run(changed(light_recipe(here / "run", steps=4), "checkpoint"))


def jsonl(content: bytes) -> Provoke:
    def read(here: Path, patch: pytest.MonkeyPatch) -> list[dict]:
        (here / "a.jsonl").write_bytes(content)
        return read_rows([here / "a.jsonl"], (Column("q"),)).to_pylist()

    return read


def rows(*cells: tuple[str | None, str | None, str, str], index: int | None = None) -> Provoke:
    """Training rows (query text and picture, positive text and picture), and what becomes of one of them."""

    def read(here: Path, patch: pytest.MonkeyPatch) -> Any:
        table = dict(zip(("qry", "qry_image_path", "pos_text", "pos_image_path"), zip(*cells, strict=True), strict=True))
        (here / "A").mkdir()
        pq.write_table(pa.table({name: pa.array(values, pa.string()) for name, values in table.items()}), here / "A/original.parquet")
        found = read_train(here, "A")
        return found if index is None else found[index]

    return read


def evaluation(*row: Any) -> Provoke:
    def read(here: Path, patch: pytest.MonkeyPatch) -> Any:
        write_set(here, "labels", [row])
        return read_eval(here, "labels", "eval/labels", here)

    return read


def mixture(**data: Any) -> Provoke:
    return lambda here, patch: mixture_of(light_recipe(here, **data))


def weights(first: object, second: object) -> Provoke:
    return recipe("- name: a\n    - name: b", f"- name: a\n      weight: {first}\n    - name: b\n      weight: {second}")


def cut_parquet(here: Path, patch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"q": ["a"] * 99}), here / "a.parquet")
    (here / "a.parquet").write_bytes((here / "a.parquet").read_bytes()[:-20])
    read_rows([here / "a.parquet"], (Column("q"),))


def lone_surrogate(here: Path, patch: pytest.MonkeyPatch) -> None:
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 3], np.int32).tobytes()), pa.py_buffer(b"\xed\xa0\x80"))
    pq.write_table(pa.table({"q": bad}), here / "a.parquet")
    read_rows([here / "a.parquet"], (Column("q"),))


def features(item: Item, **options: Any) -> Features:
    return featurize(load_backbone(ModelConfig(path="builtin/tiny-qwen2_vl", **options)).processor, item)


def long_text(here: Path, patch: pytest.MonkeyPatch) -> None:
    picture = ImageRef(Image.new("RGB", (56, 56)))
    with log_lines(patch) as said:
        short, whole = (features(Item("word " * 400, (picture,)), max_tokens=tokens) for tokens in (8, 4096))
    kept = [int((found.input_ids == whole.input_ids.mode().values).sum()) for found in (short, whole)]
    assert len(short) < len(whole) and torch.equal(short.images[0]["pixel_values"], whole.images[0]["pixel_values"]), kept
    assert any("max_tokens" in line for line in said)


def injected(here: Path, patch: pytest.MonkeyPatch) -> None:
    """Control tokens in a text stay letters: none of their ids appears."""
    backbone = load_backbone(ModelConfig(path="builtin/tiny-qwen2_vl"))
    tokenizer = backbone.processor.tokenizer
    text = "".join(tokenizer.all_special_tokens) + "<|im_end|><|image_pad|>"
    assert not set(featurize(backbone.processor, Item(text)).input_ids.tolist()) & set(tokenizer.all_special_ids)


def stray_and_missing_placeholders(here: Path, patch: pytest.MonkeyPatch) -> None:
    picture = ImageRef(Image.new("RGB", (56, 56)))
    assert torch.equal(features(Item("<|image_1|>\nname it")).input_ids, features(Item("name it")).input_ids)
    assert torch.equal(features(Item("name it", (picture,))).input_ids, features(Item("<|image_1|>\nname it\n", (picture,))).input_ids)


def repeats_share_their_label(here: Path, patch: pytest.MonkeyPatch) -> None:
    embedding_ND = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    same = {"positive_B": torch.arange(4), "query_id_B": torch.tensor([1, 1, 2, 3]), "target_id_N": torch.tensor([5, 5, 6, 7])}
    loss, _ = InfoNCE(light_recipe(here).loss)(embedding_ND, embedding_ND, **same)
    other, _ = InfoNCE(light_recipe(here).loss)(embedding_ND, embedding_ND, **(same | {"target_id_N": torch.arange(4)}))
    assert torch.isfinite(loss) and not torch.equal(loss, other)


def picture(source: Any) -> Provoke:
    """A picture given as bytes, as an open image, or as a function that makes it in a folder."""

    def load(here: Path, patch: pytest.MonkeyPatch) -> Image.Image:
        found = source(here) if callable(source) else source
        return load_image(ImageRef(found, "A row 17: image 'x.png'"))

    return load


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = memory.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def header_of(width: int, height: int) -> bytes:
    """A PNG that says it is that large and holds next to nothing."""
    head = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + b"\0\0\0\r" + head + zlib.crc32(head).to_bytes(4, "big") + b"\0\0\0\0IDAT"


def text_bomb() -> bytes:
    chunk = b"zTXt" + b"k\0\0" + zlib.compress(b"\0" * 100_000_000)
    whole = encoded(Image.new("RGB", (8, 8)))
    return whole[:33] + (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + whole[33:]


def same_pixels(*sources: bytes | Image.Image) -> Provoke:
    def compare(here: Path, patch: pytest.MonkeyPatch) -> None:
        first, *others = (np.asarray(load_image(ImageRef(source))).astype(int) for source in sources)
        for other in others:
            assert other.shape == first.shape and np.abs(first - other).max() <= 3

    return compare


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    corners = Image.fromarray(np.arange(12 * 8 * 3, dtype=np.uint8).reshape(12, 8, 3))
    return encoded(corners if undo is None else corners.transpose(Image.Transpose(undo)), exif=exif)


def full_disk(here: Path, patch: pytest.MonkeyPatch) -> None:
    with environment("VLM2VEC_FAULT", "after-write:3:enospc"):
        start_run(light_recipe(here / "run", steps=3, every=1))


def vanished_cache(here: Path, patch: pytest.MonkeyPatch) -> None:
    with io.publishing(here / "cache" / "x") as staging:
        io.write_json(staging / "a.json", {})
        shutil.rmtree(here / "cache")
        io.write_json(staging / "b.json", {})


def held(here: Path, patch: pytest.MonkeyPatch) -> None:
    hold = f"from pathlib import Path; from vlm2vec import io\nwith io.run_lock(Path({str(here)!r})): print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        try:
            with io.run_lock(here):
                pass
        finally:
            holder.communicate("\n")


def suite(encoder: Compass, harm: Callable[[Path], object] = lambda root: None, **options: Any) -> Provoke:
    def score(here: Path, patch: pytest.MonkeyPatch) -> Any:
        found = write_suite(here / "suite", pencil_suite(here / "suite"))
        harm(here / "suite")
        return evaluate(encoder, found, here / "cache", **options).results

    return score


def collapsed(here: Path, patch: pytest.MonkeyPatch) -> None:
    warnings = suite(Constant())(here, patch)["warnings"]
    assert any("candidates within 1e-06: model collapsed?" in warning for warning in warnings)
