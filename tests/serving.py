"""A server on loopback for tests: a tiny model behind a gate, and clients that speak HTTP themselves."""

from __future__ import annotations

import base64
import http.client
import io
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vlm2vec import Encoder
from vlm2vec.address import bound
from vlm2vec.collate import Features
from vlm2vec.serve.app import Server
from vlm2vec.serve.asking import Served
from vlm2vec.serve.batcher import Batcher
from vlm2vec.serve.counts import Counts
from vlm2vec.serve.limits import Limits
from vlm2vec.serve.server import serve
from vlm2vec.signals import StopSignal

JSON = {"Content-Type": "application/json"}


@cache
def tiny() -> Encoder:
    encoder = Encoder.from_pretrained("builtin/tiny-qwen2_vl")
    encoder.query_instruction, encoder.target_instruction = "Find an image that matches:", "Describe:"
    return encoder


@dataclass
class Gated:
    """An encoder that waits for `gate`, notes the sizes of its batches, and fails where `fail` raises."""

    encoder: Encoder
    gate: threading.Event = field(default_factory=threading.Event)
    sizes: list[int] = field(default_factory=list)
    fail: Callable[[Features], None] = lambda features: None

    def __post_init__(self) -> None:
        self.gate.set()
        self.processor = self.encoder.processor

    def embed_features(self, window: Sequence[Features], chunk_tokens: int) -> Tensor:
        self.sizes.append(len(window))
        assert self.gate.wait(20)
        for features in window:
            self.fail(features)
        return self.encoder.embed_features(window, chunk_tokens)


@dataclass
class House:
    """A running server."""

    port: int
    model: Gated
    batcher: Batcher
    stop: StopSignal
    thread: threading.Thread

    def connect(self, timeout: float = 20) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def raw(self, data: bytes, timeout: float = 20) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout)
        sock.sendall(data)
        return sock

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, bytes, Any]:
        """Status, body and headers of an answer on a connection of its own."""
        connection = self.connect()
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers
        finally:
            connection.close()

    def embed(self, **fields: Any) -> tuple[int, Any]:
        status, body, _ = self.ask("POST", "/v1/embeddings", json.dumps(fields), JSON)
        return status, json.loads(body)

    def metric(self, line: str) -> float:
        page = self.ask("GET", "/metrics")[1].decode()
        found = [row.rpartition(" ")[2] for row in page.splitlines() if row.rpartition(" ")[0] == line]
        return float(found[0]) if found else 0.0


@contextmanager
def house(key: str = "", chunk_tokens: int = 32768, **limits: int) -> Iterator[House]:
    """A server for the block; it is told to stop at its end, and must have stopped."""
    model, kept, counts = Gated(tiny()), Limits(**limits), Counts()
    batcher = Batcher(model, kept, counts, chunk_tokens)  # type: ignore[arg-type]
    batcher.start()
    encoder = model.encoder
    served = Served("tiny", encoder.backbone.hidden_size, encoder.query_instruction, encoder.target_instruction)
    sock, stop = bound("127.0.0.1", 0), StopSignal()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that a client which reads nothing is noticed after few bytes
    app = Server(batcher, served, kept, counts, key).app()
    thread = threading.Thread(target=serve, args=(app, sock, kept, counts, stop))
    thread.start()
    found = House(sock.getsockname()[1], model, batcher, stop, thread)
    until(lambda: _listens(found.port))
    try:
        yield found
    finally:
        model.gate.set()
        stop.number = 15
        thread.join(20)
        batcher.close()
    assert not thread.is_alive()


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def until(true: Callable[[], Any], seconds: float = 15) -> None:
    """Wait until it is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came to be so"
        time.sleep(0.01)


def picture(number: int, size: tuple[int, int] = (40, 30), form: str = "PNG") -> bytes:
    image = Image.new("RGB", size, (number % 256, 120, 30))
    image.paste((20, number * 7 % 256, 200), (5, 5, 15, 25))
    held = io.BytesIO()
    image.save(held, form)
    return held.getvalue()


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def mixed(number: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Request `number` and what `encode` is given for the same: texts, pictures, both, lists, instructions, chats, short and long."""
    choice = random.Random(number)
    words = " ".join(choice.choice(["red", "car", "sky", "cat", "über", "猫", "<|image_1|>"]) for _ in range(choice.choice([1, 5, 40])))
    shown = picture(number, choice.choice([(40, 30), (64, 64), (30, 80)]), choice.choice(["PNG", "JPEG", "WEBP"]))
    kind = number % 6
    if kind == 0:
        return {"input": f"{number} {words}"}, [{"text": f"{number} {words}"}]
    if kind == 1:
        texts = [f"{words} {index}" for index in range(choice.randrange(1, 9))]
        return {"input": texts}, [{"text": text} for text in texts]
    if kind == 2:
        return {"input": [{"image": url(shown)}]}, [{"image": shown}]
    if kind == 3:
        item = {"text": words, "instruction": f"Find {number}:"}
        return {"input": [{**item, "image": url(shown)}, "beside"]}, [{**item, "image": shown}, {"text": "beside"}]
    if kind == 4:
        return {"input": [words, {"image": url(shown)}], "input_type": "query"}, [
            {"text": words, "instruction": tiny().query_instruction},
            {"image": shown, "instruction": tiny().query_instruction},
        ]
    content = [{"type": "image_url", "image_url": {"url": url(shown)}}, {"type": "text", "text": words}]
    return {"messages": [{"role": "user", "content": content}]}, [{"text": words, "image": shown}]


def rows_of(answer: Any) -> NDArray[np.float32]:
    """(N, D) from an answer, numbers or base64."""
    values = [row["embedding"] for row in answer["data"]]
    return np.stack([np.frombuffer(base64.b64decode(value), "<f4") if isinstance(value, str) else np.float32(value) for value in values])
