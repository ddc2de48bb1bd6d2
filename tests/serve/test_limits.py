"""What the documentation says of the limits is what they are."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from vlm2vec.cli import parse
from vlm2vec.serve.limits import Limits

DOCS = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")


def test_the_documented_limits_are_the_defaults() -> None:
    rows = re.findall(r"^\| `--([a-z-]+)` \| ([\d,]+) \|", DOCS, re.M)
    told = {name.replace("-", "_"): int(number.replace(",", "")) for name, number in rows}
    defaults = {f"max_{limit.name}": limit.default for limit in fields(Limits)}
    assert told == {**defaults, "chunk_tokens": parse(["serve", "MODEL"]).chunk_tokens}
