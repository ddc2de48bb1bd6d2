"""What a client may ask of the server, in one place: the options of the command are made of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _limit(default: int, meaning: str) -> Any:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Limits:
    """Each is a whole number of at least 1."""

    body_bytes: int = _limit(32 << 20, "bytes of a request")
    items: int = _limit(2048, "items of a request")
    pictures: int = _limit(8, "pictures of an item")
    characters: int = _limit(100_000, "characters of an item, its instruction included; of those the model reads its max_tokens")
    pixels: int = _limit(32_000_000, "width times height of a picture")
    waiting_items: int = _limit(4096, "items in the house, of all requests; beyond it the answer is 429")
    waiting_bytes: int = _limit(256 << 20, "bytes in the house, of all requests; beyond it the answer is 429")
    connections: int = _limit(256, "connections at a time; beyond it the answer is 503")
    head_seconds: int = _limit(10, "seconds for the head of a request, and between requests of a connection")
    body_seconds: int = _limit(60, "seconds for the body of a request")
    read_seconds: int = _limit(30, "seconds without a sign that a client takes its answer")
    stop_seconds: int = _limit(30, "seconds for requests in the house once the server was told to stop")
