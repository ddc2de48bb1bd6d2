"""What a request may say, and what is said where it may not: bytes in, items or a refusal out."""

from __future__ import annotations

import base64
import json
import time
from dataclasses import replace
from typing import Any

import pytest

from vlm2vec.data.types import ImageRef, Item
from vlm2vec.serve.asking import Served, parse
from vlm2vec.serve.limits import Limits
from vlm2vec.serve.refusal import Refusal

SERVED = Served("m", 8, query="Find:", document="Doc:")
LIMITS = Limits(items=3, pictures=2, characters=50)
FILE = b"the bytes of a file"
BARE = base64.b64encode(FILE).decode()
URL = "data:image/png;base64," + BARE


def asked(**fields: Any) -> Any:
    return parse(json.dumps(fields).encode(), SERVED, LIMITS)


def refused(body: bytes) -> Refusal:
    with pytest.raises(Refusal) as caught:
        parse(body, SERVED, LIMITS)
    return caught.value


@pytest.mark.parametrize(
    "fields, items",
    [
        ({"input": "a"}, [Item("a")]),
        ({"input": ["a", {"text": "b"}]}, [Item("a"), Item("b")]),
        ({"input": {"text": "b", "image": URL}}, [Item("b", (ImageRef(FILE),))]),
        ({"input": [{"image": [BARE, URL]}]}, [Item("", (ImageRef(FILE), ImageRef(FILE)))]),
        ({"input": [{"text": "b", "image": None, "instruction": None}]}, [Item("b")]),
        ({"input": ["a", {"text": "b", "instruction": "own"}], "instruction": "all"}, [Item("a", (), "all"), Item("b", (), "own")]),
        ({"input": "a", "input_type": "query"}, [Item("a", (), "Find:")]),
        ({"input": "a", "input_type": "document"}, [Item("a", (), "Doc:")]),
        ({"messages": [{"role": "user", "content": "a"}]}, [Item("a")]),
        ({"messages": [{"role": "system", "content": "Do:"}, {"role": "user", "content": "a"}]}, [Item("a", (), "Do:")]),
        (
            {
                "messages": [
                    {"role": "system", "content": [{"type": "text", "text": "Do:"}]},
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "a"},
                            {"type": "image_url", "image_url": {"url": URL}},
                            {"type": "text", "text": "b"},
                        ],
                    },
                ]
            },
            [Item("a\nb", (ImageRef(FILE),), "Do:")],
        ),
    ],
)
def test_every_form_of_an_item(fields: dict[str, Any], items: list[Item]) -> None:
    assert list(asked(**fields).items) == items


def test_the_other_keys() -> None:
    found = asked(input="a", model="m", dimensions=3, encoding_format="base64", user="who")
    assert (found.dims, found.base64) == (3, True)
    plain = asked(input=["a", "b"], model=None, dimensions=None, encoding_format=None, user=None, instruction=None, input_type=None)
    assert (plain.dims, plain.base64, plain.names) == (None, False, ("input[0]", "input[1]"))


# body as JSON -> status, param, words of the message
WRONG: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({}, 400, "input", "neither"),
    ({"input": "a", "messages": []}, 400, "input", "both"),
    ({"input": "a", "inptu": 1}, 400, "inptu", "did you mean input?"),
    ({"input": "a", "zzz": 1}, 400, "zzz", "the keys are input, messages"),
    ({"input": [{"text": "a", "url": 1}]}, 400, "input[0]", "the keys are text, image, instruction"),
    ({"input": "a", "model": "other"}, 404, "model", 'write "m"'),
    ({"input": "a", "model": ["m"]}, 404, "model", "a list"),
    ({"input": "a", "model": "m" * 1000}, 404, "model", "mmm..."),
    ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format", "float or base64"),
    ({"input": "a", "dimensions": 0}, 400, "dimensions", "1 to 8"),
    ({"input": "a", "dimensions": 9}, 400, "dimensions", "1 to 8"),
    ({"input": "a", "dimensions": True}, 400, "dimensions", "got true or false"),
    ({"input": "a", "dimensions": 2.0}, 400, "dimensions", "got 2.0"),
    ({"input": "a", "dimensions": 10**400}, 400, "dimensions", "got 1000"),
    ({"input": "a", "input_type": "passage"}, 400, "input_type", "query or document"),
    ({"input": "a", "input_type": "query", "instruction": "x"}, 400, "input_type", "not both"),
    ({"input": "a", "instruction": 3}, 400, "instruction", "a number"),
    ({"input": []}, 400, "input", "empty"),
    ({"input": ""}, 400, "input", "neither text nor picture"),
    ({"input": ["a", " \n"]}, 400, "input[1]", "neither text nor picture"),
    ({"input": [{"instruction": "only"}]}, 400, "input[0]", "neither text nor picture"),
    ({"input": [1, 2]}, 400, "input[0]", "token ids"),
    ({"input": [[1, 2]]}, 400, "input[0]", "token ids"),
    ({"input": [None]}, 400, "input[0]", "got null"),
    ({"input": [{"text": 1}]}, 400, "input[0].text", "a number"),
    ({"input": ["a"] * 4}, 413, "input", "at most 3"),
    ({"input": ["a" * 51]}, 413, "input[0]", "51 characters, at most 50"),
    ({"input": ["a" * 30], "instruction": "b" * 30}, 413, "input[0]", "60 characters"),
    ({"input": [{"image": [URL] * 3}]}, 413, "input[0]", "3 pictures, at most 2"),
    ({"input": [{"image": 5}]}, 400, "input[0].image", "a number"),
    ({"input": [{"image": {"url": URL}}]}, 400, "input[0].image", "an object"),
    ({"input": [{"image": "/etc/passwd"}]}, 400, "input[0].image", "names a place"),
    ({"input": [{"image": "../cat.png"}]}, 400, "input[0].image", "names a place"),
    ({"input": [{"image": "cat.png"}]}, 400, "input[0].image", "names a place"),
    ({"input": [{"image": "file:///etc/passwd"}]}, 400, "input[0].image", "names a place"),
    ({"input": [{"image": "http://127.0.0.1:1/cat.png"}]}, 400, "input[0].image", "nothing is fetched"),
    ({"input": [{"image": "\\\\host\\share"}]}, 400, "input[0].image", "names a place"),
    ({"input": [{"image": "data:text/html;base64," + BARE}]}, 400, "input[0].image", "not a picture in base64"),
    ({"input": [{"image": "data:image/png,plain"}]}, 400, "input[0].image", "not a picture in base64"),
    ({"input": [{"image": "data:image/png;base64,%%%"}]}, 400, "input[0].image", "not a picture in base64"),
    ({"input": [{"image": "A" * 5}]}, 400, "input[0].image", "not a picture in base64"),
    ({"input": [{"image": "é" * 8}]}, 400, "input[0].image", "not a picture in base64"),
    ({"messages": "a"}, 400, "messages", "a list"),
    ({"messages": []}, 400, "messages", "a list"),
    ({"messages": [1]}, 400, "messages", "messages[0]"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "messages", "one user message"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, 400, "messages", "one user message"),
    ({"messages": [{"role": "user", "content": "a"}] * 2}, 400, "messages", "one user message"),
    ({"messages": [{"role": "system", "content": "a"}, *[{"role": "user", "content": "a"}] * 2]}, 400, "messages", "one user message"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "messages", "messages[0].content"),
    ({"messages": [{"role": "user", "content": "a", "name": "x"}]}, 400, "messages[0]", "role, content"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "messages", "text or image_url"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "image_url"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "//h"}}]}]}, 400, "messages.image", "nothing"),
    (
        {
            "messages": [
                {"role": "system", "content": [{"type": "image_url", "image_url": {"url": URL}}]},
                {"role": "user", "content": "a"},
            ]
        },
        400,
        "messages",
        "text alone",
    ),
]


@pytest.mark.parametrize("fields, status, param, words", WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_named(fields: dict[str, Any], status: int, param: str | None, words: str) -> None:
    refusal = refused(json.dumps(fields).encode())
    assert (refusal.status, refusal.param) == (status, param), refusal.message
    assert words in refusal.message
    error = json.loads(refusal.body())["error"]
    assert error.keys() == {"message", "type", "param", "code"} and len(error["message"]) < 400


def test_an_instruction_for_all_items_counts_with_each() -> None:
    body = json.dumps({"input": ["a", "b", "c"], "instruction": "d" * 40}).encode()
    assert len(parse(body, SERVED, replace(LIMITS, body_bytes=123)).items) == 3
    with pytest.raises(Refusal, match="input: 123 characters with the instruction of every item, at most 122 fit") as caught:
        parse(body, SERVED, replace(LIMITS, body_bytes=122))
    assert (caught.value.status, caught.value.param) == (413, "input")


@pytest.mark.parametrize(
    "body, status, words",
    [
        (b"", 400, "not JSON"),
        (b'{"input": "a', 400, "not JSON"),
        (b'{"input": "a"} {}', 400, "not JSON"),
        (b"[]", 400, "expected an object, got a list"),
        (b"null", 400, "expected an object, got null"),
        (b'{"input": "a", "dimensions": NaN}', 400, "NaN is no JSON"),
        (b'{"input": "a", "dimensions": -Infinity}', 400, "-Infinity is no JSON"),
        (b'{"input": "a", "dimensions": 1e999}', 400, "1 to 8"),
        (b'{"input": "a", "dimensions": ' + b"9" * 5000 + b"}", 400, "can be read"),
        (b'{"input": "a", "input": "b"}', 400, '"input" is there twice'),
        (b'{"input": "\xff"}', 400, "not UTF-8: byte 11"),
        (b'\xef\xbb\xbf{"input": "a"}', 400, "not JSON"),
        (b"[" * 100_000, 400, "nested too deep"),
        (b'{"input":' * 100_000, 400, "nested too deep"),
        (b'{"input": "\x00"}', 400, "not JSON"),
        (b'{"input": [' + b"1," * 1_000_001 + b"1]}", 413, "commas"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_json(body: bytes, status: int, words: str) -> None:
    refusal = refused(body)
    assert refusal.status == status and words in refusal.message


def test_lone_surrogates_are_quoted_without_harm() -> None:
    refusal = refused(b'{"\\ud800": 1}')
    assert refusal.status == 400 and "\\ud800" in refusal.body().decode("ascii").replace("\\\\", "\\")


def test_many_keys_cost_no_more_than_their_number() -> None:
    body = json.dumps({f"k{number}": 1 for number in range(100_000)} | {"z": 1})[:-1] + ', "z": 2}'
    started = time.process_time()
    assert "twice" in refused(body.encode()).message
    assert time.process_time() - started < 2
