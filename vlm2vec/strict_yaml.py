"""YAML without surprises: a tree that knows the file and line of every key, built into dataclasses by their annotations.

Stricter than YAML 1.2 core: `5e-5` is a number, only `true` and `false` are booleans, `010`, `yes` and `12:30` are strings. Refused with
the line: duplicate keys, tags, anchors and aliases, a second document, tabs as indentation, more than 20 levels, more than 64 kB. Nothing
in a file is ever executed or imported: only the event stream of PyYAML is read, none of its constructors.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from vlm2vec.errors import RecipeError

MAX_BYTES = 64 * 1024
MAX_DEPTH = 20
MAX_INTEGER = 2**31 - 1

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan")
_CONSTANTS: dict[str, bool | None] = {"true": True, "false": False, "null": None, "~": None, "": None}
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_UNFIT = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # what escapes in a quoted string must not smuggle into paths and names
_NAMES = {bool: "true/false", int: "integer", float: "number", str: "string"}

Section = TypeVar("Section")


@dataclass(frozen=True)
class Node:
    """A scalar, a list of nodes or a dict of nodes, with its place as "file:line"; a node in a dict has the place of its key."""

    value: Any
    where: str


def plain(node: Node) -> Any:
    """The tree without its places: scalars, lists and dicts."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    return [plain(child) for child in node.value] if isinstance(node.value, list) else node.value


# ---------------------------------------------------------------------------------------------------------------- text to nodes


def parse(data: bytes, name: str, lines: bool = True) -> Node:
    """The one document in `data`; an empty one is a null. `name` is what errors call it; `lines=False` leaves the line out of places."""
    text = _decode(data, name)
    events = list(_events(text, name, lines))
    starts = [event for event in events if isinstance(event, yaml.DocumentStartEvent)]
    if len(starts) > 1:
        raise RecipeError(f"{_place(starts[1], name, lines)}: expected one document, found {len(starts)}")
    content = iter(event for event in events if isinstance(event, yaml.NodeEvent | yaml.CollectionEndEvent))
    first = next(content, None)
    return Node(None, name) if first is None else _node(first, content, name, lines)


def _decode(data: bytes, name: str) -> str:
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{name}: recipe too large (more than {MAX_BYTES // 1024} kB)")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{name}: byte {error.start} is not UTF-8") from None
    if (nul := data.find(0)) >= 0:
        raise RecipeError(f"{name}: byte {nul} is NUL; expected UTF-8 text")
    for number, line in enumerate(text.split("\n"), start=1):
        if line.lstrip(" ").startswith("\t"):
            raise RecipeError(f"{name}:{number}: tab used for indentation; use spaces")
        if control := _CONTROL.search(line):
            raise RecipeError(f"{name}:{number}: control character {control.group()!r}; expected text")
    return text


def _events(text: str, name: str, lines: bool) -> Iterator[yaml.Event]:
    """The events of `text`, lazily, so that a deep file is refused at level 21 and costs no more than that."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            place = _place(event, name, lines)
            if getattr(event, "anchor", None) is not None:  # aliases carry the name of their anchor
                raise RecipeError(f"{place}: anchors and aliases are not allowed, not even to nest; write the value out or use base:")
            if (tag := getattr(event, "tag", None)) is not None:
                raise RecipeError(f"{place}: tags are not allowed ({shorten(tag)}); nothing was executed")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise RecipeError(f"{place}: recipe too deep (more than {MAX_DEPTH} levels)")
            yield event
    except yaml.YAMLError as error:
        mark: Any = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if lines and mark else ""
        raise RecipeError(f"{name}{line}: not YAML: {getattr(error, 'problem', None) or error}") from None


def _place(event: Any, name: str, lines: bool) -> str:
    return f"{name}:{event.start_mark.line + 1}" if lines else name


def _node(event: yaml.Event, rest: Iterator[yaml.Event], name: str, lines: bool) -> Node:
    place = _place(event, name, lines)
    if isinstance(event, yaml.ScalarEvent):
        return Node(_scalar(event, place), place)
    if isinstance(event, yaml.SequenceStartEvent):
        return Node([_node(item, rest, name, lines) for item in _until_end(rest)], place)
    return Node(_mapping(rest, name, lines), place)


def _until_end(rest: Iterator[yaml.Event]) -> Iterator[yaml.Event]:
    """Events of one collection at its own level: the caller consumes what lies deeper before it asks for the next."""
    return iter(lambda: _open(next(rest)), None)


def _open(event: yaml.Event) -> yaml.Event | None:
    return None if isinstance(event, yaml.CollectionEndEvent) else event


def _mapping(rest: Iterator[yaml.Event], name: str, lines: bool) -> dict[str, Node]:
    entries: dict[str, Node] = {}
    for key in _until_end(rest):
        place = _place(key, name, lines)
        if not isinstance(key, yaml.ScalarEvent):
            raise RecipeError(f"{place}: a key must be a word, not a list or a mapping")
        if key.value in entries:
            first = entries[key.value].where.rpartition(":")[2]
            raise RecipeError(f"{place}: key {shorten(key.value)} given twice" + (f" (first at line {first})" if lines else ""))
        entries[key.value] = Node(_node(next(rest), rest, name, lines).value, place)
    return entries


def _scalar(event: yaml.ScalarEvent, place: str) -> bool | int | float | str | None:
    if _UNFIT.search(event.value):
        raise RecipeError(f"{place}: control character in {shorten(event.value)}")
    return resolve(event.value) if event.implicit[0] else event.value


def resolve(text: str) -> bool | int | float | str | None:
    """What a plain (unquoted) scalar means. A number too long for an integer becomes a float, hence a type error where it matters."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    return text


# ---------------------------------------------------------------------------------------------------------------- nodes to text


class _Dumper(yaml.SafeDumper):
    """Quotes every string that `resolve` would read as something else, by YAML 1.1 (`yes`) or by ours (`5e-5`)."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_string(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if resolve(text) == text else '"')


_Dumper.add_representer(str, _represent_string)
_Dumper.add_representer(tuple, lambda dumper, items: dumper.represent_list(items))


def dump_plain(tree: Any, flow: bool | None = False) -> str:
    """YAML text that `parse` reads back as the same values; keys keep their order, tuples become lists. `flow=True`: on one line."""
    text = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9, default_flow_style=flow)
    return text.removesuffix("...\n")


# ---------------------------------------------------------------------------------------------------------------- nodes to dataclasses


def build(kind: type[Section], node: Node, key: str = "") -> Section:
    """A dataclass from a mapping: unknown and missing keys and values of another type than annotated raise RecipeError with their place."""
    if not isinstance(node.value, dict):
        raise RecipeError(f"{node.where}: {key + ': ' if key else ''}expected a mapping, got {show(node)}")
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    for name, child in node.value.items():
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean {near}?" if near else f"known: {', '.join(known)}"
            raise RecipeError(f"{child.where}: unknown key {shorten(join(key, name), quote=False)}; {hint}")
    for name, field in known.items():
        if name not in node.value and field.default is MISSING:
            raise RecipeError(f"{node.where}: {join(key, name)} is required")
    types = get_type_hints(kind)
    return kind(**{name: _convert(child, types[name], join(key, name)) for name, child in node.value.items()})


def join(key: str, name: str) -> str:
    """The dotted path of `name` under `key`; the root has an empty path."""
    return f"{key}.{name}" if key else name


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is most likely a slip of."""
    return next(iter(difflib.get_close_matches(name[:100], known, n=1, cutoff=0.55)), None)


def _convert(node: Node, kind: Any, key: str) -> Any:
    choices = get_args(kind)
    if type(None) in choices:
        inner = [choice for choice in choices if choice is not type(None)]
        if node.value is None:
            return None
        fitting = [choice for choice in inner if len(inner) == 1 or node.value in get_args(choice) or type(node.value) is choice]
        return _convert(node, fitting[0], key) if fitting else _refuse(node, kind, key)
    if is_dataclass(kind):
        return build(kind, node, key)  # type: ignore[arg-type]
    if get_origin(kind) is tuple:
        return _convert_list(node, kind, key)
    if get_origin(kind) is Literal:
        return node.value if node.value in choices else _refuse(node, kind, key)
    if kind is float and type(node.value) is int:
        return float(node.value)
    if kind is int and type(node.value) is int and abs(node.value) > MAX_INTEGER:
        raise RecipeError(f"{node.where}: {key}: at most {MAX_INTEGER} in size, got {node.value}")
    return node.value if type(node.value) is kind else _refuse(node, kind, key)


def _convert_list(node: Node, kind: Any, key: str) -> tuple[Any, ...]:
    choices = get_args(kind)
    if not isinstance(node.value, list) or (choices[-1] is not Ellipsis and len(node.value) != len(choices)):
        _refuse(node, kind, key)
    return tuple(_convert(item, choices[0], f"{key}[{index}]") for index, item in enumerate(node.value))


def _refuse(node: Node, kind: Any, key: str) -> None:
    got = f'string "{node.value[:60]}"' if kind is bool and isinstance(node.value, str) else show(node)
    hint = "; put it in quotes" if kind is str and isinstance(node.value, bool | int | float) else ""
    raise RecipeError(f"{node.where}: {key}: expected {describe(kind)}, got {got}{hint}")


def describe(kind: Any) -> str:
    """An annotation in the words of a user."""
    choices = get_args(kind)
    if type(None) in choices:
        return " or ".join([describe(choice) for choice in choices if choice is not type(None)] + ["null"])
    if get_origin(kind) is Literal:
        return f"one of {', '.join(choices)}"
    if get_origin(kind) is tuple:
        inner = describe(choices[0]).removeprefix("one of ") + "s" * (get_origin(choices[0]) is not Literal)
        return f"list of {inner}" if choices[-1] is Ellipsis else f"list of {len(choices)} {inner}"
    return _NAMES.get(kind, "mapping")


def show(node: Node) -> str:
    """A value as a user would write it, short enough for a message."""
    if isinstance(node.value, list | dict):
        return "list" if isinstance(node.value, list) else "mapping"
    return shorten(node.value) if isinstance(node.value, str) else dump_plain(node.value, flow=True).strip()


def shorten(text: str, quote: bool = True) -> str:
    """At most 80 characters of `text`, control characters escaped."""
    clipped = repr(text if len(text) <= 80 else text[:77] + "...")
    return clipped if quote else clipped[1:-1]
