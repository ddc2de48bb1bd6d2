"""From the bytes of a request to items: pure functions, and the only place that knows what a client may write.

A picture is what a request holds, as base64, and never what it names: nothing here opens a file or a connection.
"""

from __future__ import annotations

import base64
import difflib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from vlm2vec.data.types import ImageRef, Item
from vlm2vec.serve.limits import Limits
from vlm2vec.serve.refusal import Refusal

KEYS = ("input", "messages", "model", "encoding_format", "dimensions", "instruction", "input_type", "user")
ITEM_KEYS = ("text", "image", "instruction")
VALUES = 1_000_000  # commas of a body, those inside texts too: what bounds the Python objects that parsing makes
DATA_URL = re.compile(r"data:image/[\w.+-]{1,40};base64,", re.IGNORECASE | re.ASCII)
NAMES_A_PLACE = re.compile(r"[a-z][a-z0-9+.-]{0,20}:|[./\\~]|.*\.\w{3,5}$", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Served:
    """What a request is held against: the name of the model, D numbers of its embeddings, the instructions it was saved with."""

    name: str
    dims: int
    query: str = ""
    document: str = ""


@dataclass(frozen=True)
class Asked:
    """A request: its items, what errors call each, how many numbers are wanted of an embedding (None for all) and whether as base64."""

    items: tuple[Item, ...]
    names: tuple[str, ...]
    dims: int | None
    base64: bool


def parse(body: bytes | bytearray, served: Served, limits: Limits) -> Asked:
    """Read a request strictly. Raises Refusal with what is wrong, where, and what to do about it."""
    fields = _object(_json(body), "the body", None)
    fields = {key: value for key, value in fields.items() if value is not None}
    _known(fields, KEYS, "")
    if fields.get("model", served.name) != served.name:
        asked = _short(fields["model"])
        raise Refusal(404, f"model {asked} is not served here; write {json.dumps(served.name)} or leave it out", "model", "model_not_found")
    form = _choice(fields, "encoding_format", ("float", "base64"))
    instruction = _instruction(fields, served)
    named = _named_items(fields)
    if len(named) > limits.items:
        said = f"input: {len(named):,} items, at most {limits.items:,} fit into a request; send several requests"
        raise Refusal(413, said, "input", "too_many_items")
    items = tuple(_item(value, name, instruction, limits) for name, value in named)
    _check_characters(items, limits)
    return Asked(items, tuple(name for name, _ in named), _dimensions(fields, served), form == "base64")


# -- JSON ------------------------------------------------------------------------------------------------------------------------------


def _json(body: bytes | bytearray) -> Any:
    if body.count(b",") > VALUES:
        raise Refusal(413, f"the body has more than {VALUES:,} commas; send several requests", code="too_many_values")
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_no_number, object_pairs_hook=_distinct)
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8: byte {error.start} cannot be read", code="invalid_utf8") from None
    except json.JSONDecodeError as error:
        raise Refusal(400, f"the body is not JSON: {error.msg} at character {error.pos}", code="invalid_json") from None
    except RecursionError:
        raise Refusal(400, "the body is nested too deep; a request has at most five levels", code="invalid_json") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise Refusal(400, f"the body is not JSON that can be read: {str(error)[:80]}", code="invalid_json") from None


def _no_number(name: str) -> NoReturn:
    raise Refusal(400, f"the body is not JSON: {name} is no JSON number", code="invalid_json")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise Refusal(400, f"key {_short(twice)} is there twice; keep one", code="invalid_json")
    return found


def _short(value: Any) -> str:
    """A value as an error quotes it: the beginning of a string, a number, or else what kind it is."""
    if isinstance(value, str):
        return json.dumps(value if len(value) <= 60 else value[:57] + "...")
    return str(value)[:60] if type(value) in (int, float) else _kind(value)


# -- keys ------------------------------------------------------------------------------------------------------------------------------


def _object(value: Any, what: str, param: str | None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refusal(400, f"{what}: expected an object, got {_kind(value)}", param)
    return value


def _kind(value: Any) -> str:
    kinds = {type(None): "null", bool: "true or false", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def _known(fields: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in fields:
        if key not in keys:
            near = difflib.get_close_matches(key[:60], keys, 1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(keys)}"
            said = f"{where}{': ' if where else ''}unknown key {_short(key)}; {hint}"
            raise Refusal(400, said, where or key[:60], "unknown_key")


def _text(fields: Mapping[str, Any], key: str, name: str) -> str:
    value = fields.get(key)
    if value is not None and not isinstance(value, str):
        raise Refusal(400, f"{name}: expected a string, got {_kind(value)}", name)
    return value or ""


def _choice(fields: Mapping[str, Any], key: str, choices: tuple[str, ...]) -> str | None:
    value = fields.get(key)
    if value is not None and value not in choices:
        raise Refusal(400, f"{key}: expected {' or '.join(choices)}, got {_short(value)}", key)
    return value


def _dimensions(fields: Mapping[str, Any], served: Served) -> int | None:
    value = fields.get("dimensions")
    if value is not None and (type(value) is not int or not 1 <= value <= served.dims):
        said = f"dimensions: expected 1 to {served.dims}, the size of this model's embeddings, got {_short(value)}"
        raise Refusal(400, said, "dimensions")
    return value


def _instruction(fields: Mapping[str, Any], served: Served) -> str:
    """What items are given that bring none."""
    role = _choice(fields, "input_type", ("query", "document"))
    if role and "instruction" in fields:
        said = "input_type stands for an instruction that the model was saved with; give it or instruction, not both"
        raise Refusal(400, said, "input_type")
    if role == "query":
        return served.query
    return served.document if role else _text(fields, "instruction", "instruction")


# -- items -----------------------------------------------------------------------------------------------------------------------------


def _named_items(fields: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The items as objects of text, image and instruction, each with what errors call it."""
    if ("input" in fields) == ("messages" in fields):
        given = "both" if "input" in fields else "neither"
        raise Refusal(400, f"give input (texts or items) or messages (one item as a chat); {given} is there", "input")
    if "messages" in fields:
        return [("messages", _chat(fields["messages"]))]
    given = fields["input"]
    if not isinstance(given, list):
        return [("input", _plain(given, "input"))]
    if not given:
        raise Refusal(400, "input is an empty list; give at least one text or item", "input")
    return [(f"input[{index}]", _plain(value, f"input[{index}]")) for index, value in enumerate(given)]


def _plain(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, dict):
        _known(value, ITEM_KEYS, name)
        return value
    hint = "; token ids are not read, send the text" if type(value) is int or isinstance(value, list) else ""
    raise Refusal(400, f"{name}: expected a string or an object of text, image, instruction, got {_kind(value)}{hint}", name)


def _item(fields: Mapping[str, Any], name: str, instruction: str, limits: Limits) -> Item:
    text, own = _text(fields, "text", f"{name}.text"), _text(fields, "instruction", f"{name}.instruction")
    given = fields.get("image")
    pictures = given if isinstance(given, list) else [] if given is None else [given]
    if len(pictures) > limits.pictures:
        said = f"{name}.image: {len(pictures):,} pictures, at most {limits.pictures} fit into an item"
        raise Refusal(413, said, name, "too_many_pictures")
    images = tuple(ImageRef(_picture(value, f"{name}.image"), f"image {index + 1}") for index, value in enumerate(pictures))
    if not text.strip() and not images:
        raise Refusal(400, f"{name}: there is neither text nor picture in it", name)
    item = Item(text, images, own or instruction)
    if len(item.text) + len(item.instruction) > limits.characters:
        found = len(item.text) + len(item.instruction)
        raise Refusal(413, f"{name}: {found:,} characters, at most {limits.characters:,} fit into an item", name, "too_many_characters")
    return item


def _check_characters(items: Sequence[Item], limits: Limits) -> None:
    """A body bounds its texts but not what an instruction comes to that it says once for all items."""
    found = sum(len(item.text) + len(item.instruction) for item in items)
    if found > limits.body_bytes:
        said = f"input: {found:,} characters with the instruction of every item, at most {limits.body_bytes:,} fit into a request"
        raise Refusal(413, f"{said}; send fewer items, or a shorter instruction", "input", "too_many_characters")


def _picture(value: Any, name: str) -> bytes:
    """The encoded file of a picture from a data: URL or bare base64."""
    if not isinstance(value, str):
        raise Refusal(400, f"{name}: expected a data: URL or base64, got {_kind(value)}", name)
    head = DATA_URL.match(value)
    try:
        return base64.b64decode(value[head.end() :] if head else value, validate=True)
    except ValueError:  # binascii.Error is one
        place = NAMES_A_PLACE.match(value[:200]) and value[:5].lower() != "data:"
    what = "names a place, and nothing is fetched or opened for a request" if place else "is not a picture in base64"
    raise Refusal(400, f"{name}: {_short(value)} {what}; send the file's bytes as data:image/png;base64,... or as base64 alone", name)


# -- chats -----------------------------------------------------------------------------------------------------------------------------


def _chat(messages: Any) -> dict[str, Any]:
    """One item from a chat: the texts and pictures of a user message, and a system message before it as the instruction.

    Texts are joined by newlines; pictures keep their order among themselves and stand where an item's pictures stand.
    """
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, "messages: expected a list with a user message", "messages")
    found = [_message(message, f"messages[{index}]") for index, message in enumerate(messages[:3])]
    roles = [role for role, _, _ in found]
    if roles not in (["user"], ["system", "user"]):
        raise Refusal(400, "messages: expected one user message, or a system and a user message; several items go into input", "messages")
    system = found[0] if len(found) == 2 else ("system", "", [])
    if system[2]:
        raise Refusal(400, "messages[0].content: the system message is the instruction and holds text alone", "messages")
    return {"text": found[-1][1], "image": found[-1][2], "instruction": system[1]}


def _message(message: Any, name: str) -> tuple[str, str, list[Any]]:
    """Role, text and pictures."""
    fields = _object(message, name, "messages")
    _known(fields, ("role", "content"), name)
    content = fields.get("content")
    if isinstance(content, str):
        return fields.get("role", ""), content, []
    if not isinstance(content, list):
        raise Refusal(400, f"{name}.content: expected a string or a list of parts, got {_kind(content)}", "messages")
    texts, pictures = list[str](), list[Any]()
    for index, part in enumerate(content):
        where = f"{name}.content[{index}]"
        part = _object(part, where, "messages")
        if part.get("type") == "text":
            texts.append(_text(part, "text", f"{where}.text"))
        elif part.get("type") == "image_url":
            pictures.append(_object(part.get("image_url"), f"{where}.image_url", "messages").get("url"))
        else:
            raise Refusal(400, f"{where}.type: expected text or image_url, got {_short(part.get('type'))}", "messages")
    return fields.get("role", ""), "\n".join(texts), pictures
