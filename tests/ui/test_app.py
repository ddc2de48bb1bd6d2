"""The search page as a browser meets it: every route, what is found, what is refused, and an index that changes or breaks meanwhile."""

from __future__ import annotations

import asyncio
import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from starlette.testclient import TestClient

from tests.corpora import Hashing, jsonl, paint, png
from tests.pages import EVIL, EVIL_FILE, Tags
from vlm2vec.index import Hit, Index, build_index
from vlm2vec.ui import page, pictures
from vlm2vec.ui.app import app
from vlm2vec.ui.guard import HEADERS
from vlm2vec.ui.search import Answer, Question, Searcher

RED, GREEN = (220, 20, 20), (20, 220, 20)
JSON = {"accept": "application/json"}


def made(folder: Path) -> Path:
    """An index of two pictures, a text and an item that would like to be code."""
    paint(folder / "p" / "red.png", RED)
    paint(folder / "p" / "green.png", GREEN)
    rows: list[dict[str, Any]] = [{"image": "red.png", "id": "red"}, {"image": "green.png", "id": "green"}]
    rows += [{"text": "plain", "id": 7}, {"text": EVIL, "id": EVIL}]
    build_index(Hashing(), jsonl(folder / "p" / "items.jsonl", rows), folder / "i")
    return folder


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests that change nothing."""
    return made(tmp_path_factory.mktemp("still"))


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """One that a test may change."""
    return made(tmp_path)


def client(folder: Path, host: str = "127.0.0.1", encoder: Any = None) -> TestClient:
    searcher = Searcher(Index.open(folder), encoder or Hashing())
    return TestClient(app(searcher, host), base_url="http://127.0.0.1:7860", raise_server_exceptions=False)


@pytest.fixture
def browser(still: Path) -> Iterator[TestClient]:
    with client(still / "i") as opened:
        yield opened


@pytest.fixture
def own(here: Path) -> Iterator[TestClient]:
    with client(here / "i") as opened:
        yield opened


def found(browser: TestClient, **values: Any) -> list[dict[str, Any]]:
    answer = browser.get("/search", params=values, headers=JSON)
    assert answer.status_code == 200, answer.text
    return answer.json()["results"]


# -- searching ---------------------------------------------------------------------------------------------------------------------------


def test_the_page_says_what_it_is_and_how_to_begin(browser: TestClient) -> None:
    said = browser.get("/")
    assert said.status_code == 200 and "4 items" in said.text and "Or start from one of these" in said.text
    assert '<a href="/?text=plain" class="chip">plain</a>' in said.text, "texts of the index are the examples"
    for name in re.findall(r'/static/[\w.]+', said.text):
        assert browser.get(name).status_code == 200, name


def test_words_find_what_the_index_finds(browser: TestClient, still: Path) -> None:
    index = Index.open(still / "i")
    expected = index.search(index.embed(Hashing(), ["plain"]), 3)[0]
    results = found(browser, text=" plain ", top=3)
    assert [(each["id"], each["score"]) for each in results] == [(hit.id, hit.score) for hit in expected]
    assert results[0]["id"] == 7 and results[0]["score"] == pytest.approx(1, abs=1e-6)
    told = found(browser, text="plain", instruction="Find:")
    assert told[0]["score"] < 0.99 and len(told) == 4, "the instruction counts"


def test_the_instruction_is_the_models_own_unless_it_is_given(still: Path) -> None:
    encoder = Hashing()
    encoder.query_instruction = "Find:"
    with client(still / "i", encoder=encoder) as browser:
        assert 'name="instruction" value="Find:"' in browser.get("/").text
        assert found(browser, text="plain") == found(browser, text="plain", instruction="Find:")
        assert found(browser, text="plain", instruction="")[0]["id"] == 7, "an empty one is none"
        assert 'name="instruction" value=""' in browser.get("/", params={"text": "a", "instruction": ""}).text


def test_a_picture_with_and_without_words(browser: TestClient) -> None:
    sent = {"image": ("x.svg", png(GREEN), "image/svg+xml")}  # what the browser calls it does not count
    best = browser.post("/search", files=sent, headers=JSON).json()["results"][0]
    assert best["id"] == "green" and best["score"] == pytest.approx(1, abs=1e-6)
    both = browser.post("/search", files=sent, data={"text": "at night"}, headers=JSON).json()["results"]
    assert both[0]["score"] < 0.99
    whole = browser.post("/", files=sent, data={"text": "at night", "top": "2"})
    assert 'src="data:image/webp;base64,' in whole.text and 'value="at night"' in whole.text and whole.text.count("More like this") == 2


def test_more_like_one_leaves_it_out(browser: TestClient) -> None:
    first = found(browser, text="plain")[0]
    alike = found(browser, like=first["like"])
    assert len(alike) == 3 and 7 not in [each["id"] for each in alike] and found(browser, like=first["like"], top=2) == alike[:2]
    assert "to <em>7</em>" in browser.get("/", params={"like": first["like"]}).text


def test_a_search_in_html_is_a_part_and_the_form_a_whole(browser: TestClient) -> None:
    part, whole = (browser.get(path, params={"text": "plain", "top": 2}) for path in ("/search", "/"))
    assert part.text in whole.text and "<html" not in part.text and part.text.count("<li>") == 2
    assert 'value="plain"' in whole.text and 'value="2"' in whole.text
    assert re.findall(r">(\d+)\.<", part.text) == ["1", "2"]


def test_a_score_below_zero_has_a_bar_of_no_width() -> None:
    hits = [Hit(score, "a", 0, "", "", ()) for score in (-0.5, 0.25, 1.0000001)]
    assert re.findall('rect width="([^"]*)"', page.answered(Answer(Question("x"), hits))) == ["0.0%", "25.0%", "100.0%"]


def test_what_would_like_to_be_code_stays_text(browser: TestClient) -> None:
    asked: list[dict[str, str]] = [{"text": EVIL, "instruction": EVIL}, {}, {"top": EVIL}, {"like": EVIL}, {"text": EVIL, "like": EVIL}]
    for values in (*asked, {"like": found(browser, text=EVIL)[0]["like"]}):
        tags = Tags(browser.get("/", params=values).text)
        assert tags.active() == ["script"], "that of the page"
        assert "style" not in dict(tags.attributes)
    assert "alert(1)" in tags.words
    assert found(browser, text=EVIL)[0]["id"] == EVIL


def test_names_that_would_like_to_be_code(tmp_path: Path) -> None:
    """Of the index, of a folder in it and of a picture, which is its id."""
    paint(tmp_path / "p" / "on=1 ' \" <b>" / EVIL_FILE, RED)
    build_index(Hashing(), tmp_path / "p", tmp_path / EVIL_FILE)
    with client(tmp_path / EVIL_FILE) as browser:
        for values in ({}, {"text": "x"}, {"like": found(browser, text="x")[0]["like"]}):
            tags = Tags(browser.get("/", params=values).text)
            assert tags.active() == ["script"] and EVIL_FILE in tags.words
        assert browser.get(found(browser, text="x")[0]["pictures"][0]).headers["content-type"] == "image/png"


# -- pictures ----------------------------------------------------------------------------------------------------------------------------


def test_pictures_are_small_copies_or_the_file_itself(own: TestClient, here: Path) -> None:
    Image.new("RGB", (1000, 500), RED).save(here / "p" / "red.png")
    address = next(each for each in found(own, text="x") if each["id"] == "red")["pictures"][0]
    small = own.get(address, params={"size": 320})
    assert small.headers["content-type"] == "image/webp" and Image.open(io.BytesIO(small.content)).size == (320, 160)
    again = own.get(address, params={"size": 320}, headers={"if-none-match": small.headers["etag"]})
    assert again.status_code == 304 and not again.content
    whole = own.get(address)
    assert whole.headers["content-type"] == "image/png" and whole.content == (here / "p" / "red.png").read_bytes()
    Image.new("RGB", (400, 400), GREEN).save(here / "p" / "red.png")
    assert Image.open(io.BytesIO(own.get(address, params={"size": 320}).content)).size == (320, 320), "a new file, a new copy"


@pytest.mark.parametrize(
    ("content", "status", "kind"),
    [
        (b"<html><script>alert(1)</script>", 404, "text/plain"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 404, "text/plain"),
        (png(RED)[:40], 200, "image/png"),
        (None, 404, "text/plain"),
    ],
)
def test_no_file_is_served_as_anything_but_a_picture(
    own: TestClient, here: Path, content: bytes | None, status: int, kind: str
) -> None:
    address = next(each for each in found(own, text="x") if each["id"] == "red")["pictures"][0]
    (here / "p" / "red.png").unlink()
    if content is not None:
        (here / "p" / "red.png").write_bytes(content)
    answer = own.get(address)
    assert answer.status_code == status and answer.headers["content-type"].startswith(kind)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert own.get(address, params={"size": 160}).status_code == 404


def test_a_folder_in_the_place_of_a_picture(own: TestClient, here: Path) -> None:
    address = next(each for each in found(own, text="x") if each["id"] == "red")["pictures"][0]
    (here / "p" / "red.png").unlink()
    (here / "p" / "red.png").mkdir()
    assert own.get(address).status_code == own.get(address, params={"size": 160}).status_code == 404


def test_a_type_that_browsers_do_not_show_and_several_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), RED).save(tmp_path / "a.tif")
    paint(tmp_path / "b.png", GREEN)
    build_index(Hashing(), jsonl(tmp_path / "c.jsonl", [{"image": ["a.tif", "b.png"]}]), tmp_path / "i")
    with client(tmp_path / "i") as browser:
        first, second = found(browser, text="x")[0]["pictures"]
        answer = browser.get(first)
        assert answer.headers["content-type"] == "image/webp" and Image.open(io.BytesIO(answer.content)).size == (50, 40)
        assert browser.get(second).headers["content-type"] == "image/png" and "Open 2" in browser.get("/?text=x").text
        assert browser.get(first, params={"number": 2}).status_code == 404


def test_a_picture_inside_a_parquet_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [{"bytes": png(RED), "path": None}]}), tmp_path / "p.parquet")
    build_index(Hashing(), tmp_path / "p.parquet", tmp_path / "i")
    with client(tmp_path / "i") as browser:
        answer = browser.get(found(browser, text="x")[0]["pictures"][0], params={"size": 320})
        assert answer.headers["content-type"] == "image/webp" and Image.open(io.BytesIO(answer.content)).size == (6, 5)


@pytest.mark.parametrize(
    "place",
    [
        *("../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "red.png"),
        *("0", "x-1", "{}-99", "{}--1", "{}-1.0", "{}-\u0661"),
    ],
)
def test_an_address_is_a_place_in_the_index_and_nothing_else(browser: TestClient, place: str) -> None:
    numbering = found(browser, text="x")[0]["like"].partition("-")[0]
    answer = browser.get("/picture/" + place.format(numbering))
    assert answer.status_code == 404 and b"root:" not in answer.content
    assert browser.get("/static/" + place).status_code == 404


def test_small_copies_are_bounded(browser: TestClient) -> None:
    assert pictures._made.cache_info().maxsize == pictures.KEPT
    address = next(each for each in found(browser, text="x") if each["pictures"])["pictures"][0]
    for query in ("size=1", "size=99999", "size=-1", "size=x", "size=160&number=x"):
        assert browser.get(f"{address}?{query}").status_code == 400, query


# -- refusals ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "nothing to look for"),
        ({"text": "  "}, "nothing to look for"),
        ({"text": "x", "top": "0"}, "expected 1 to 200, got 0"),
        ({"text": "x", "top": "201"}, "expected 1 to 200, got 201"),
        ({"text": "x", "top": "ten"}, "expected a whole number, got 'ten'"),
        ({"text": "x", "top": "-1"}, "expected a whole number"),
        ({"text": "x" * 20_001}, "at most 20,000 are read"),
        ({"text": "x", "instruction": "x" * 20_001}, "the instruction has 20,001 characters"),
    ],
)
def test_what_cannot_be_asked_is_said(browser: TestClient, values: dict[str, str], message: str) -> None:
    answer = browser.get("/search", params=values)
    assert answer.status_code == 400 and 'role="alert"' in answer.text and message in answer.text.replace("&#x27;", "'")
    assert message in browser.get("/search", params=values, headers=JSON).json()["error"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"words", "the picture: not an image"), (b"<svg/>", "looks like SVG"), (png(RED)[:50], "truncated or damaged"), (b"%PDF-1.7", "PDF")],
)
def test_a_file_that_is_no_picture(browser: TestClient, content: bytes, message: str) -> None:
    answer = browser.post("/", files={"image": ("a.png", content, "image/png")})
    assert answer.status_code == 400 and message in answer.text


def test_too_many_pixels(browser: TestClient) -> None:
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    answer = browser.post("/search", files={"image": bomb.getvalue()})
    assert len(bomb.getvalue()) < 100_000 and answer.status_code == 400 and "64,000,000" in answer.text


def test_what_a_browser_that_has_gone_on_asked_is_not_computed(browser: TestClient) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/search", "headers": [(b"host", b"localhost")], "query_string": b"text=x"}
    asyncio.run(browser.app(scope, receive, send))
    assert sent[0]["status"] == 499


def test_too_many_bytes_are_not_even_read(browser: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "UPLOAD", 1_000_000)
    received = 0

    async def receive() -> dict[str, Any]:
        nonlocal received
        received += 1
        head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
        return {"type": "http.request", "body": head if received == 1 else bytes(100_000), "more_body": received < 1000}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; boundary=b")]
    scope = {"type": "http", "method": "POST", "path": "/search", "headers": headers, "query_string": b""}
    asyncio.run(browser.app(scope, receive, send))  # the client of the other tests would send the body as a whole
    assert sent[0]["status"] == 413 and b"at most 1 MB are read" in sent[1]["body"] and received < 20
    assert browser.post("/search", files={"image": png(RED)}).status_code == 200


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=b", "multipart/form-data", "application/json", "text/plain"])
def test_bodies_that_are_no_form(browser: TestClient, kind: str) -> None:
    assert browser.post("/search", content=b"\r\n--c\0{", headers={"content-type": kind}).status_code == 400


def test_too_many_fields_and_files(browser: TestClient) -> None:
    several = [("image", png(RED)), ("image", png(GREEN))]
    assert browser.post("/search", files=several).status_code == 400
    assert browser.post("/search", data={str(number): "x" for number in range(99)}).status_code == 400
    assert browser.post("/search", files={"image": png(RED)}, data={"text": "x" * 200_000}).status_code == 400


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH"])
def test_other_methods(browser: TestClient, method: str) -> None:
    answer = browser.request(method, "/search")
    assert answer.status_code == 405 and not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("host", "given", "status"),
    [
        ("127.0.0.1", "127.0.0.1:7860", 200),
        ("127.0.0.1", "localhost", 200),
        ("127.0.0.1", "LOCALHOST:1", 200),
        ("127.0.0.1", "[::1]:7860", 200),
        ("127.0.0.1", "evil.example", 403),
        ("127.0.0.1", "127.0.0.1.evil.example:7860", 403),
        ("127.0.0.1", "192.168.1.9:7860", 403),
        ("127.0.0.1", "", 403),
        ("box.lan", "box.lan:7860", 200),
        ("fe80::1", "[fe80::1]:7860", 200),
        ("0.0.0.0", "192.168.1.9:7860", 200),
        ("::", "[2001:db8::1]:7860", 200),
        ("0.0.0.0", "evil.example:7860", 403),
        ("0.0.0.0", "1.2.3.4.evil.example", 403),
    ],
)
def test_only_names_that_are_served_get_an_answer(still: Path, host: str, given: str, status: int) -> None:
    with client(still / "i", host) as browser:
        answer = browser.get("/search?text=x", headers={"host": given})
        assert answer.status_code == status and (status == 200) == ("plain" in answer.text)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}, 200),
        ({"sec-fetch-site": "none", "sec-fetch-mode": "navigate"}, 200),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}, 403),
    ],
)
def test_requests_from_other_sites(browser: TestClient, headers: dict[str, str], status: int) -> None:
    assert browser.get("/search?text=x", headers=headers).status_code == status
    if headers["sec-fetch-site"] == "cross-site":
        assert browser.post("/search", data={"text": "x"}, headers=headers).status_code == 403


@pytest.mark.parametrize("path", ["/", "/search?text=x", "/search", "/picture/x", "/static/ui.js", "/health", "/none"])
def test_every_answer_carries_the_headers(browser: TestClient, path: str) -> None:
    for answer in (browser.get(path), browser.get(path, headers={"host": "evil.example"})):
        assert HEADERS.items() <= dict(answer.headers).items()
    assert "unsafe" not in HEADERS["content-security-policy"]


# -- an index that changes ---------------------------------------------------------------------------------------------------------------


def test_what_the_index_takes_in_meanwhile_is_found(own: TestClient, here: Path) -> None:
    gone = next(each for each in found(own, text="x") if each["id"] == "red")
    rows = [{"image": "green.png", "id": "green"}, {"text": "new", "id": "new"}]
    build_index(Hashing(), jsonl(here / "p" / "items.jsonl", rows), here / "i")
    assert found(own, text="new")[0]["id"] == "new" and len(found(own, text="x")) == 2
    answer = own.get("/search", params={"like": gone["like"]})
    assert answer.status_code == 404 and "search again" in answer.text
    assert own.get(gone["pictures"][0]).status_code == 404
    assert own.get("/health").json() == {"status": "ok", "items": 2}


def test_a_folder_made_anew_gives_its_own_items_and_no_picture_by_an_old_address(own: TestClient, here: Path) -> None:
    old = found(own, text="x")[0]
    shutil.rmtree(here / "i")
    build_index(Hashing(), jsonl(here / "p" / "items.jsonl", [{"text": f"t{number}", "id": number} for number in range(4)]), here / "i")
    assert Index.open(here / "i").meta["version"] == 1, "the number alone would not tell"
    assert found(own, text="t3")[0]["score"] == pytest.approx(1, abs=1e-6)
    assert own.get("/search", params={"like": old["like"]}).status_code == 404


def test_a_folder_made_anew_with_another_model(own: TestClient, here: Path) -> None:
    shutil.rmtree(here / "i")
    build_index(Hashing("other"), here / "p" / "items.jsonl", here / "i")
    answer = own.get("/search", params={"text": "x"})
    assert answer.status_code == 400 and "start it again" in answer.text


def test_a_damaged_index(own: TestClient, here: Path) -> None:
    place = found(own, text="x")[0]["like"]
    (here / "i" / "index.sqlite").write_bytes(b"no database at all" * 100)
    for address in ("/?text=x", "/", "/search?text=x", f"/picture/{place}"):
        answer = own.get(address)
        assert answer.status_code == 500 and "make the index again" in answer.text and "Traceback" not in answer.text
    assert own.get("/health").status_code == 503


def test_an_index_that_is_gone_or_holds_nan(own: TestClient, here: Path) -> None:
    rows = np.memmap(here / "i" / "vectors-0.f32", "<f4", "r+")
    rows[3] = np.nan
    rows.flush()
    assert own.get("/search?text=x").status_code == 500
    shutil.rmtree(here / "i")
    assert own.get("/search?text=x").status_code == 503 and own.get("/health").status_code == 503


def test_an_index_of_nothing(here: Path) -> None:
    build_index(Hashing(), jsonl(here / "p" / "one.jsonl", [{"text": "x", "image": "gone.png"}]), here / "none", skip_bad=True)
    with client(here / "none") as browser:
        assert "no items yet" in browser.get("/").text and found(browser, text="x") == []
        assert "no items to show" in browser.get("/?text=x").text


def test_a_question_knows_that_it_is_blank() -> None:
    assert Question().blank and Question(" \n").blank and not Question(like="x").blank and not Question(picture=b"x").blank
