"""Choices that are the same everywhere: from sha256, so that neither hash seed, version of Python nor order of files matters."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def rank(*parts: object) -> int:
    """A number in 0..2^64-1 that depends on the parts alone; equal parts give equal numbers."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode("utf-8")).digest()[:8], "big")


def shuffled(items: Iterable[T], key: Callable[[T], object], *seed: object) -> list[T]:
    """The items in an order that depends on `seed` and on each item's key, not on the order they came in. Keys must differ."""
    return sorted(items, key=lambda item: (rank(*seed, key(item)), str(key(item))))


def pick(items: Sequence[T], *seed: object) -> T:
    """One of the items."""
    return items[rank(*seed) % len(items)]


def balanced(items: Iterable[T], label: Callable[[T], Hashable], most: int) -> list[T]:
    """The first `most` items of each label, in the order given."""
    seen: dict[Hashable, int] = {}
    kept = []
    for item in items:
        group = label(item)
        seen[group] = seen.get(group, 0) + 1
        if seen[group] <= most:
            kept.append(item)
    return kept
