"""Corpora of a few rows, and an encoder whose rows are a function of what it was shown and of nothing else."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlm2vec import prompts
from vlm2vec.collate import Features
from vlm2vec.data.images import load_image
from vlm2vec.data.types import Item
from vlm2vec.vectors import iterate_vectors

DIMS = 24


class Hashing:
    """Embeds an item as a direction drawn from a hash of its prompt and the colours of its pictures."""

    source, precision = "hashing", "fp32"

    def __init__(self, name: str = "hashing") -> None:
        self.name, self.encoded = name, 0
        self.backbone = SimpleNamespace(hidden_size=DIMS)
        self.processor = SimpleNamespace(options=SimpleNamespace(prompt="raw", decode="exact", keep_stray=False), features=features)
        self.query_instruction = self.target_instruction = ""

    def fingerprint(self) -> str:
        return self.name

    def embed_features(self, window: Sequence[Features], chunk_tokens: int = 0) -> torch.Tensor:
        self.encoded += len(window)
        return torch.tensor(np.stack([self.row(each) for each in window]))

    def encode(self, items: Sequence[str | Item], instruction: str = "") -> torch.Tensor:
        made = [replace(Item(item) if isinstance(item, str) else item, instruction=instruction) for item in items]
        return torch.tensor(np.stack([self.row(features(prompts.render(item), list(map(load_image, item.images)))) for item in made]))

    def row(self, seen: Features) -> np.ndarray:
        shown = [seen.input_ids, *(image["pixel"] for image in seen.images)]
        seed = hashlib.sha256(self.name.encode() + b"".join(tensor.numpy().tobytes() for tensor in shown)).digest()
        row = np.random.default_rng(list(seed)).normal(size=DIMS)
        return (row / np.linalg.norm(row)).astype(np.float32)


def features(prompt: str, images: Sequence[Image.Image], instruction: str = "") -> Features:
    pixels = [{"pixel": torch.tensor(image.getpixel((0, 0)))} for image in images]
    return Features(torch.from_numpy(np.frombuffer(prompt.encode(), np.uint8).astype(np.int64)), pixels)


def expected(prompt: str, *colours: tuple[int, int, int], name: str = "hashing") -> np.ndarray:
    """The row that `Hashing` gives an item."""
    return Hashing(name).row(features(prompt, [Image.new("RGB", (1, 1), colour) for colour in colours]))


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), colour).save(buffer, "PNG")
    return buffer.getvalue()


def paint(file: Path, colour: tuple[int, int, int]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png(colour))
    return file


def jsonl(file: Path, rows: Sequence[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def texts(file: Path, count: int) -> Path:
    return jsonl(file, [{"text": f"text {index}", "id": f"t{index}"} for index in range(count)])


def content(folder: Path) -> dict[str, bytes]:
    """What a finished folder holds, less the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def rows_by_id(folder: Path) -> dict[str | int, np.ndarray]:
    return {each: row for ids, rows in iterate_vectors(folder, verify=True) for each, row in zip(ids, rows, strict=True)}
