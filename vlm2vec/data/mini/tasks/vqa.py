"""Visual question answering: a picture and a question in; the answers to all questions of the set are the candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count

from vlm2vec.data.mini.chance import pick, rank, shuffled
from vlm2vec.data.mini.draw import Digits, pixels
from vlm2vec.data.mini.rows import Example, Picture, Question, Side, TaskRows, gold_first, shown
from vlm2vec.data.mini.sources import Digit, Emoji
from vlm2vec.data.mini.spec import SetSpec
from vlm2vec.data.mini.tasks.common import CELLS, openmoji_picture, sheet_picture, twemoji_picture
from vlm2vec.data.mini.world import Flag, World

Ask = tuple[str, Callable[[Sequence[int]], str]]  # a question and what answers it

TWO_DIGITS: tuple[Ask, ...] = (
    ("What is the sum of the two digits?", lambda pair: str(sum(pair))),
    ("What is the digit on the left?", lambda pair: str(pair[0])),
    ("What is the digit on the right?", lambda pair: str(pair[1])),
    ("Which digit is the largest?", lambda pair: str(max(pair))),
    ("Which digit is the smallest?", lambda pair: str(min(pair))),
    ("Is the digit on the left even?", lambda pair: "No" if pair[0] % 2 else "Yes"),
)
THREE_DIGITS: tuple[Ask, ...] = (
    ("What is the sum of the three digits?", lambda digits: str(sum(digits))),
    ("What is the digit on the left?", lambda digits: str(digits[0])),
    ("What is the digit in the middle?", lambda digits: str(digits[1])),
    ("What is the digit on the right?", lambda digits: str(digits[2])),
    ("Which digit is the largest?", lambda digits: str(max(digits))),
    ("Which digit is the smallest?", lambda digits: str(min(digits))),
)
QUESTIONS_PER_PICTURE = 3


@dataclass(frozen=True)
class Asked:
    """A question about a picture with its answer, and another answer to the same question that is wrong here."""

    picture: Picture
    question: str
    answer: str
    wrong: str = ""


def digit_pairs(world: World, spec: SetSpec) -> TaskRows:
    """Two handwritten digits side by side."""
    train = _digit_questions(world.digits.train, TWO_DIGITS, 2, spec.train, spec)
    test = _digit_questions(world.digits.test, TWO_DIGITS, 2, spec.queries, spec)
    return _rows(spec, train, test)


def digit_triples(world: World, spec: SetSpec) -> TaskRows:
    """Three handwritten digits side by side."""
    test = _digit_questions(world.digits.test, THREE_DIGITS, 3, spec.queries, spec)
    return _rows(spec, [], test, [str(number) for number in range(28)])


def _digit_questions(digits: list[Digit], asks: Sequence[Ask], length: int, most: int, spec: SetSpec) -> list[Asked]:
    asked: list[Asked] = []
    number = 0
    while len(asked) < most:
        chosen = [pick(digits, spec.seed, spec.name, number, place) for place in range(length)]
        picture = Picture(f"Digits{length}", "-".join(f"{digit.row:04d}" for digit in chosen), Digits(tuple(digit.row for digit in chosen)))
        values = [digit.value for digit in chosen]
        for question, answer in shuffled(asks, lambda ask: ask[0], spec.seed, number)[:QUESTIONS_PER_PICTURE]:
            asked.append(Asked(picture, question, answer(values), _wrong(answer, values, number)))
        number += 1
    return asked[:most]


def _wrong(answer: Callable[[Sequence[int]], str], values: Sequence[int], number: int) -> str:
    """What the question's answer would be for other digits."""
    guesses = (answer([rank(number, attempt, place) % 10 for place in range(len(values))]) for attempt in count())
    return next(guess for guess in guesses if guess != answer(values))


# -- flags -------------------------------------------------------------------------------------------------------------------------------

# Colours as they are called, each with some of the values that the artists use.
COLOURS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((210, 47, 39), (206, 17, 38), (140, 20, 40)),
    "orange": ((235, 125, 40),),
    "yellow": ((250, 204, 60), (241, 179, 28)),
    "green": ((60, 150, 60), (0, 100, 60), (92, 158, 49)),
    "light blue": ((110, 180, 230),),
    "blue": ((30, 80, 160), (0, 40, 110), (20, 20, 90)),
    "black": ((20, 20, 20),),
    "white": ((255, 255, 255), (238, 238, 238)),
}
MANY, FEW = 0.08, 0.002  # share of a flag above which a colour is on it and below which it is not
COLOUR_FLAGS = 20  # flags with and flags without a colour that are asked about it
AHEAD = 1.5  # a colour covers the most if it covers so many times the next one
INSIDE = {"OpenMoji": (9, 21, 63, 51), "Twemoji": (6, 14, 66, 58)}  # the part of the drawing without outline and background


def flags(world: World, spec: SetSpec) -> TaskRows:
    """Facts about the country of a flag, and the flag's colours. Training shows one artist's flags, evaluation another's."""
    train, test = (_flag_questions(world.flags, picture_of, spec) for picture_of in (openmoji_picture, twemoji_picture))
    return _rows(spec, train[: spec.train], test[: spec.queries], [asked.answer for asked in [*train, *test]])


def _flag_questions(flags: list[Flag], picture_of: Callable[[Emoji], Picture], spec: SetSpec) -> list[Asked]:
    shares = [(picture_of(flag.emoji), _colour_shares(picture_of(flag.emoji))) for flag in flags]
    asked = [fact for flag in flags for fact in _facts(flag, picture_of(flag.emoji))]
    asked += [question for picture, share in shares for question in _largest_colour(picture, share)]
    asked += [question for colour in COLOURS for question in _colour_there(colour, shares, spec)]
    return shuffled(asked, lambda one: (one.picture.name, one.question), spec.seed, spec.name)


def _facts(flag: Flag, picture: Picture) -> Iterable[Asked]:
    country = flag.country
    yield Asked(picture, "Which country or territory does this flag belong to?", flag.emoji.name)
    yield Asked(picture, "What is the capital of the place with this flag?", country.capital)
    yield Asked(picture, "In which part of the world is the place with this flag?", country.region)


def _largest_colour(picture: Picture, share: dict[str, float]) -> Iterable[Asked]:
    first, second, *_ = share
    if share[first] >= AHEAD * share[second]:
        yield Asked(picture, "Which colour covers the most of this flag?", first)


def _colour_there(colour: str, shares: Sequence[tuple[Picture, dict[str, float]]], spec: SetSpec) -> Iterable[Asked]:
    """As many flags that have the colour as flags that have not, so that the question alone does not give the answer away."""
    shares = shuffled(shares, lambda pair: pair[0].name, spec.seed, spec.name, colour)
    with_it = [picture for picture, share in shares if share[colour] >= MANY]
    without = [picture for picture, share in shares if share[colour] <= FEW]
    for there, not_there in list(zip(with_it, without, strict=False))[:COLOUR_FLAGS]:
        yield Asked(there, f"Is there any {colour} in this flag?", "Yes")
        yield Asked(not_there, f"Is there any {colour} in this flag?", "No")


def _colour_shares(picture: Picture) -> dict[str, float]:
    """Share of the flag that each colour covers, 0..1, the largest first."""
    inside = pixels(picture.drawing).crop(INSIDE[picture.collection])
    area = inside.width * inside.height
    uses: Counter[str] = Counter({colour: 0 for colour in COLOURS})
    for value, number in Counter(zip(*[iter(inside.tobytes())] * 3, strict=True)).items():
        uses[_colour(value)] += number
    return {colour: uses[colour] / area for colour in sorted(uses, key=lambda colour: -uses[colour])}


def _colour(value: tuple[int, int, int]) -> str:
    """The nearest colour that has a name."""
    distance = {known: sum((a - b) ** 2 for a, b in zip(value, known, strict=True)) for values in COLOURS.values() for known in values}
    return min(COLOURS, key=lambda colour: min(distance[known] for known in COLOURS[colour]))


# -- counting ----------------------------------------------------------------------------------------------------------------------------


def counts(world: World, spec: SetSpec) -> TaskRows:
    """How many times something is on a sheet, beside something else, or how much is on it at all."""
    train = _count_questions(world.emoji.train, world.emoji.train, spec.train, spec, "train")
    test = _count_questions(world.emoji.test, [*world.emoji.test, *world.unread], spec.queries, spec, "test")
    return _rows(spec, train, test, [str(number) for number in range(1, CELLS + 1)])


def _count_questions(named: list[Emoji], others: list[Emoji], most: int, spec: SetSpec, part: str) -> list[Asked]:
    """One question for each sheet, so that all answers are about as frequent as each other."""
    asked = []
    for number in range(most):
        seed = (spec.seed, spec.name, part, number)
        this = pick(named, *seed, "this")
        other = pick([emoji for emoji in others if emoji is not this], *seed, "other")
        these, total, question, answer = _count_one(this, number % 2 == 0, seed)
        cells = [openmoji_picture(this)] * these + [openmoji_picture(other)] * (total - these) + [None] * (CELLS - total)
        placed = [cells[place] for place in shuffled(range(CELLS), lambda place: place, *seed)]
        asked.append(Asked(sheet_picture("EmojiCounts", number, placed), question, str(answer)))
    return asked


def _count_one(this: Emoji, by_name: bool, seed: tuple[object, ...]) -> tuple[int, int, str, int]:
    """How many cells hold this emoji, how many hold any, what is asked, and the answer."""
    if by_name:
        these = 1 + rank(*seed, "these") % (CELLS - 1)
        return these, these + 1 + rank(*seed, "rest") % (CELLS - these), f'How many times is "{this.name}" in the image?', these
    total = 2 + rank(*seed, "total") % (CELLS - 1)
    return 1 + rank(*seed, "these") % (total - 1), total, "How many pictures are there in the image?", total


# -- rows --------------------------------------------------------------------------------------------------------------------------------


def _rows(spec: SetSpec, train: list[Asked], test: list[Asked], answers: Iterable[str] = ()) -> TaskRows:
    """`answers` are candidates besides those of the questions themselves."""
    sides = [Side(answer) for answer in sorted({*answers, *(asked.answer for asked in [*train, *test])})]
    examples, questions = [], []
    for one in train:
        query, negatives = shown(spec.instruction, one.picture, one.question), (Side(one.wrong),) if one.wrong else ()
        examples.append(Example(query, Side(one.answer), negatives))
    for one in test:
        questions.append(Question(shown(spec.instruction, one.picture, one.question), gold_first(Side(one.answer), sides)))
    return TaskRows(tuple(examples), tuple(questions))
