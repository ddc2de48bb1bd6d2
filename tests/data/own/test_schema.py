"""The one form of a row: any mix of what is right comes through, whatever is wrong is named with its key."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm2vec.data.own.schema import Side, read_row, said, side_key

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
words = text.filter(str.strip)
path = st.from_regex(r"[a-z]{1,5}\.png", fullmatch=True)
picture = path | st.fixed_dictionaries({"bytes": st.binary(min_size=1, max_size=3)}, optional={"path": path | st.none()})
pictures = picture | st.lists(picture, min_size=1, max_size=3)
instruction = {"instruction": text | st.none(), "id": text | st.integers() | st.none()}
item = (
    words
    | st.fixed_dictionaries({"text": words}, optional={"image": pictures | st.none(), **instruction})
    | st.fixed_dictionaries({"image": pictures}, optional={"text": text | st.none(), **instruction})
)
row = st.fixed_dictionaries(
    {"query": item, "positive": item | st.lists(item, min_size=1, max_size=3)},
    optional={
        "id": text | st.integers() | st.none(),
        "group": text | st.integers() | st.none(),
        "negatives": st.lists(item, max_size=3) | st.none(),
        "score": st.floats(1e-6, 1e6) | st.integers(1, 9) | st.none(),
    },
)

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | text | st.floats(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["text", "image", "path"]), inner),
    max_leaves=5,
)


def plain(given_item: Any) -> tuple[str, str, list[tuple[bytes | None, str]]]:
    """The oracle: an item as text, instruction, pictures."""
    entry = {"text": given_item} if isinstance(given_item, str) else given_item
    shown = entry.get("image") or []
    shown = shown if isinstance(shown, list) else [shown]
    pairs = [(None, each) if isinstance(each, str) else (each["bytes"], each.get("path") or "") for each in shown]
    return entry.get("text") or "", entry.get("instruction") or "", pairs


def form(side: Side) -> tuple[str, str, list[tuple[bytes | None, str]]]:
    return side["text"], side["instruction"], [(each["bytes"], each["path"]) for each in side["image"]]


@given(row)
@settings(max_examples=40, deadline=None)
def test_what_is_right_comes_through(values: dict[str, Any]) -> None:
    found, problems = read_row(values)
    assert found is not None and {problem.kind for problem in problems} <= {
        "query is its positive",
        "repeated positive",
        "positive is a negative",
    }
    positives = values["positive"] if isinstance(values["positive"], list) else [values["positive"]]
    assert form(found.query) == plain(values["query"])
    assert [form(side) for side in found.positives] == [plain(each) for each in positives]
    assert [form(side) for side in found.negatives] == [plain(each) for each in values.get("negatives") or []]
    assert found.score == (1.0 if values.get("score") is None else values["score"])
    assert [found.id, found.group] == ["" if values.get(key) is None else str(values[key]) for key in ("id", "group")]
    assert read_row({**dict.fromkeys(("id", "group", "negatives", "score")), **values})[0] == found  # null is absent, as in parquet


@given(item, item)
@settings(max_examples=50, deadline=None)
def test_keys_are_equal_for_equal_items_alone(first: Any, second: Any) -> None:
    sides = [read_row({"query": each, "positive": "x"})[0].query for each in (first, second)]  # type: ignore[union-attr]
    shown = [(side["text"], [each["bytes"] or each["path"] for each in side["image"]]) for side in sides]
    assert (said(sides[0]) == said(sides[1])) == (shown[0] == shown[1])
    same = [(side["instruction"], seen) for side, seen in zip(sides, shown, strict=True)]
    assert (side_key(sides[0]) == side_key(sides[1])) == (same[0] == same[1])


@given(st.dictionaries(st.sampled_from(["id", "query", "positive", "negatives", "score", "x"]), anything))
@settings(max_examples=60, deadline=None)
def test_anything_is_a_row_or_a_list_of_problems(values: dict[str, Any]) -> None:
    found, problems = read_row(values)
    assert found is not None or problems


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"query": None}, "missing key", "query: is missing"),
    ({"positive": []}, "missing key", "positive: is an empty list"),
    ({"positive": ["b", None]}, "missing key", "positive[1]: is missing"),
    ({"postive": "b"}, "unknown key", "unknown key 'postive'; did you mean 'positive'?"),
    ({"query": {"txt": "a", "text": "a"}}, "unknown key", "query: unknown key 'txt'; did you mean 'text'?"),
    ({"query": {"image": {"url": "u", "path": "p"}}}, "unknown key", "query.image: unknown key 'url'; known are bytes, path"),
    ({"query": 3}, "wrong type", "query: must be a text or an object with text, image, instruction, id, got a value of type int"),
    ({"query": {"text": ["a"]}}, "wrong type", "query.text: must be a string, got a list"),
    ({"query": {"text": "a", "id": True}}, "wrong type", "query.id: must be a string or a whole number, got true or false"),
    ({"query": {"image": ["a.png", 7]}}, "wrong type", "query.image[1]: must be a path, or an object of bytes"),
    ({"query": {"image": {"bytes": "text"}}}, "wrong type", "query.image: bytes must be those of a file"),
    ({"query": "\ud800"}, "wrong type", "query.text: is not valid UTF-8"),
    ({"negatives": [{"image": 1.5}]}, "wrong type", "negatives[0].image: must be a path"),
    ({"id": 1.5}, "wrong type", "id: must be a string or a whole number"),
    ({"score": "high"}, "wrong type", "score: must be a number, got a string"),
    ({"score": 0}, "score", "score: must be above 0"),
    ({"score": float("nan")}, "score", "score: must be above 0"),
    ({"score": 1e7}, "score", "score: must be above 0 and at most 1,000,000"),
    ({"query": " \n"}, "empty item", "query: has neither text nor image"),
    ({"query": {"text": "<|image_1|>\n"}}, "empty item", "query: has neither text nor image"),
    ({"query": {"image": [""]}}, "empty item", "query.image[0]: is an empty path"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_what_is_wrong_is_named_with_its_key(change: dict[str, Any], kind: str, message: str) -> None:
    found, problems = read_row({"query": "a", "positive": "b", **change})
    assert found is None and [problem.kind for problem in problems] == [kind]
    assert str(problems[0]).startswith(message)


def test_all_that_is_wrong_is_named() -> None:
    found, problems = read_row({"query": "", "positive": {"txt": "b", "text": "b"}, "score": -1, "id": []})
    assert found is None and [problem.key for problem in problems] == ["id", "query", "positive", "score"]


@pytest.mark.parametrize(
    ("row", "kind", "key"),
    [
        ({"query": "a", "positive": ["b", {"text": "a", "instruction": "Find:"}]}, "query is its positive", "positive[1]"),
        ({"query": "a", "positive": "b", "negatives": ["c", {"text": "b"}]}, "positive is a negative", "negatives[1]"),
        ({"query": "a", "positive": [{"image": "b.png"}, {"image": ["b.png"]}]}, "repeated positive", "positive"),
    ],
)
def test_what_cannot_be_meant_is_named_too(row: dict[str, Any], kind: str, key: str) -> None:
    found, problems = read_row(row)
    assert found is not None and [(problem.kind, problem.key) for problem in problems] == [(kind, key)]
