"""A search as the page asks it: words, a picture, both, or an item of the index as its own query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from numpy.typing import NDArray

from vlm2vec.data.types import ImageRef, Item
from vlm2vec.errors import DataError, InputError
from vlm2vec.index import Hit, Index

LONGEST = 20_000  # characters of a text or an instruction
MOST = 200  # results on a page


class GoneError(DataError):
    """An item that an address names is not in the index, or not any more."""


@dataclass(frozen=True)
class Question:
    """What to look for. `like` is the place of an item, in the stead of words and picture; an instruction of None is the model's own."""

    text: str = ""
    picture: bytes | None = None
    like: str = ""
    instruction: str | None = None
    top: int | None = None

    @property
    def blank(self) -> bool:
        return not (self.text.strip() or self.picture or self.like)


@dataclass(frozen=True)
class Answer:
    """What was found, best first, `like` being the item that was asked with."""

    question: Question
    hits: Sequence[Hit]
    like: Hit | None = None


@dataclass
class Searcher:
    """An index with the encoder it was made with. Threads may share it: they take turns at the encoder."""

    index: Index
    encoder: Any
    top: int = 20
    approximately: bool = False
    _turn: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        self.model = self.index.meta["fingerprint"]

    @property
    def instruction(self) -> str:
        """The instruction of queries that bring none."""
        return str(self.encoder.query_instruction)

    def answer(self, question: Question) -> Answer:
        """The nearest items. Raises InputError for what cannot be asked, GoneError, and what reading the picture and the index raise."""
        top = self.top if question.top is None else question.top
        _check(question, top)
        if question.like:
            return self._alike(question, top)
        row_D = self._embed(question)
        found = self.index.search(row_D[None], top, self.approximately)[0]
        self._same_model()
        return Answer(question, found)

    def at(self, place: str) -> Hit:
        """The item at a place. Raises GoneError where there is none."""
        return self._at(place)[0]

    def sample(self, count: int) -> list[Hit]:
        """Some items to begin with."""
        return self.index.sample(count)

    def _alike(self, question: Question, top: int) -> Answer:
        """The items nearest to one of them, that one left out. Its row is there: nothing is encoded."""
        hit, row_D = self._at(question.like)
        found = self.index.search(row_D[None], top + 1, self.approximately)[0]
        return Answer(question, [each for each in found if each.number != hit.number][:top], hit)

    def _at(self, place: str) -> tuple[Hit, NDArray[Any]]:
        found = self.index.at(place)
        if found is None:
            raise GoneError("this item is not in the index any more, which has changed meanwhile: search again")
        return found

    def _embed(self, question: Question) -> NDArray[Any]:
        images = (ImageRef(question.picture, "the picture"),) if question.picture else ()
        with self._turn:
            return self.index.embed(self.encoder, [Item(question.text.strip(), images)], question.instruction)[0]

    def _same_model(self) -> None:
        if self.index.meta["fingerprint"] != self.model:
            raise InputError(f"{self.index.folder} was made anew with another model: stop vlm2vec ui and start it again")


def _check(question: Question, top: int) -> None:
    if question.blank:
        raise InputError("nothing to look for: type some words, or drop a picture")
    if not 1 <= top <= MOST:
        raise InputError(f"number of results: expected 1 to {MOST}, got {top:,}")
    for name, text in (("the text", question.text), ("the instruction", question.instruction or "")):
        if len(text) > LONGEST:
            raise InputError(f"{name} has {len(text):,} characters, at most {LONGEST:,} are read")
