"""Published embedding models and the settings that belong to them, from the table in `published.yaml`.

A checkpoint that was not saved by this library says neither how its embedding is read nor which positions or pixels it was trained with.
The table says it for those we know, and is found by the id on the Hub or by a local copy's folder: `owner/name`, or its place in a Hub
cache. Nothing is guessed from the weights: the same layout of tensors was trained with either kind of positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from vlm2vec.strict_yaml import Node, dump_plain, parse

TABLE = Path(__file__).with_suffix(".yaml")
CACHED = "models--"  # start of a repository's folder in a Hub cache: models--owner--name


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One entry of the table; the head of `published.yaml` says what the fields mean."""

    layout: Literal["adapter", "merged"]
    base: str
    family: str
    width: int
    model: dict[str, Any]
    temperature: float | None
    oracle: str | None
    note: str


@cache
def checkpoints() -> dict[str, Checkpoint]:
    """Every entry of the table by its id."""
    return {name: Checkpoint(**entry) for name, entry in _plain(parse(TABLE.read_bytes(), TABLE.name)).items()}


def _plain(node: Node) -> Any:
    if isinstance(node.value, dict):
        return {key: _plain(child) for key, child in node.value.items()}
    return node.value


def find(called: str) -> str | None:
    """The id in the table that a Hub id, a folder `.../owner/name` or a folder in a Hub cache stands for."""
    parts = Path(called).parts
    names = ["/".join(parts[-2:]), *(part.removeprefix(CACHED).replace("--", "/") for part in parts if part.startswith(CACHED))]
    return next((name for name in names if name in checkpoints()), None)


def settings(called: str) -> dict[str, Any]:
    """What an encoder of ours would have saved for the model that `called` names; empty for one that is not in the table."""
    name = find(called)
    if name is None:
        return {}
    entry = checkpoints()[name]
    base = {"path": entry.base, "revision": None} if entry.layout == "adapter" else None
    return {"model": entry.model, "base": base}


def _inline(values: dict[str, Any]) -> str:
    return dump_plain(values, flow=True).strip().removeprefix("{").removesuffix("}")


def page() -> str:
    """The table as Markdown, a section for each checkpoint."""
    return "\n".join(_section(name, entry) for name, entry in checkpoints().items())


def _section(name: str, entry: Checkpoint) -> str:
    made = f"LoRA adapter on {entry.base}" if entry.layout == "adapter" else f"whole weights, made from {entry.base}"
    checked = f"the outputs in `{entry.oracle}`" if entry.oracle else "nothing; settings read in its published code or a copy of it"
    lines = [
        f"## {name}\n",
        f"- {made}; model type `{entry.family}`; embeddings of {entry.width} numbers",
        f"- applied on loading: `{_inline(entry.model)}`",
        f"- temperature of its training: {entry.temperature or 'unknown'}",
        f"- checked against: {checked}",
        f"- {entry.note}",
    ]
    return "\n".join(lines) + "\n"
