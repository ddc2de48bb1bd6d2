"""The prompt that every backbone reads: exact strings for real MMEB rows, and the rules for placeholders."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm2vec import prompts
from vlm2vec.data.types import ImageRef, Item
from vlm2vec.prompts import PLACEHOLDER, placeholder, render, split


def item(text: str = "", pictures: int = 0, instruction: str = "") -> Item:
    return Item(text, tuple(ImageRef(bytes([index])) for index in range(pictures)), instruction)


# texts as they stand in MMEB: with their placeholder they are used as they are
VERBATIM = [
    "<|image_1|>\nRepresent the given image for classification\n",
    "<|image_1|>\nRepresent the given image with the following question: Is the value of Favorable 38 in 2015?\n",
    "<|image_1|>\nRepresent the given cropped image of the object",  # MSCOCO targets end without a newline
    "Represent <|image_1|> for classification.",  # diverse_instruction puts it anywhere
    "Identify the object\nshown in <|image_1|>\n",
]


@pytest.mark.parametrize("text", VERBATIM)
def test_text_with_its_placeholder_is_used_as_it_is(text: str) -> None:
    assert render(item(text, pictures=1)) == text


@pytest.mark.parametrize(
    "text",
    ["Theater", "Represent the given dialogue: Q:is this a child\nA:adult\n\n", "", " spaces kept ", "two\n\n"],
)
def test_text_alone_is_used_as_it_is(text: str) -> None:
    assert render(item(text)) == text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (item("a red apple", 1), "<|image_1|>\na red apple\n"),
        (item("", 1), "<|image_1|>\n"),
        (item("", 2), "<|image_1|>\n<|image_2|>\n"),
        (item("a cat", 0, "Find a picture of:"), "Find a picture of: a cat\n"),
        (item("a cat", 1, "Find a picture of:"), "<|image_1|>\nFind a picture of: a cat\n"),
        (item("", 1, "Represent the given image"), "<|image_1|>\nRepresent the given image\n"),
        (item("a cat", 0, "Describe: "), "Describe: a cat\n"),  # no second space
        (item("a cat\n", 1, "Describe:"), "<|image_1|>\nDescribe: a cat\n"),  # no second newline
        (item("<|image_1|> is a cat", 1, "True?"), "True? <|image_1|> is a cat\n"),
        (item("compare <|image_2|>", 2), "<|image_1|>\ncompare <|image_2|>"),  # the missing one is put in front
        (item("<|image_2|> and <|image_1|>", 2), "<|image_2|> and <|image_1|>"),
    ],
)
def test_render(given: Item, expected: str) -> None:
    assert render(given) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (item("<|image_1|>\nFind a Wikipedia image that answers: who?\n"), "Find a Wikipedia image that answers: who?\n"),
        (item("see <|image_1|> here"), "see  here"),
        (item("<|image_1|>\n<|image_2|>\nboth", 1), "<|image_1|>\nboth"),
        (item("<|image_1|>\ntwice <|image_1|>\nsame", 1), "<|image_1|>\ntwice same"),  # one picture is shown once
        (item("<|image_1|>"), ""),
        (item("<|image_0|> <|image_01|> <|image_x|>"), "<|image_0|> <|image_01|> <|image_x|>"),  # no placeholders, just text
    ],
)
def test_a_stray_placeholder_goes_with_its_newline(given: Item, expected: str) -> None:
    assert render(given) == expected


def test_a_stray_placeholder_can_be_kept_as_text() -> None:
    query = item("<|image_1|>\nFind a Wikipedia image: who?\n")
    assert render(query, keep_stray=True) == query.text
    assert split(query.text, 0) == [query.text]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (item(VERBATIM[0], 1), "Represent the given image for classification"),
        (item(VERBATIM[3], 1), "Represent  for classification."),
        (item("a dog", 1, "Find it:"), "Find it: a dog"),
        (item("<|image_1|>\nFind a picture: a dog\n"), "Find a picture: a dog"),
        (item("", 2), ""),
    ],
)
def test_words_are_the_prompt_without_its_pictures(given: Item, expected: str) -> None:
    assert prompts.words(given) == expected


def test_split_gives_text_and_picture_indices() -> None:
    assert split("<|image_1|>\nhello") == [0, "\nhello"]
    assert split("a<|image_2|><|image_1|>b") == ["a", 1, 0, "b"]
    assert split("") == []
    assert split("plain") == ["plain"]
    assert split("a<|image_1|>b<|image_1|>c") == ["a", 0, "b<|image_1|>c"]
    assert split("a<|image_1|>b<|image_2|>c", 1) == ["a", 0, "b<|image_2|>c"]


def test_placeholder_names() -> None:
    assert placeholder(0) == PLACEHOLDER
    assert split(placeholder(11)) == [11]


fragments = ["<|image_1|>", "<|image_2|>", "<|image_9|>", "<|image_", "1|>", "\n", "cat", " "]
words = st.lists(st.sampled_from(fragments), max_size=8).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=words, instruction=words, pictures=st.integers(0, 3), keep=st.booleans())
def test_every_picture_is_shown_exactly_once_whatever_the_text(text: str, instruction: str, pictures: int, keep: bool) -> None:
    pieces = split(render(item(text, pictures, instruction), keep), pictures)
    assert sorted(piece for piece in pieces if isinstance(piece, int)) == list(range(pictures))
