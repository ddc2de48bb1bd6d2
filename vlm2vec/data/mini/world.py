"""The sources, without drawings that look alike, divided into what training may show and what only evaluation shows.

Names held out are made of words that training names hold too, so that a model can read them: the split is compositional. Drawings are
compared by their pixels.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from vlm2vec.data.mini import sources
from vlm2vec.data.mini.chance import rank, shuffled
from vlm2vec.data.mini.draw import Drawing, pixels
from vlm2vec.data.mini.pool import Mapper
from vlm2vec.data.mini.sources import Country, Digit, Emoji, Icon, Photograph

SEED = 17
ICON_WORD_USES = 12  # a word must be in so many icon names for the icon to be used at all
SPARE = 3  # training names that each word of a held-out name is in, at least
HELD_SHARED, HELD_VARIANTS, HELD_ICONS = 80, 400, 600  # held-out icons after each round: shared with other families, in families, any
HELD_FAMILY = 4  # icons held out of one family
HELD_CONCEPTS = 0.25  # share of the concepts without a Material icon that is held out
HELD_EMOJI = 320  # held-out emoji with readable names; people come last, or they would be nearly all
HELD_UNREAD = 0.12  # share of the emoji that is held out whatever its name
TRAIN_DIGITS = 1200
FLAGS, PEOPLE, KEYCAPS = "Flags", "People & Body", "keycap"

T = TypeVar("T")


class Named(Protocol):
    """What has a name made of words."""

    @property
    def words(self) -> frozenset[str]: ...


N = TypeVar("N", bound=Named)


@dataclass(frozen=True)
class Split(Generic[T]):
    """What training may show, and what only evaluation shows."""

    train: list[T]
    test: list[T]


@dataclass(frozen=True)
class Flag:
    """A flag, drawn by two artists, and the facts about its country."""

    emoji: Emoji
    country: Country


@dataclass(frozen=True)
class Numeral:
    """A drawing of one digit that nobody wrote by hand."""

    family: str
    name: str
    drawing: Drawing
    value: int


@dataclass(frozen=True)
class World:
    """Everything the tasks draw from. `emoji.test` have readable names; `unread` are held out too; nobody is asked to read their names."""

    icons: Split[Icon]
    numerals: list[Numeral]
    concepts: Split[dict[str, Icon]]  # an icon by family, of one name
    emoji: Split[Emoji]
    unread: list[Emoji]
    flags: list[Flag]
    digits: Split[Digit]
    photographs: Split[Photograph]


def survey(mapped: Mapper) -> World:
    """Read the sources, drop look-alikes, divide."""
    pictures = _distinct_icons(mapped)
    numerals = _numerals(pictures)
    pictures = [icon for icon in pictures if not _is_number(icon)]
    families = _concepts(pictures)
    icons = _divide_icons(_readable([icon for icon in pictures if icon.family == "Material"]), families)
    concepts = _divide_concepts(families, icons)
    everything = [emoji for emoji in sources.emoji() if _kept(emoji)]
    numerals += _keycaps(everything)
    emoji, unread = _divide_emoji(_distinct_emoji([one for one in everything if one.category != FLAGS and one.group != KEYCAPS], mapped))
    flags = _flags([one for one in everything if one.category == FLAGS], mapped)
    return World(icons, numerals, concepts, emoji, unread, flags, _divide_digits(), _divide_photographs())


def _print(drawing: Drawing) -> str:
    """Equal for drawings with the same pixels."""
    picture = pixels(drawing)
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()


def _distinct(items: Sequence[T], prints: dict[T, str]) -> list[T]:
    """Without those that look like another of `prints`: which of the two names is right could not be told."""
    uses = Counter(prints.values())
    return [item for item in items if uses[prints[item]] == 1]


# -- icons -------------------------------------------------------------------------------------------------------------------------------


def _distinct_icons(mapped: Mapper) -> list[Icon]:
    """Icons with readable names, with a name that several families share, or with a number; without look-alikes."""
    material, others = sources.material_icons(), sources.other_icons()
    uses = Counter(icon.name for icon in [*material, *others])
    readable = {icon.name for icon in _readable([icon for icon in material if not _is_number(icon)])}
    icons = [icon for icon in material if icon.name in readable or uses[icon.name] > 1 or _is_number(icon)]
    icons += [icon for icon in others if uses[icon.name] > 1 or _is_number(icon)]
    return _distinct(icons, dict(zip(icons, mapped(_print, [icon.drawing for icon in icons]), strict=True)))


def _is_number(icon: Icon) -> bool:
    """Numbers are for the set about digits alone."""
    return "numeric" in icon.words or icon.name.isdigit()


def _numerals(icons: list[Icon]) -> list[Numeral]:
    """Icons that show a single digit."""
    found = [(icon, _NUMERAL.fullmatch(icon.name)) for icon in icons]
    return [Numeral(icon.family, icon.name, icon.drawing, int(match[1])) for icon, match in found if match]


_NUMERAL = re.compile(r"(?:numeric-)?([0-9])(?:-box|-circle)?(?:-multiple)?(?:-outline)?")


def _readable(icons: list[Icon]) -> list[Icon]:
    """Those of which every word is in several names, counted among the icons that remain."""
    while True:
        uses = Counter(word for icon in icons for word in icon.words)
        kept = [icon for icon in icons if all(uses[word] >= ICON_WORD_USES for word in icon.words)]
        if len(kept) == len(icons):
            return icons
        icons = kept


def _divide_icons(icons: list[Icon], families: list[dict[str, Icon]]) -> Split[Icon]:
    """Hold out, in this order: icons that other families have too, some of each of many families of variants, single icons."""
    shared = {family["Material"].name for family in families if "Material" in family}
    stems = defaultdict(list)
    for icon in icons:
        stems[icon.parts[0]].append(icon)
    families_of_variants = shuffled(stems.items(), lambda item: item[0], SEED, "variants")
    variants = [_held_variants(members) for _, members in families_of_variants if len(members) >= 3]
    in_order = shuffled(icons, lambda icon: icon.name, SEED, "icons")
    reserve = _Reserve(icons)
    reserve.hold_out([[icon] for icon in in_order if icon.name in shared], HELD_SHARED)
    reserve.hold_out(variants, HELD_VARIANTS)
    reserve.hold_out([[icon] for icon in in_order], HELD_ICONS)
    return reserve.split()


def _held_variants(members: list[Icon]) -> list[Icon]:
    """The plainest of a family's icons."""
    return sorted(members, key=lambda icon: (len(icon.parts[1]), rank(SEED, icon.name)))[:HELD_FAMILY]


class _Reserve(Generic[N]):
    """Holds items out as long as each of their words stays in enough names of the others."""

    def __init__(self, items: list[N]) -> None:
        self._items = items
        self._held: dict[int, N] = {}
        self._left = Counter(word for item in items for word in item.words)

    def hold_out(self, groups: Iterable[list[N]], until: int) -> None:
        """Take whole groups, in their order, until `until` items are held out in all."""
        for group in groups:
            new = [item for item in group if id(item) not in self._held]
            words = Counter(word for item in new for word in item.words)
            if len(self._held) + len(new) <= until and all(self._left[word] - count >= SPARE for word, count in words.items()):
                self._held.update({id(item): item for item in new})
                self._left -= words

    def split(self) -> Split[N]:
        return Split([item for item in self._items if id(item) not in self._held], list(self._held.values()))


def _concepts(icons: list[Icon]) -> list[dict[str, Icon]]:
    """Icons of the same name in several families, by name."""
    by_name: dict[str, dict[str, Icon]] = defaultdict(dict)
    for icon in icons:
        by_name[icon.name][icon.family] = icon
    return [families for _, families in sorted(by_name.items()) if len(families) > 1]


def _divide_concepts(families: list[dict[str, Icon]], icons: Split[Icon]) -> Split[dict[str, Icon]]:
    """A concept is held out with its Material icon; without one, by chance."""
    held = {icon.name for icon in icons.test}
    split: Split[dict[str, Icon]] = Split([], [])
    for concept in families:
        icon = next(iter(concept.values()))
        unnamed = "Material" not in concept and rank(SEED, "concept", icon.name) % 100 < 100 * HELD_CONCEPTS
        (split.test if unnamed or icon.name in held else split.train).append(concept)
    return split


# -- emoji and flags ---------------------------------------------------------------------------------------------------------------------


def _kept(emoji: Emoji) -> bool:
    """All without a skin tone, and one of the five tones of each that has them."""
    base = "-".join(part for part in emoji.code.split("-") if not part.startswith("1F3F"))
    tones = emoji.code.count("1F3F")
    return not emoji.toned or (tones == 1 and f"1F3F{'BCDEF'[rank(SEED, 'tone', base) % 5]}" in emoji.code)


def _keycaps(emoji: list[Emoji]) -> list[Numeral]:
    """The keys of a telephone with a digit, in both hands. They are no part of the other emoji."""
    keys = [one for one in emoji if one.group == KEYCAPS and one.name[-1].isdigit() and one.name != "keycap 10"]
    hands = (("OpenMoji", "openmoji"), ("Twemoji", "twemoji"))
    return [Numeral(hand, one.name, getattr(one, drawing), int(one.name[-1])) for one in keys for hand, drawing in hands]


def _distinct_emoji(emoji: list[Emoji], mapped: Mapper) -> list[Emoji]:
    """Without those that look like another in either artist's hand."""
    for drawing in _HANDS:
        codes = [one.code for one in emoji]
        distinct = set(_distinct(codes, dict(zip(codes, mapped(_print, [drawing(one) for one in emoji]), strict=True))))
        emoji = [one for one in emoji if one.code in distinct]
    return emoji


def _divide_emoji(emoji: list[Emoji]) -> tuple[Split[Emoji], list[Emoji]]:
    in_order = shuffled(emoji, lambda one: one.code, SEED, "emoji")
    unread = [one for one in in_order if not one.toned and rank(SEED, "unread", one.code) % 100 < 100 * HELD_UNREAD]
    readable = [one for one in in_order if one not in unread]
    reserve = _Reserve(readable)
    reserve.hold_out([[one] for one in sorted(readable, key=lambda one: one.category == PEOPLE)], HELD_EMOJI)
    return reserve.split(), unread


def _flags(emoji: list[Emoji], mapped: Mapper) -> list[Flag]:
    """Flags of countries; of those that look alike, the one of the most people."""
    countries = sources.countries()
    flags = [Flag(one, countries[code]) for one in emoji if (code := _country_code(one)) in countries]
    flags.sort(key=lambda flag: (-flag.country.population, flag.emoji.code))
    for drawing in _HANDS:
        seen: dict[str, Flag] = {}
        for flag, look in zip(flags, mapped(_print, [drawing(flag.emoji) for flag in flags]), strict=True):
            seen.setdefault(look, flag)
        flags = list(seen.values())
    return sorted(flags, key=lambda flag: flag.emoji.code)


_HANDS: tuple[Callable[[Emoji], Drawing], ...] = (lambda emoji: emoji.openmoji, lambda emoji: emoji.twemoji)


def _country_code(emoji: Emoji) -> str:
    """ "CH" of the two regional indicators of a flag; other flags give what is no country's code."""
    return "".join(chr((int(part, 16) - 0x1F1E6) % 26 + ord("A")) for part in emoji.code.split("-"))


# -- digits and photographs --------------------------------------------------------------------------------------------------------------


def _divide_digits() -> Split[Digit]:
    digits = shuffled(sources.digits(), lambda digit: digit.row, SEED, "digits")
    return Split(digits[:TRAIN_DIGITS], digits[TRAIN_DIGITS:])


def _divide_photographs() -> Split[Photograph]:
    """The package's own test split, and the rest."""
    photographs = sources.photographs()
    return Split([one for one in photographs if one.split != "test"], [one for one in photographs if one.split == "test"])
