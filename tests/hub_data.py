"""Repositories of a few rows and pictures in the layouts of MMEB's own, and a client that asks `tests.hub_server` for them."""

from __future__ import annotations

import io
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.hub_server import Hub
from vlm2vec import remote
from vlm2vec.data.fetch import Request, request_for

TOKEN = "hf_canary_never_to_be_seen"
EVAL, TRAIN = "TIGER-Lab/MMEB-eval", "TIGER-Lab/MMEB-train"
SETS = ("N24News", "VOC2007")
BIG = random.Random(5).randbytes(500_000)  # many pieces of a download


def parquet(columns: Mapping[str, list]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


def png(level: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def zipped(members: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as opened:
        for name, data in members.items():
            opened.writestr(zipfile.ZipInfo(name), data)  # a fixed date, so that equal members make equal archives
    return stream.getvalue()


def eval_files() -> dict[str, bytes]:
    """Two sets of two queries; the archive holds a picture more than the rows name, and what macOS adds."""
    files = {}
    for name in SETS:
        rows = {"qry_text": ["a", "b"], "qry_img_path": [f"{name}/0.png", f"{name}/1.png"], "tgt_text": [["x", "y"]] * 2}
        files[f"{name}/test-00000-of-00001.parquet"] = parquet(rows | {"tgt_img_path": [["", f"{name}/sub/2.png"]] * 2})
    pictures = {f"{name}/{path}": png(level) for name in SETS for level, path in enumerate(("0.png", "1.png", "sub/2.png", "9.png"))}
    return files | {"images.zip": zipped(pictures | {"__MACOSX/N24News/._0.png": b"fork"}), "README.md": b"words"}


def train_files() -> dict[str, bytes]:
    """Two sets with two splits, an archive each."""
    files = {}
    for name in SETS:
        path = f"images/{name}/Train/a b.png"
        rows = {"qry": ["q"], "qry_image_path": [path], "pos_text": ["p"], "pos_image_path": [""]}
        for split in ("original", "diverse_instruction", "train"):
            files[f"{name}/{split}-00000-of-00001.parquet"] = parquet(rows | {"qry": [split]})
        files[f"images_zip/{name}.zip"] = zipped({f"{name}/Train/a b.png": png(3), f"{name}/Train/._a b.png": b"fork"})
    return files


def below(folder: Path) -> dict[str, bytes]:
    """All files but those of the record."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in sorted(paths.items()) if not name.startswith(".fetch/")}


def connect(running: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", running.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(remote, "WAITS", (0, 0, 0))


def wanted(to: Path, *names: str, dataset: str = "mmeb-eval", **options: Any) -> Request:
    return request_for(dataset, to, names or SETS, **options)
