"""HTML and SVG elements from Python values, escaped unless they are markup already."""

from __future__ import annotations

import html
import re
import unicodedata

VOID = frozenset({"img", "br", "wbr"})


class Markup(str):
    """Text that is HTML already; every other string is escaped on its way into an element."""


def clean(text: object) -> str:
    """The value as text a UTF-8 page can hold: control characters and lone surrogates become U+FFFD."""
    return "".join("\N{REPLACEMENT CHARACTER}" if _unfit(character) else character for character in str(text))


def _unfit(character: str) -> bool:
    return character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cs")


def escape(value: object) -> Markup:
    """The value as markup: itself when it is markup already, else cleaned and escaped."""
    return value if isinstance(value, Markup) else Markup(html.escape(clean(value)))


def join(*children: object) -> Markup:
    """Children one after the other; None is left out."""
    return Markup("".join(escape(child) for child in children if child is not None))


def el(name: str, *children: object, **attributes: object) -> Markup:
    """One element. An attribute of None is left out, True stands alone; `class_` and `aria_label` become `class` and `aria-label`."""
    opening = f"<{name}{''.join(_attribute(key, value) for key, value in attributes.items() if value is not None)}>"
    return Markup(opening if name in VOID else f"{opening}{join(*children)}</{name}>")


def breakable(name: object) -> Markup:
    """A name that may be broken between its words when a narrow screen has to: SameIcon|OtherFamily, visual_|genome."""
    return Markup("<wbr>".join(escape(part) for part in re.split(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[_/])", clean(name))))


def _attribute(key: str, value: object) -> str:
    key = key.rstrip("_").replace("_", "-")
    return f" {key}" if value is True else f' {key}="{html.escape(clean(value))}"'
