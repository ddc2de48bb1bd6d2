"""The YAML reader: what plain words mean, what is refused and where, and that what is dumped is read back."""

from __future__ import annotations

import random

import pytest

from vlm2vec.errors import RecipeError
from vlm2vec.strict_yaml import Node, dump_plain, parse, resolve


def plain(node: Node) -> object:
    if isinstance(node.value, dict):
        return {name: plain(child) for name, child in node.value.items()}
    return [plain(child) for child in node.value] if isinstance(node.value, list) else node.value


def read(text: str) -> object:
    return plain(parse(text.encode(), "a.yaml"))


def refused(text: str | bytes) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(text if isinstance(text, bytes) else text.encode(), "a.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-5", 5e-5),
        ("1E-4", 1e-4),
        ("2.", 2.0),
        (".5", 0.5),
        ("-3", -3),
        ("0", 0),
        ("-.inf", float("-inf")),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
    ],
)
def test_plain_words_that_are_values(text: str, value: object) -> None:
    assert resolve(text) == value and type(resolve(text)) is type(value)


STRINGS = "yes no on off True FALSE 010 0x1f 0o17 12:30:45 1_000 2026-01-01 e5 1e . + nan"


@pytest.mark.parametrize("text", STRINGS.split())
def test_plain_words_that_stay_strings(text: str) -> None:
    assert resolve(text) == text and isinstance(resolve(text), str)


def test_nan_is_a_number() -> None:
    assert resolve(".nan") != resolve(".nan")


def test_a_very_long_number_is_no_integer_and_costs_nothing() -> None:
    assert resolve("9" * 60_000) == float("inf")


def test_quoted_words_are_strings_and_keys_are_never_converted() -> None:
    assert read("on: 'true'\n1: \"5\"\nnull: |\n  5") == {"on": "true", "1": "5", "null": "5"}


def test_nested_collections_in_both_styles() -> None:
    text = "a:\n  - {b: [1, 2.5], c: {}}\n  -\n    d: []\ne: x # comment\n"
    assert read(text) == {"a": [{"b": [1, 2.5], "c": {}}, {"d": []}], "e": "x"}


def test_every_node_knows_its_line() -> None:
    tree = parse(b"# head\na:\n  b: 1\n  c:\n    - x\n    - y\n", "a.yaml")
    inner = tree.value["a"].value
    assert (inner["b"].where, inner["c"].where, inner["c"].value[1].where) == ("a.yaml:3", "a.yaml:4", "a.yaml:6")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "a.yaml:3: key 'a' given twice (first at line 1)"),
        ("x:\n  lr: 1\n  lr: 1", "a.yaml:3: key 'lr' given twice (first at line 2)"),
        ("a:\n\tb: 1", "a.yaml:2: tab used for indentation"),
        ("a:\n  \tb: 1", "a.yaml:2: tab used for indentation"),
        ("a:\tb", "a.yaml:1: "),
        ("a: 1\nb: !!python/object/apply:os.system ['echo']", "a.yaml:2: tags are not allowed"),
        ("a: !local 1", "a.yaml:1: tags are not allowed"),
        ("! a", "a.yaml:1: tags are not allowed"),
        ("a: &x 1\nb: *x", "a.yaml:1: anchors and aliases are not allowed"),
        ("a: &x [*x]", "a.yaml:1: anchors and aliases are not allowed"),
        ("a: 1\n---\nb: 2\n---\n", "a.yaml:2: expected one document, found 3"),
        ("? [1, 2]\n: 3", "a.yaml:1: a key must be a word"),
        ("a: [1, 2", "a.yaml:1: not YAML: "),
        ("a: 'x", "a.yaml:1: not YAML: "),
        ("a: b: c", "a.yaml:1: not YAML: mapping values are not allowed here"),
        ("a: 1\n}", "a.yaml:2: not YAML: "),
        ("%YAML 3.0\n--- {}", "a.yaml:1: not YAML: "),
        ("[" * 21 + "]" * 21, "a.yaml:1: recipe too deep (more than 20 levels)"),
        ("[" * 60_000, "a.yaml:1: recipe too deep"),
        ("{a: " * 9_000, "a.yaml:1: recipe too deep"),
        ("- " * 9_000, "a.yaml:1: recipe too deep"),
        ("a: 1\n" * 20_000, "a.yaml: recipe too large (more than 64 kB)"),
        ("a: \x07", "a.yaml:1: control character '\\x07'"),
        ('a: "\\0"', "a.yaml:1: control character in '\\x00'"),
        ('a: "\\uD800"', "a.yaml:1: control character in '\\ud800'"),
        (b"a: 1\nb: \xff", "a.yaml: byte 8 is not UTF-8"),
        ("a: 1\n".encode("utf-16"), "a.yaml: byte 0 is not UTF-8"),
        (b"a: \x00", "a.yaml: byte 3 is NUL"),
    ],
)
def test_refused_with_the_line(text: str | bytes, message: str) -> None:
    assert refused(text).startswith(message)


def test_twenty_levels_are_read() -> None:
    assert read("[" * 20 + "]" * 20)


def test_a_byte_order_mark_and_windows_line_ends_are_read() -> None:
    assert read("\ufeffa: 1\r\nb:\r\n  - 2\r\n") == {"a": 1, "b": [2]}


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "\n\n"])
def test_an_empty_text_is_null(text: str) -> None:
    assert read(text) is None


def test_messages_stay_short() -> None:
    assert len(refused(f"{'k' * 5000}: 1\n{'k' * 5000}: 1")) < 200
    assert len(refused(f"a: !{'t' * 5000} 1")) < 200


WORDS = ["yes", "5e-5", "010", "null", "~", "", "true", "é", "12:30", "1.", "-", "'", '"', "[", "*a", "&a", "!t", "%", "=", "<<"]
WORDS += ["a: b", "# no", " x ", "\u2028", "a" * 200 + " b"]


def test_dump_is_read_back_whatever_the_strings_are() -> None:
    draw = random.Random(17)
    for _ in range(200):
        number = draw.uniform(-1, 1) * 10.0 ** draw.randint(-300, 300)
        tree = {draw.choice(WORDS): [draw.choice(WORDS), number, draw.choice([True, None, -7])]}
        assert read(dump_plain(tree)) == tree
        assert read(dump_plain(tree, flow=True)) == tree


def test_tuples_are_dumped_as_lists() -> None:
    assert read(dump_plain({"a": (1, 2), "b": (1, 2)})) == {"a": [1, 2], "b": [1, 2]}
