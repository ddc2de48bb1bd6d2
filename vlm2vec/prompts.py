"""From an item to the neutral prompt that every backbone reads, and from a prompt to its pieces.

A neutral prompt marks the place of a picture with `<|image_1|>`, `<|image_2|>`, ... (the placeholders of MMEB); a backbone expands
each into its own image tokens. A placeholder stands for a picture the first time it occurs, and only when the item has that picture:
any other is stray.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm2vec.data.types import Item

PLACEHOLDER = "<|image_1|>"
VERSION = 1  # part of the cache key of an embedding: raise it whenever `render` changes what it returns

MARK = re.compile(r"<\|image_([1-9][0-9]{0,3})\|>")  # any placeholder; readers that look for strays in bulk use the pattern


def placeholder(index: int) -> str:
    """The mark of picture `index`, counted from 0: `<|image_1|>` is picture 0."""
    return f"<|image_{index + 1}|>"


def render(item: Item, keep_stray: bool = False) -> str:
    """The neutral prompt of an item.

    Text that holds the placeholders of its pictures is used as it is. Otherwise each picture gets a line of its own in front, the
    instruction and the text follow, and a prompt with a picture or an instruction ends with a newline. Pictures without a placeholder are
    put in front in any case. A stray placeholder goes, with the newline after it (raw WebQA and EDIS rows carry one); `keep_stray` leaves
    it as plain text.
    """
    gap = "" if not item.instruction or not item.text or item.instruction[-1].isspace() else " "
    words = f"{item.instruction}{gap}{item.text}"
    shown = {piece for piece in split(words, len(item.images)) if isinstance(piece, int)}
    front = "".join(f"{placeholder(index)}\n" for index in range(len(item.images)) if index not in shown)
    if not keep_stray:
        words = _without_strays(words, len(item.images))
    prompt = front + words
    complete = not item.instruction and (shown or not item.images)
    return prompt if complete or prompt.endswith("\n") else prompt + "\n"


def words(item: Item) -> str:
    """The prompt for a reader who is shown the pictures beside it: without placeholders, and without space around it."""
    return "".join(piece for piece in split(render(item)) if isinstance(piece, str)).strip()


def split(prompt: str, pictures: int | None = None) -> list[str | int]:
    """The pieces of a prompt in order: non-empty text, and for each placeholder the index of its picture, counted from 0.

    Placeholders of a picture beyond `pictures`, and repeats of one, stay part of the text; with `pictures` None there is no bound.
    """
    pieces: list[str | int] = []
    start = 0
    seen: set[int] = set()
    for mark in MARK.finditer(prompt):
        index = int(mark[1]) - 1
        if index in seen or (pictures is not None and index >= pictures):
            continue
        seen.add(index)
        pieces += [prompt[start : mark.start()], index]
        start = mark.end()
    pieces.append(prompt[start:])
    return [piece for piece in pieces if piece != ""]


def _without_strays(words: str, pictures: int) -> str:
    pieces = split(words, pictures)
    return "".join(placeholder(piece) if isinstance(piece, int) else re.sub(MARK.pattern + "\n?", "", piece) for piece in pieces)
