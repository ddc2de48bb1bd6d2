"""The whole server over a socket: answers equal to `encode`, and requests and clients of every bad kind that harm nobody."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect, Request

from tests.serving import JSON, House, house, mixed, picture, rows_of, tiny, until, url
from vlm2vec.serve.app import _unless_gone

ROUTE = "/v1/embeddings"


@pytest.fixture(scope="module")
def open_house() -> Iterator[House]:
    """Short of patience, so that tests are quick."""
    with house(head_seconds=1, body_seconds=1, read_seconds=1, body_bytes=1 << 20, connections=40) as found:
        yield found


@pytest.fixture(autouse=True)
def as_before(open_house: House, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever a test does, the next request is answered as ever, nothing stays in the house, and no word of a client is in the log."""
    caplog.set_level(logging.DEBUG)
    yield
    open_house.model.gate.set()
    status, answer = open_house.embed(input="a red car")
    assert status == 200
    np.testing.assert_allclose(rows_of(answer), tiny().encode(["a red car"]).numpy(), atol=1e-6, rtol=0)
    until(lambda: open_house.metric("vlm2vec_waiting_bytes") == 0 == open_house.metric("vlm2vec_waiting_items"))
    assert "secret" not in caplog.text and "Traceback" not in caplog.text


def many(served: House, first: int, count: int) -> list[NDArray[np.float32]]:
    """The rows of one client's requests, all on one connection."""
    connection, rows = served.connect(), []
    for number in range(first, first + count):
        fields, _ = mixed(number)
        as_base64 = {"encoding_format": "base64"} if number % 2 else {}
        connection.request("POST", ROUTE, json.dumps({**fields, **as_base64}), JSON)
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 200, body
        rows.append(rows_of(json.loads(body)))
    connection.close()
    return rows


@pytest.mark.parametrize("requests", [120, pytest.param(1000, marks=pytest.mark.slow)])
def test_eight_clients_at_once_get_what_encode_gives(open_house: House, requests: int) -> None:
    before = open_house.metric('vlm2vec_requests_total{route="/v1/embeddings",status="200"}')
    with ThreadPoolExecutor(8) as clients:
        found = clients.map(lambda client: many(open_house, client * requests // 8, requests // 8), range(8))
        rows = [row for each in found for row in each]
    expected = [mixed(number)[1] for number in range(requests)]
    assert list(map(len, rows)) == list(map(len, expected))
    np.testing.assert_allclose(np.concatenate(rows), tiny().encode(sum(expected, [])).numpy(), atol=1e-6, rtol=0)
    assert open_house.metric('vlm2vec_requests_total{route="/v1/embeddings",status="200"}') == before + requests
    assert max(open_house.model.sizes) > 8, "requests that wait together are embedded together"


def test_dimensions_and_usage(open_house: House) -> None:
    status, answer = open_house.embed(input=["a", "b c"], dimensions=5, model="tiny")
    whole = tiny().encode(["a", "b c"]).numpy()[:, :5]
    expected = whole / np.linalg.norm(whole.astype(np.float64), axis=1, keepdims=True)
    assert status == 200 and answer["model"] == "tiny"
    np.testing.assert_allclose(rows_of(answer), expected, atol=1e-6, rtol=0)
    tokens = sum(len(tiny().processor.features(text, [])) for text in ("a", "b c"))
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_numbers_or_base64_as_it_is_asked(open_house: House) -> None:
    kinds = [type(open_house.embed(input="a", encoding_format=form)[1]["data"][0]["embedding"]) for form in ("float", "base64")]
    assert kinds == [list, str]


def test_an_error_of_our_own_is_500_and_tells_nothing(open_house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("secret words")

    monkeypatch.setattr(open_house.batcher, "submit", broken)
    status, answer = open_house.embed(input="a")
    assert status == 500 and answer["error"]["code"] == "internal_error" and "secret" not in str(answer)


def test_no_http_is_answered_in_our_own_words(open_house: House) -> None:
    malformed = 'vlm2vec_connections_refused_total{reason="malformed"}'
    before = open_house.metric(malformed)
    with open_house.raw(b"nonsense\r\n\r\n") as sock:
        assert b'"code": "invalid_http"' in sock.recv(4096)
    assert open_house.metric(malformed) == before + 1


def test_what_is_sent_ahead_is_not_taken_in_without_end(open_house: House) -> None:
    sent = 0
    open_house.model.gate.clear()
    with open_house.raw(head("14") + b'{"input": "a"}', timeout=0.5) as sock, pytest.raises(TimeoutError):
        while sent < 40_000_000:
            sent += sock.send(bytes(100_000))
    assert 0 < sent < 40_000_000


def test_what_is_embedded_is_counted(open_house: House) -> None:
    names = ["vlm2vec_tokens_total", *(f'vlm2vec_items_total{{kind="{kind}"}}' for kind in ("text", "picture", "both"))]
    before = [open_house.metric(name) for name in names]
    shown = url(picture(1))
    _, answer = open_house.embed(input=["a", "b", "c", {"image": shown}, {"image": shown}, {"text": "d", "image": shown}])
    after = [open_house.metric(name) for name in names]
    assert [late - early for early, late in zip(before, after, strict=True)] == [answer["usage"]["total_tokens"], 3, 2, 1]


def test_models_health_and_metrics(open_house: House) -> None:
    model = json.loads(open_house.ask("GET", "/v1/models")[1])["data"][0]
    assert (model["id"], model["object"], model["dimensions"]) == ("tiny", "model", tiny().backbone.hidden_size)
    assert json.loads(open_house.ask("GET", "/health")[1])["status"] == "ok"
    open_house.batcher.healthy = False
    try:
        status, body, _ = open_house.ask("GET", "/health")
        assert status == 503 and json.loads(body)["status"] == "failing"
    finally:
        open_house.batcher.healthy = True
    headers = open_house.ask("GET", "/metrics")[2]
    assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def beside(kind: bytes, data: bytes) -> bytes:
    """A small PNG with one more chunk in it."""
    whole = picture(1)
    return whole[:33] + chunk(kind, data) + whole[33:]


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that says it is as large as this, and whose data go on for gigabytes."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100_000)) + chunk(b"IEND", b"")


def shown(data: bytes) -> bytes:
    return json.dumps({"input": [{"image": url(data)}]}).encode()


# name, body, headers beside JSON's, status, a word of the message
REFUSED: list[tuple[str, bytes, dict[str, str], int, str]] = [
    ("truncated", b'{"input": "secret', {}, 400, "not JSON"),
    ("nested", b'{"input":' + b"[" * 50_000, {}, 400, "nested too deep"),
    ("unknown key", b'{"input": "a", "secret": 1}', {}, 400, "unknown key"),
    ("10,000 items", json.dumps({"input": ["a"] * 10_000}).encode(), {}, 413, "10,000 items, at most 2,048"),
    ("too long", b'{"input": "' + b"a" * (1 << 20) + b'"}', {}, 413, "1,048,576 bytes"),
    ("bomb", shown(bomb(60_000, 60_000)), {}, 400, "at most 32,000,000"),
    ("bomb below the limit", shown(bomb(5_000, 5_000)), {}, 400, "truncated or damaged"),
    ("strip", shown(bomb(30_000, 10)), {}, 400, "longer than 200:1"),
    ("svg", shown(b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"), {}, 400, "looks like SVG"),
    ("html", shown(b"<!doctype html><script>secret</script>"), {}, 400, "looks like HTML"),
    ("path", b'{"input": [{"image": "/etc/passwd"}]}', {}, 400, "names a place"),
    ("surrogate", b'{"input": "a \\ud800"}', {}, 400, "lone surrogate"),
    ("no type", b'{"input": "a"}', {"Content-Type": ""}, 415, "Content-Type"),
    ("form", b"input=a", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "Content-Type"),
    ("page of a browser", b'{"input": "a"}', {"Content-Type": "text/plain"}, 415, "Content-Type"),
    ("gzip", zlib.compress(b'{"input": "a"}'), {"Content-Encoding": "gzip"}, 415, "compressed"),
    ("not UTF-8", b'{"input": "\xff"}', {}, 400, "UTF-8"),
    ("no number", b'{"input": "a", "dimensions": NaN}', {}, 400, "NaN is no JSON"),
    ("no end", b'{"input": "a", "dimensions": -Infinity}', {}, 400, "-Infinity is no JSON"),
    ("a key twice", b'{"input": "secret", "input": "b"}', {}, 400, '"input" is there twice'),
    ("a wrong type", b'{"input": {"text": ["secret"]}}', {}, 400, "input.text: expected a string, got a list"),
    ("long for all", json.dumps({"input": ["a"] * 2000, "instruction": "b" * 600}).encode(), {}, 413, "with the instruction of every item"),
    ("bomb of text", shown(beside(b"zTXt", b"k\0\0" + zlib.compress(bytes(30_000_000)))), {}, 400, "truncated or damaged"),
    ("bomb of a profile", shown(beside(b"iCCP", b"k\0\0" + zlib.compress(bytes(30_000_000)))), {}, 400, "truncated or damaged"),
]


@pytest.mark.parametrize("name, body, headers, status, words", REFUSED, ids=[case[0] for case in REFUSED])
def test_bad_requests_are_refused(open_house: House, name: str, body: bytes, headers: dict[str, str], status: int, words: str) -> None:
    found, answer, got = open_house.ask("POST", ROUTE, body, {**JSON, **headers})
    assert (found, got["content-type"]) == (status, "application/json")
    assert words in json.loads(answer)["error"]["message"]


def test_nothing_that_a_request_names_is_opened(open_house: House, tmp_path: Any) -> None:
    """A path and an address that exist: the file has a picture, and nobody calls at the address."""
    file = tmp_path / "cat.png"
    file.write_bytes(picture(1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.3)
        place = f"http://127.0.0.1:{listener.getsockname()[1]}/cat.png"
        for named in (str(file), f"file://{file}", place):
            status, answer = open_house.embed(input=[{"image": named}])
            assert status == 400 and "nothing is fetched or opened" in answer["error"]["message"]
            content = [{"type": "image_url", "image_url": {"url": named}}]
            assert open_house.embed(messages=[{"role": "user", "content": content}])[0] == 400
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.parametrize(
    "method, path, status, allow",
    [
        ("GET", ROUTE, 405, "POST"),
        ("OPTIONS", ROUTE, 405, "POST"),
        ("DELETE", "/health", 405, "GET, HEAD"),
        ("GET", "/v1/embeddings/", 404, None),
        ("GET", "/../../etc/passwd", 404, None),
        ("GET", "/%0d%0aset-cookie:%20a=b", 404, None),
        ("POST", "/v1/secret", 404, None),
    ],
)
def test_other_routes_and_methods(open_house: House, method: str, path: str, status: int, allow: str | None) -> None:
    found, body, headers = open_house.ask(method, path)
    assert found == status and json.loads(body)["error"]["message"].count("/v1/embeddings") == 1
    assert sorted((headers["allow"] or "").split(", ")) == sorted((allow or "").split(", ")) and headers["set-cookie"] is None
    assert "secret" not in open_house.ask("GET", "/metrics")[1].decode(), "paths of clients are no labels"


def head(length: str = "", more: str = "") -> bytes:
    size = f"Content-Length: {length}\r\n" if length else ""
    return f"POST {ROUTE} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n{size}{more}\r\n".encode("latin-1")


def reply(sock: socket.socket) -> tuple[int, float]:
    """Status of what comes before the other side closes (0 for nothing or a reset), and the seconds it took."""
    started, data = time.monotonic(), b""
    try:
        while piece := sock.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    sock.close()
    return int(data.split(b" ", 2)[1]) if data else 0, time.monotonic() - started


CHUNKED = "Transfer-Encoding: chunked\r\n"
# what a client sends before it falls silent -> the status it gets; the connection is closed in any case, within seconds
RAW: list[tuple[str, bytes, int]] = [
    ("nothing", b"", 0),
    ("half a head", b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nX-A: ", 408),
    ("half a body", head("100") + b'{"input": "a', 408),
    ("chunks without an end", head(more=CHUNKED) + b'5\r\n{"inp\r\n', 408),
    ("a chunk of no size", head(more=CHUNKED) + b"zz\r\n", 400),
    ("longer than it says", head("14") + b'{"input": "a"}' + b"GARBAGE\r\n\r\n", 200),
    ("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ("two lengths", head("5", "Content-Length: 6\r\n"), 400),
    ("a length below zero", head("-5"), 400),
    ("a huge length", head("9" * 19), 413),
    ("no length and no body", head(), 400),
    ("a huge head", b"GET /health HTTP/1.1\r\nHost: a\r\nX-A: " + b"a" * 200_000, 400),
    ("a line too many", b"GET /health HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n", 400),
    ("an upgrade", b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", 200),
    ("more chunks than fit", head(more=CHUNKED) + (b"40000\r\n" + b"a" * (1 << 18) + b"\r\n") * 5, 413),
    ("a chunk of all there is", head(more=CHUNKED) + b"f" * 16 + b"\r\nabc", 408),
    ("chunks and a length", head("5", CHUNKED) + b"0\r\n\r\n", 400),
    ("a length of 5,000 digits", head("9" * 5000), 400),
    ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 404),
    ("HTTP/0.9", b"GET /health\r\n\r\n", 400),
    ("a proxy's request", b"GET http://169.254.169.254/health HTTP/1.1\r\nHost: a\r\n\r\n", 404),
    ("a path of no characters", b"GET /%ff%00 HTTP/1.1\r\nHost: a\r\n\r\n", 404),
    ("a wish to be waited for", head("14", "Expect: 100-continue\r\n"), 100),
]


def test_clients_that_fall_silent_or_speak_no_http(open_house: House) -> None:
    """All at once, as they would be."""
    socks = [(name, open_house.raw(data), status) for name, data, status in RAW]
    with ThreadPoolExecutor(len(socks)) as pool:
        found = list(pool.map(lambda each: (each[0], each[2], *reply(each[1])), socks))
    for name, expected, status, seconds in found:
        assert status == expected or (name == "a huge head" and status == 0), name
        assert seconds < 6, name


def test_what_trickles_in_is_cut_off(open_house: House) -> None:
    """A byte now and then, also after an answer, and of a body: uvicorn's own timer starts anew with each."""

    def trickle(first: bytes) -> float:
        started = time.monotonic()
        with open_house.raw(first) as sock, pytest.raises(OSError):
            while time.monotonic() < started + 6:
                sock.sendall(b"a")
                time.sleep(0.1)
        return time.monotonic() - started

    with ThreadPoolExecutor(3) as pool:
        seconds = list(pool.map(trickle, (b"", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", head("1000"))))
    assert min(seconds) > 0.9 and max(seconds) < 5


def test_clients_that_leave_are_not_computed(open_house: House) -> None:
    """Gone, half gone, and gone after words of a next request, while the model is at work for somebody else."""
    model, gone = open_house.model, 'vlm2vec_requests_total{route="/v1/embeddings",status="499"}'
    before, batches = open_house.metric(gone), len(model.sizes)
    body = json.dumps({"input": ["left", "behind"]}).encode()
    model.gate.clear()
    stays = open_house.raw(head("16") + b'{"input":"stay"}')
    until(lambda: len(model.sizes) == batches + 1)
    leaves, halves, ahead = (open_house.raw(head(str(len(body))) + body) for _ in range(3))
    until(lambda: open_house.batcher.waiting == 1 + 3 * 2)
    ahead.sendall(b"GET /health HTTP/1.1\r\n")
    ahead.close()
    leaves.close()
    halves.shutdown(socket.SHUT_WR)
    until(lambda: open_house.metric(gone) == before + 3)
    assert open_house.batcher.waiting == 1, "dropped before they are counted as gone"
    model.gate.set()
    assert reply(stays)[0] == 200 and model.sizes[batches:] == [1]


def test_what_a_client_left_is_dropped_before_anything_else_happens() -> None:
    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def leave() -> bool:
        work: Future[Any] = Future()
        with pytest.raises(ClientDisconnect):
            await _unless_gone(Request({"type": "http"}, receive), work)
        return work.cancelled()

    assert asyncio.run(leave())


def test_a_client_that_never_reads_its_answer_is_cut_off(open_house: House) -> None:
    cut = 'vlm2vec_connections_refused_total{reason="slow_reader"}'
    before = open_house.metric(cut)
    body = json.dumps({"input": [f"text {number}" for number in range(600)]}).encode()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", open_house.port))
    sock.sendall(head(str(len(body))) + body)
    until(lambda: open_house.metric("vlm2vec_waiting_bytes") == 600 * tiny().backbone.hidden_size * 4)  # its rows, until they are sent
    until(lambda: open_house.metric(cut) == before + 1)
    sock.close()


def test_many_requests_at_once_whose_answers_nobody_reads(open_house: House) -> None:
    """What is sent ahead is not read before the answers are, and what waits to be sent stays small."""
    cut = 'vlm2vec_connections_refused_total{reason="slow_reader"}'
    before, sent = open_house.metric(cut), 0
    with open_house.raw(b"") as sock, pytest.raises(OSError):
        while sent < 50_000_000:
            sent += sock.send(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n" * 1000)
    assert sent < 50_000_000
    until(lambda: open_house.metric(cut) == before + 1)


def test_too_many_connections_and_room_for_all_again(open_house: House) -> None:
    idle = [open_house.raw(b"") for _ in range(60)]
    assert {reply(sock)[0] for sock in idle} == {0, 503}
    assert open_house.metric('vlm2vec_connections_refused_total{reason="full"}') >= 20
    assert open_house.ask("GET", "/health")[0] == 200


def test_bytes_in_the_house_are_bounded() -> None:
    with house(waiting_bytes=100_000, body_seconds=5) as served:
        half = served.raw(head("90000") + b" " * 80_000)
        until(lambda: served.metric("vlm2vec_waiting_bytes") == 80_000)
        status, body, headers = served.ask("POST", ROUTE, json.dumps({"input": "a " * 15_000}), JSON)
        assert (status, headers["retry-after"], json.loads(body)["error"]["type"]) == (429, "1", "rate_limit_error")
        assert served.embed(input="a")[0] == 200
        half.close()
        until(lambda: served.metric("vlm2vec_waiting_bytes") == 0)


def test_a_key_is_asked_for_where_one_is_set() -> None:
    with house(key="sesame") as served:
        for given, status in [(None, 401), ("Bearer wrong", 401), ("sesame", 401), ("Bearer sesame ", 200), ("Bearer sesame", 200)]:
            headers = {**JSON, **({"Authorization": given} if given else {})}
            found, body, got = served.ask("POST", ROUTE, b'{"input": "a"}', headers)
            assert found == status, given
            assert found == 200 or (got["www-authenticate"] == "Bearer" and b"sesame" not in body)
            assert served.ask("GET", "/v1/models", headers=headers)[0] == status
        assert served.ask("GET", "/health")[0] == served.ask("GET", "/metrics")[0] == 200


def test_a_stop_lets_requests_in_the_house_finish() -> None:
    with house() as served:
        served.model.gate.clear()
        with ThreadPoolExecutor(1) as pool:
            waits = pool.submit(served.embed, input="the last one")
            until(lambda: served.batcher.waiting == 1)
            served.stop.number = 15
            until(lambda: refuses(served))
            assert served.thread.is_alive()
            served.model.gate.set()
            status, answer = waits.result(20)
        assert status == 200
        np.testing.assert_allclose(rows_of(answer), tiny().encode(["the last one"]).numpy(), atol=1e-6, rtol=0)
        served.thread.join(10)
        assert not served.thread.is_alive()


def refuses(served: House) -> bool:
    try:
        served.connect(1).connect()
    except (ConnectionRefusedError, http.client.HTTPException):
        return True
    return False
