"""Classification: a picture, and all the labels there are."""

from __future__ import annotations

from collections import Counter

from vlm2vec.data.mini.chance import balanced, shuffled
from vlm2vec.data.mini.rows import Picture, TaskRows
from vlm2vec.data.mini.sources import VARIANTS, Icon
from vlm2vec.data.mini.spec import SetSpec
from vlm2vec.data.mini.tasks.common import (
    NUMBERS,
    Labelled,
    classification,
    digit_picture,
    icon_picture,
    openmoji_picture,
    photograph_picture,
)
from vlm2vec.data.mini.world import World

GROUP_MEMBERS = 6  # training emoji that a group must have to be a label
GROUP_QUERIES = 6  # questions about one group, so that the large groups do not decide
VARIANT_EXAMPLES, VARIANT_QUERIES = 120, 24  # the same for the variants of icons


def groceries(world: World, spec: SetSpec) -> TaskRows:
    """Which fruit a photograph shows."""
    train = [(photograph_picture(one), one.label) for one in world.photographs.train]
    test = [(photograph_picture(one), one.label) for one in shuffled(world.photographs.test, lambda one: one.row, spec.seed, spec.name)]
    return classification(spec, train, test, sorted({label for _, label in train}))


def digits(world: World, spec: SetSpec) -> TaskRows:
    """Which digit was written."""
    train, test = ([(digit_picture(one), NUMBERS[one.value]) for one in part] for part in (world.digits.train, world.digits.test))
    return classification(spec, train, test, NUMBERS)


def numerals(world: World, spec: SetSpec) -> TaskRows:
    """Which digit an icon shows."""
    test = [(Picture(one.family, one.name, one.drawing), NUMBERS[one.value]) for one in world.numerals]
    return classification(spec, [], test, NUMBERS)


def emoji_groups(world: World, spec: SetSpec) -> TaskRows:
    """Which of Unicode's groups an emoji belongs to."""
    train = [(openmoji_picture(one), one.group) for one in world.emoji.train if not one.toned]
    size = Counter(group for _, group in train)
    labels = sorted(group for group in size if size[group] >= GROUP_MEMBERS)
    held = shuffled([*world.emoji.test, *world.unread], lambda one: one.code, spec.seed, spec.name)
    test = [(openmoji_picture(one), one.group) for one in held if not one.toned and one.group in labels]
    return classification(spec, [pair for pair in train if pair[1] in labels], balanced(test, _label, GROUP_QUERIES), labels)


def icon_variants(world: World, spec: SetSpec) -> TaskRows:
    """Which variant of an icon is shown; "plain" is the icon that the variants were made from."""
    train, test = (_variants(world, part, spec) for part in (world.icons.train, world.icons.test))
    labels = ["plain", *(name.replace("-", " ") for name in VARIANTS)]
    known = Counter(_label(pair) for pair in train)
    labels = [label for label in labels if known[label] >= GROUP_MEMBERS]
    train, test = ([pair for pair in part if pair[1] in labels] for part in (train, test))
    return classification(spec, balanced(train, _label, VARIANT_EXAMPLES), balanced(test, _label, VARIANT_QUERIES), labels)


def _variants(world: World, icons: list[Icon], spec: SetSpec) -> list[Labelled]:
    """Icons with one variant or none, of stems that have several."""
    stems = Counter(icon.parts[0] for icon in [*world.icons.train, *world.icons.test])
    icons = [icon for icon in icons if len(icon.parts[1]) <= 1 and stems[icon.parts[0]] > 1]
    icons = shuffled(icons, lambda icon: icon.name, spec.seed, spec.name)
    return [(icon_picture(icon), next(iter(icon.parts[1]), "plain").replace("-", " ")) for icon in icons]


def _label(pair: Labelled) -> str:
    return pair[1]
