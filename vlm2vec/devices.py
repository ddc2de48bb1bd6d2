"""Devices that a run may be planned for, from the facts in `devices.yaml`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vlm2vec.errors import InputError
from vlm2vec.strict_yaml import nearest, parse, plain

TABLE = Path(__file__).with_suffix(".yaml")
ALIASES = {"a100": "a100-80g", "rtx4090": "4090"}


@dataclass(frozen=True, kw_only=True)
class Device:
    """One entry of the table; its head says what the fields mean and in which units."""

    name: str
    tflops: float
    tflops_fp32: float
    memory: float
    bandwidth: float
    link: float
    measured: float | None
    source: str

    def peak(self, precision: str) -> float:
        """Operations per second of matrix products."""
        return 1e12 * (self.tflops if precision == "bf16" else self.tflops_fp32)


@cache
def facts() -> dict[str, Any]:
    """The whole table."""
    return plain(parse(TABLE.read_bytes(), TABLE.name))


@cache
def devices() -> dict[str, Device]:
    """Every device by its short name."""
    return {name: Device(**entry) for name, entry in facts()["devices"].items()}


def find(words: str) -> tuple[Device, int]:
    """The device and how many of them `h200x8` or `l40s` means. Raises InputError."""
    found = re.fullmatch(r"(.+?)(?:x([1-9][0-9]{0,5}))?", words.lower())
    name, count = (found[1], int(found[2] or 1)) if found else (words, 1)
    name = ALIASES.get(name, name)
    if name not in devices():
        near = nearest(name, devices())
        hint = f"; did you mean {near}?" if near else ""
        raise InputError(f"--gpu {words}: no such device{hint} There are: {', '.join(devices())}, with x8 behind it for eight")
    return devices()[name], count
