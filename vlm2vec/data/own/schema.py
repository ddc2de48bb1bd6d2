"""What a row of one's own data may hold, and the one form that it is brought into. Nothing is read here, no picture opened.

    {"id": "...", "group": "...", "query": ITEM, "positive": ITEM or [ITEM, ...], "negatives": [ITEM, ...], "score": 0.9}
    ITEM: "text" or {"text": "...", "image": PICTURE or [PICTURE, ...], "instruction": "...", "id": "..."}
    PICTURE: "path.jpg" or {"bytes": ..., "path": "..."}

Null stands for an absent key, as parquet has it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

from vlm2vec.data.items import is_id
from vlm2vec.prompts import MARK
from vlm2vec.strict_yaml import nearest

ROW_KEYS = ("id", "group", "query", "positive", "negatives", "score")
ITEM_KEYS = ("text", "image", "instruction", "id")
PICTURE_KEYS = ("bytes", "path")
LARGEST = 1e6  # score: the gain of a graded metric may be 2^score, which must stay a number


class Picture(TypedDict):
    """Encoded bytes, or None and the path of a file."""

    bytes: bytes | None
    path: str


class Side(TypedDict):
    """An item: "" for no text or instruction, an empty list for no picture."""

    text: str
    instruction: str
    image: list[Picture]


class Row(NamedTuple):
    """A row: "" for no id or group, at least one positive, a score of 1 where there is none."""

    id: str
    group: str
    query: Side
    positives: list[Side]
    negatives: list[Side]
    score: float

    def sides(self) -> Iterator[tuple[str, Side]]:
        """Every item with the key it stands under, such as "positive[1]"."""
        yield "query", self.query
        for key, sides in (("positive", self.positives), ("negatives", self.negatives)):
            for index, side in enumerate(sides):
                yield (key if key == "positive" and len(sides) == 1 else f"{key}[{index}]"), side


class Problem(NamedTuple):
    """What is wrong with a row, for people; `kind` is what such problems are counted as."""

    kind: str
    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.key}: {self.text}" if self.key else self.text


# -- rows --------------------------------------------------------------------------------------------------------------------------------


def read_row(values: Mapping[str, Any]) -> tuple[Row | None, list[Problem]]:
    """The row in its one form, and everything that is wrong with it; None where it cannot be had."""
    found = _Reader()
    found.unknown(values, ROW_KEYS, "")
    row = Row(
        id=found.identity(values, "id"),
        group=found.identity(values, "group"),
        query=found.item(values.get("query"), "query"),
        positives=found.positives(values.get("positive")),
        negatives=found.items(values.get("negatives"), "negatives"),
        score=found.score(values.get("score")),
    )
    if found.problems:
        return None, found.problems
    return row, list(_contradictions(row))


class _Reader:
    """Collects the problems of one row; what it returns in the place of something wrong is of no use."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def note(self, kind: str, key: str, text: str) -> None:
        self.problems.append(Problem(kind, key, text))

    def unknown(self, values: Mapping[str, Any], known: Sequence[str], key: str) -> None:
        for name in values:
            if name not in known:
                near = nearest(name, known)
                hint = f"did you mean {near!r}?" if near else f"known are {', '.join(known)}"
                self.note("unknown key", key, f"unknown key {name!r}; {hint}")

    def identity(self, values: Mapping[str, Any], key: str) -> str:
        value = values.get(key)
        if value is None or is_id(value):
            return self.utf8(str("" if value is None else value), key)
        self.note("wrong type", key, f"must be a string or a whole number, got {_called(value)}")
        return ""

    def utf8(self, text: str, key: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:
            self.note("wrong type", key, "is not valid UTF-8 (a lone surrogate)")
        return text

    def text(self, value: Any, key: str) -> str:
        if isinstance(value, str | None):
            return self.utf8(value or "", key)
        self.note("wrong type", key, f"must be a string, got {_called(value)}")
        return ""

    def score(self, value: Any) -> float:
        if value is None:
            return 1.0
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.note("wrong type", "score", f"must be a number, got {_called(value)}")
        elif not (math.isfinite(value) and 0 < value <= LARGEST):
            shown = f"must be above 0 and at most {LARGEST:,.0f}, got {value}"
            self.note("score", "score", f"{shown}; what does not answer the query belongs in negatives")
        else:
            return float(value)
        return 1.0

    def positives(self, value: Any) -> list[Side]:
        if value is None:
            return [self.item(None, "positive")]
        sides = self.items(value, "positive")
        if isinstance(value, list) and not value:
            self.note("missing key", "positive", "is an empty list; give at least one item")
        return sides

    def items(self, value: Any, key: str) -> list[Side]:
        """A list of items; a single one stands for a list of it, null for an empty one."""
        if value is None:
            return []
        if not isinstance(value, list):
            return [self.item(value, key)]
        return [self.item(entry, f"{key}[{index}]") for index, entry in enumerate(value)]

    def item(self, value: Any, key: str) -> Side:
        if value is None:
            self.note("missing key", key, "is missing")
        elif isinstance(value, str):
            return self.filled({"text": value}, key)
        elif isinstance(value, Mapping):
            self.unknown(value, ITEM_KEYS, key)
            self.identity({f"{key}.id": value.get("id")}, f"{key}.id")
            return self.filled(value, key)
        else:
            self.note("wrong type", key, f"must be a text or an object with {', '.join(ITEM_KEYS)}, got {_called(value)}")
        return Side(text="", instruction="", image=[])

    def filled(self, value: Mapping[str, Any], key: str) -> Side:
        before = len(self.problems)
        side = Side(
            text=self.text(value.get("text"), f"{key}.text"),
            instruction=self.text(value.get("instruction"), f"{key}.instruction"),
            image=self.pictures(value.get("image"), f"{key}.image"),
        )
        if not side["image"] and not MARK.sub("", side["text"]).strip() and len(self.problems) == before:
            self.note("empty item", key, "has neither text nor image")
        return side

    def pictures(self, value: Any, key: str) -> list[Picture]:
        entries = value if isinstance(value, list) else [] if value is None or value == "" else [value]
        return [self.picture(entry, f"{key}[{index}]" if isinstance(value, list) else key) for index, entry in enumerate(entries)]

    def picture(self, value: Any, key: str) -> Picture:
        if isinstance(value, str):
            value = {"path": value}
        if isinstance(value, bytes):
            value = {"bytes": value}
        if not isinstance(value, Mapping):
            self.note("wrong type", key, f"must be a path, or an object of bytes and path, got {_called(value)}")
            return Picture(bytes=None, path="")
        self.unknown(value, PICTURE_KEYS, key)
        encoded, path = value.get("bytes"), self.text(value.get("path"), key)
        if not isinstance(encoded, bytes | None):
            self.note("wrong type", key, f"bytes must be those of a file, as only parquet holds them; got {_called(encoded)}: give a path")
        elif not encoded and not path:
            self.note("empty item", key, "is an empty path")
        return Picture(bytes=encoded or None, path=path)


def _called(value: Any) -> str:
    return {"dict": "an object", "list": "a list", "NoneType": "null", "str": "a string", "bool": "true or false"}.get(
        type(value).__name__, f"a value of type {type(value).__name__}"
    )


def _contradictions(row: Row) -> Iterator[Problem]:
    """What a row says that cannot be meant; instructions take no part, as they say what to do with an item."""
    query = said(row.query)
    positives = {said(side): key for key, side in row.sides() if key.startswith("positive")}
    if query in positives:
        yield Problem("query is its positive", positives[query], "says the same as the query")
    if len(positives) < len(row.positives):
        yield Problem("repeated positive", "positive", f"{len(row.positives)} items, of which {len(positives)} differ")
    for index, side in enumerate(row.negatives):
        if said(side) in positives:
            yield Problem("positive is a negative", f"negatives[{index}]", f"says the same as {positives[said(side)]}")


# -- identity ----------------------------------------------------------------------------------------------------------------------------


def said(side: Side) -> str:
    """What an item shows, by path where a picture is a file: equal for items that differ at most in their instruction."""
    return fingerprint([side["text"], *map(picture_key, side["image"])])


def side_key(side: Side) -> str:
    """Identity of an item, instruction included."""
    return fingerprint([side["instruction"], said(side)])


def picture_key(picture: Picture) -> str:
    """Identity of a picture: its bytes, or its path."""
    return hashlib.blake2b(picture["bytes"], digest_size=16).hexdigest() if picture["bytes"] else f"path:{picture['path']}"


def fingerprint(parts: Iterable[str]) -> str:
    """16 hexadecimal digits that depend on the parts and their order."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode()
        state.update(len(data).to_bytes(8, "big") + data)
    return state.hexdigest()
