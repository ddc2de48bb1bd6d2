"""What the tasks share: the pictures of the collections, and candidates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vlm2vec.data.mini.chance import shuffled
from vlm2vec.data.mini.draw import Cell, Sheet
from vlm2vec.data.mini.rows import Example, Picture, Question, Side, TaskRows, gold_first, shown
from vlm2vec.data.mini.sources import Digit, Emoji, Icon, Photograph
from vlm2vec.data.mini.spec import SetSpec

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CELLS = 9  # cells of a sheet, three by three

Labelled = tuple[Picture, str]


def icon_picture(icon: Icon) -> Picture:
    return Picture(icon.family, icon.name, icon.drawing)


def openmoji_picture(emoji: Emoji) -> Picture:
    return Picture("OpenMoji", emoji.code, emoji.openmoji)


def twemoji_picture(emoji: Emoji) -> Picture:
    return Picture("Twemoji", emoji.code, emoji.twemoji)


def photograph_picture(photograph: Photograph) -> Picture:
    return Picture("Groceries", f"{photograph.row:04d}", photograph.drawing, "jpg")


def digit_picture(digit: Digit) -> Picture:
    return Picture("Digits", f"{digit.row:04d}", digit.drawing)


def cell_picture(picture: Picture, name: str) -> Picture:
    """The crop of a sheet that shows `picture`. MMEB's crops have the object's name in the file name, spaces and all."""
    return Picture(f"{picture.collection}Cells", f"{picture.name}_object_{name}", Cell(picture.drawing))


def sheet_picture(collection: str, number: int, pictures: Sequence[Picture | None]) -> Picture:
    """A sheet of three by three."""
    return Picture(collection, f"{number:04d}", Sheet(tuple(picture.drawing if picture else None for picture in pictures)))


def classification(spec: SetSpec, train: Sequence[Labelled], test: Sequence[Labelled], labels: Iterable[str]) -> TaskRows:
    """Pictures and their labels; every label is a candidate of every question."""
    candidates = [Side(label) for label in labels]
    return TaskRows(
        tuple(Example(shown(spec.instruction, picture), Side(label)) for picture, label in train[: spec.train]),
        tuple(Question(shown(spec.instruction, picture), gold_first(Side(label), candidates)) for picture, label in test[: spec.queries]),
    )


def sampled(spec: SetSpec, gold: Side, must: Sequence[Side], pool: Sequence[Side], *seed: object) -> tuple[Side, ...]:
    """The gold, what must be among the candidates, and as many of the pool as there is room for, in the order of the pool."""
    chosen = dict.fromkeys([gold, *must])
    common = list(dict.fromkeys(pool))
    shared = sorted(shuffled(range(len(common)), lambda number: number, spec.seed, spec.name)[: spec.pool])
    rest = [common[number] for number in shared if common[number] not in chosen]
    room = spec.candidates - len(chosen)
    if len(rest) > room:
        numbers = shuffled(range(len(rest)), lambda number: number, spec.seed, spec.name, *seed)[:room]
        rest = [rest[number] for number in sorted(numbers)]
    return gold_first(gold, [*list(chosen)[1:], *rest])
