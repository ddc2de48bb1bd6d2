"""Visual grounding: a sheet of pictures and words that say which of them is meant; the candidates are crops of this sheet and of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlm2vec.data.mini.chance import shuffled
from vlm2vec.data.mini.rows import Example, Picture, Question, Side, TaskRows, shown, target_picture
from vlm2vec.data.mini.sources import Emoji
from vlm2vec.data.mini.spec import SetSpec
from vlm2vec.data.mini.tasks.common import CELLS, cell_picture, icon_picture, openmoji_picture, sampled, sheet_picture
from vlm2vec.data.mini.world import World

PLACES = (
    "in the top left corner",
    "at the top in the middle",
    "in the top right corner",
    "on the left in the middle",
    "in the centre",
    "on the right in the middle",
    "in the bottom left corner",
    "at the bottom in the middle",
    "in the bottom right corner",
)
TRAIN_SHEETS, TEST_SHEETS = 500, 125
SHEET_ICONS = 270  # held-out icons that are on sheets
NEGATIVES = 2  # other cells of a training row's sheet that are named as negatives


@dataclass(frozen=True)
class Thing:
    """Something on a sheet: what it is called, and whether it may be asked for by name."""

    name: str
    picture: Picture
    readable: bool = True


@dataclass(frozen=True)
class SheetOf:
    """A sheet and what is on it, cell by cell."""

    picture: Picture
    things: tuple[Thing, ...]


def emoji_by_name(world: World, spec: SetSpec) -> TaskRows:
    """A sheet of emoji and the name of one of them."""
    return _rows(spec, _emoji_sheets(world), _by_name)


def emoji_by_place(world: World, spec: SetSpec) -> TaskRows:
    """The same sheets and a place on them."""
    return _rows(spec, _emoji_sheets(world), _by_place)


def icons_by_name(world: World, spec: SetSpec) -> TaskRows:
    """A sheet of icons and the name of one of them."""
    chosen = shuffled(world.icons.test, lambda icon: icon.name, spec.seed, spec.name)[:SHEET_ICONS]
    things = [Thing(icon.text, icon_picture(icon)) for icon in chosen]
    return _rows(spec, ([], _sheets("IconSheets", things, TEST_SHEETS)), _by_name)


def _emoji_sheets(world: World) -> tuple[list[SheetOf], list[SheetOf]]:
    """Sheets for training and for evaluation; only what has a readable name is asked for."""
    train = _things(world.emoji.train, True)
    test = _things(world.emoji.test, True) + _things(world.unread, False)
    return _sheets("EmojiSheets", train, TRAIN_SHEETS), _sheets("EmojiSheets", test, TEST_SHEETS)


def _things(emoji: list[Emoji], readable: bool) -> list[Thing]:
    return [Thing(one.name, openmoji_picture(one), readable) for one in emoji]


def _sheets(collection: str, things: list[Thing], count: int) -> list[SheetOf]:
    """Sheets of nine different things, each thing on about as many sheets as any other."""
    rounds = -(-count * CELLS // len(things))
    order = [thing for turn in range(rounds) for thing in shuffled(things, lambda thing: thing.picture.name, collection, turn)]
    sheets = []
    for number in range(count):
        on_it = tuple(dict.fromkeys(order[number * CELLS : (number + 2) * CELLS]))[:CELLS]
        sheets.append(SheetOf(sheet_picture(collection, number, [thing.picture for thing in on_it]), on_it))
    return sheets


# -- what is asked -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A sheet, the words that mean one of its cells, and the cell."""

    sheet: SheetOf
    words: str
    cell: int


def _by_name(sheet: SheetOf) -> list[Asked]:
    return [Asked(sheet, f'"{thing.name}"', cell) for cell, thing in enumerate(sheet.things) if thing.readable]


def _by_place(sheet: SheetOf) -> list[Asked]:
    return [Asked(sheet, place, cell) for cell, place in enumerate(PLACES)]


def _rows(spec: SetSpec, sheets: tuple[list[SheetOf], list[SheetOf]], ask: Callable[[SheetOf], list[Asked]]) -> TaskRows:
    train, test = sheets
    pool = [_crop(thing, spec) for thing in dict.fromkeys(thing for sheet in test for thing in sheet.things)]
    return TaskRows(
        tuple(_example(asked, spec) for asked in _spread(train, ask, spec.train, spec)),
        tuple(_question(asked, pool, spec) for asked in _spread(test, ask, spec.queries, spec)),
    )


def _spread(sheets: list[SheetOf], ask: Callable[[SheetOf], list[Asked]], count: int, spec: SetSpec) -> list[Asked]:
    """About equally many questions for each sheet, `count` in all."""
    each = -(-count // max(len(sheets), 1))
    asked: list[Asked] = []
    for sheet in sheets:
        asked += shuffled(ask(sheet), lambda one: one.words, spec.seed, spec.name, sheet.picture.name)[:each]
    return shuffled(asked, lambda one: (one.sheet.picture.name, one.words), spec.seed, spec.name)[:count]


def _example(asked: Asked, spec: SetSpec) -> Example:
    others = [thing for cell, thing in enumerate(asked.sheet.things) if cell != asked.cell]
    chosen = shuffled(others, lambda thing: thing.name, spec.seed, asked.sheet.picture.name, asked.words)
    negatives = tuple(_crop(thing, spec) for thing in chosen[:NEGATIVES])
    return Example(shown(spec.instruction, asked.sheet.picture, asked.words), _crop(asked.sheet.things[asked.cell], spec), negatives)


def _question(asked: Asked, pool: Sequence[Side], spec: SetSpec) -> Question:
    crops = [_crop(thing, spec) for thing in asked.sheet.things]
    candidates = sampled(spec, crops[asked.cell], crops, pool, asked.sheet.picture.name, asked.words)
    return Question(shown(spec.instruction, asked.sheet.picture, asked.words), candidates)


def _crop(thing: Thing, spec: SetSpec) -> Side:
    return target_picture(spec.target, cell_picture(thing.picture, thing.name))
