"""Rows before they are written: pictures by how they are drawn, sides, examples to learn from and questions to be scored on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from vlm2vec.data.mini.draw import Drawing
from vlm2vec.prompts import PLACEHOLDER


@dataclass(frozen=True)
class Picture:
    """A picture of the benchmark, known by its collection and name: whichever set shows it, it is the same."""

    collection: str
    name: str
    drawing: Drawing = field(compare=False)
    ending: str = field(default="png", compare=False)

    @cached_property
    def file(self) -> str:
        """File name in plain ASCII; MMEB's own have spaces in them too."""
        plain = re.sub(r"[^A-Za-z0-9 _.+-]", "", self.name)
        return f"{plain}.{self.ending}"


@dataclass(frozen=True)
class Side:
    """A query, a positive, a negative or a candidate."""

    text: str
    picture: Picture | None = None


@dataclass(frozen=True)
class Example:
    """A training row."""

    query: Side
    positive: Side
    negatives: tuple[Side, ...] = ()


@dataclass(frozen=True)
class Question:
    """An evaluation row; the gold is the first of `candidates`."""

    query: Side
    candidates: tuple[Side, ...]


@dataclass(frozen=True)
class TaskRows:
    """What a task makes of the sources."""

    train: tuple[Example, ...]
    questions: tuple[Question, ...]


def shown(instruction: str, picture: Picture, content: str = "") -> Side:
    """A query with a picture, in MMEB's form: placeholder, newline, instruction, content, newline."""
    return Side(f"{PLACEHOLDER}\n{_sentence(instruction, content)}\n", picture)


def written(instruction: str, content: str) -> Side:
    """A query of words alone."""
    return Side(f"{_sentence(instruction, content)}\n")


def target_picture(instruction: str, picture: Picture) -> Side:
    """A target that is a picture. What `instruction` ends with stays: MMEB's targets end with a newline, its crops do not."""
    return Side(f"{PLACEHOLDER}\n{instruction}", picture)


def _sentence(instruction: str, content: str) -> str:
    return f"{instruction} {content}" if content else instruction


def gold_first(gold: Side, others: Sequence[Side]) -> tuple[Side, ...]:
    """The candidates of a question: the gold, then the others in the order given, none twice."""
    return (gold, *(side for side in dict.fromkeys(others) if side != gold))
