"""A prompt as texts, pictures and control tokens, and how its texts become token ids within a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain


@dataclass(frozen=True)
class Text:
    """A stretch of text: the item's own, which may be cut, or the format's."""

    words: str
    own: bool = True


Part = Text | int | tuple[int, ...]  # a text, the index of a picture, control tokens by id
Run = list[Text]  # texts that touch: they are tokenized as one string
Encode = Callable[[str], list[int]]


def gather(parts: Sequence[Part], margin: tuple[str, str]) -> list[Run | int | tuple[int, ...]]:
    """`parts` with the texts of `margin` on both sides of each picture, empty texts left out and those that touch in one run."""
    before, after = (Text(words, own=False) for words in margin)
    runs: list[Run | int | tuple[int, ...]] = []
    for part in chain.from_iterable((before, part, after) if isinstance(part, int) else (part,) for part in parts):
        if not isinstance(part, Text):
            runs.append(part)
        elif part.words and runs and isinstance(runs[-1], list):
            runs[-1].append(part)
        elif part.words:
            runs.append([part])
    return runs


def whole(runs: Sequence[Run], encode: Encode) -> list[list[int]]:
    """Token ids of each run."""
    return [encode("".join(text.words for text in run)) for run in runs]


def cut(runs: Sequence[Run], budget: int, encode: Encode) -> list[list[int]]:
    """Token ids of each run with `budget` tokens left of the item's own.

    Tokens go from the end, except the newlines that end a prompt: an embedding is often read from the last one.
    """
    texts = [text for run in runs for text in run]
    last = max(at for at, text in enumerate(texts) if text.own)
    body = texts[last].words.rstrip("\n")
    tail = _encode_newlines(len(texts[last].words) - len(body), encode)[:budget]
    room = budget - len(tail)
    ids: list[list[int]] = []
    for at, text in enumerate(texts):
        made = encode(body if at == last else text.words)
        if text.own:
            made = made[:room]
            room -= len(made)
        ids.append([*made, *tail] if at == last else made)
    pieces = iter(ids)
    return [list(chain.from_iterable(next(pieces) for _ in run)) for run in runs]


def _encode_newlines(count: int, encode: Encode) -> list[int]:
    """Ids of newlines at the end of a text; by themselves they would get the space that some tokenizers put in front of every text."""
    return encode("a" + "\n" * count)[len(encode("a")) :]
