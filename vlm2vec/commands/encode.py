"""`vlm2vec encode`: items in, vectors out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vlm2vec.commands import say
from vlm2vec.errors import InputError

HELP = """Embed items into a safetensors file with one unit row each.

  vlm2vec encode runs/quickstart/model items.jsonl --to vectors.safetensors
Each line of items.jsonl is {"text": ..., "image": ..., "instruction": ...}; a picture's path is relative to that file."""


def arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    command.add_argument("model", help="a folder, a Hub id or builtin/<name>")
    command.add_argument("items", help="a JSONL file")
    command.add_argument("--to", required=True, help="the safetensors file to write")
    command.add_argument("--adapter", help="an adapter folder on top of the model")
    command.add_argument("--instruction", default="", help="instruction for items that bring none")
    command.add_argument("--workers", type=int, default=0, help="processes that decode pictures")


def run(given: argparse.Namespace) -> None:
    """Embed the items and write their vectors."""
    from safetensors.torch import save_file

    from vlm2vec.encoder import Encoder

    items = read_items(Path(given.items))
    encoder = Encoder.from_pretrained(given.model, given.adapter)
    rows = encoder.encode(items, instruction=given.instruction, workers=given.workers, progress=True)
    save_file({"embeddings": rows}, given.to)
    say(f"wrote {rows.shape[0]} rows of {rows.shape[1]} to {given.to}; row i belongs to line i + 1 of {given.items}")


def read_items(file: Path) -> list[Any]:
    """Items of a JSONL file, pictures resolved against its folder. Raises InputError naming the line."""
    from vlm2vec.encoder import as_item

    if not file.is_file():
        raise InputError(f"{file} not found")
    items = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
        try:
            row = json.loads(line)
            items.append(as_item(_anchored(row, file.parent)))
        except (json.JSONDecodeError, InputError) as error:
            raise InputError(f"{file}:{number}: {error}; found {line[:80]!r}") from error
    return items


def _anchored(row: Any, folder: Path) -> Any:
    if not isinstance(row, dict) or not row.get("image"):
        return row
    images = row["image"] if isinstance(row["image"], list) else [row["image"]]
    return {**row, "image": [folder / image if isinstance(image, str) else image for image in images]}
