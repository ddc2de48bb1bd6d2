"""Retrieval: from a picture, a name or both to the picture or the name that belongs to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from vlm2vec.data.mini.chance import balanced, rank, shuffled
from vlm2vec.data.mini.rows import Example, Picture, Question, Side, TaskRows, shown, target_picture, written
from vlm2vec.data.mini.sources import LANGUAGES, VARIANTS, Emoji, Icon
from vlm2vec.data.mini.spec import SetSpec
from vlm2vec.data.mini.tasks.common import icon_picture, openmoji_picture, sampled, twemoji_picture
from vlm2vec.data.mini.world import World

CHANGE_EXAMPLES, CHANGE_QUERIES = 250, 60  # pairs of icons per kind of change, so that outlines do not decide
CONCEPT_QUERIES = 2  # pairs of families that are asked for per concept
TWEMOJI_POOL = 500  # concepts of which evaluation shows the other artist's drawing

Named = tuple[Picture, str]


def picture_to_name(spec: SetSpec, train: Sequence[Named], test: Sequence[Named], names: Iterable[str]) -> TaskRows:
    """Pictures as queries; the candidates are names."""
    pool = [Side(name) for name in names]
    return _pairs(spec, train, test, lambda picture, name: (shown(spec.instruction, picture), Side(name)), pool)


def name_to_picture(spec: SetSpec, train: Sequence[Named], test: Sequence[Named], pictures: Iterable[Picture]) -> TaskRows:
    """Names as queries; the candidates are pictures."""
    pool = [target_picture(spec.target, picture) for picture in pictures]
    return _pairs(spec, train, test, lambda picture, name: (written(spec.instruction, name), target_picture(spec.target, picture)), pool)


def _pairs(
    spec: SetSpec, train: Sequence[Named], test: Sequence[Named], sides: Callable[[Picture, str], tuple[Side, Side]], pool: Sequence[Side]
) -> TaskRows:
    """Each pair as query and target; the candidates of a question are drawn from the pool."""
    questions = []
    for picture, name in test[: spec.queries]:
        query, gold = sides(picture, name)
        questions.append(Question(query, sampled(spec, gold, [], pool, name)))
    return TaskRows(tuple(Example(*sides(picture, name)) for picture, name in train[: spec.train]), tuple(questions))


# -- names -------------------------------------------------------------------------------------------------------------------------------


def icon_to_name(world: World, spec: SetSpec) -> TaskRows:
    """Material icons and their names."""
    train, test = (_named_icons(part, spec) for part in (world.icons.train, world.icons.test))
    return picture_to_name(spec, train, test, [icon.text for icon in world.icons.test])


def name_to_icon(world: World, spec: SetSpec) -> TaskRows:
    """The other way round."""
    train, test = (_named_icons(part, spec) for part in (world.icons.train, world.icons.test))
    return name_to_picture(spec, train, test, [icon_picture(icon) for icon in world.icons.test])


def emoji_to_name(world: World, spec: SetSpec) -> TaskRows:
    """Emoji and their names."""
    train, test = (_named_emoji(part, spec) for part in (world.emoji.train, world.emoji.test))
    return picture_to_name(spec, train, test, [emoji.name for emoji in world.emoji.test])


def name_to_emoji(world: World, spec: SetSpec) -> TaskRows:
    """The other way round."""
    train, test = (_named_emoji(part, spec) for part in (world.emoji.train, world.emoji.test))
    return name_to_picture(spec, train, test, [openmoji_picture(emoji) for emoji in world.emoji.test])


def twemoji_to_name(world: World, spec: SetSpec) -> TaskRows:
    """Concepts that training shows, drawn by an artist whom it does not."""
    test = [(twemoji_picture(emoji), emoji.name) for emoji in shuffled(_redrawn(world), lambda one: one.code, spec.seed, spec.name)]
    return picture_to_name(spec, [], test, [emoji.name for emoji in [*_redrawn(world), *world.emoji.train]])


def foreign_name_to_twemoji(world: World, spec: SetSpec) -> TaskRows:
    """The same, asked for in a language that training does not use; names that are spelt as in English are left out."""
    pool = _redrawn(world)
    test = []
    for emoji in shuffled(pool, lambda one: one.code, spec.seed, spec.name):
        language = LANGUAGES[rank(spec.seed, spec.name, emoji.code) % len(LANGUAGES)]
        name = emoji.names[language]
        alone = sum(name == other.names[language] for other in pool) == 1
        if alone and name.casefold() != emoji.name.casefold():
            test.append((twemoji_picture(emoji), name))
    return name_to_picture(spec, [], test, [twemoji_picture(emoji) for emoji in pool])


def _named_icons(icons: list[Icon], spec: SetSpec) -> list[Named]:
    return [(icon_picture(icon), icon.text) for icon in shuffled(icons, lambda icon: icon.name, spec.seed, spec.name)]


def _named_emoji(emoji: list[Emoji], spec: SetSpec) -> list[Named]:
    return [(openmoji_picture(one), one.name) for one in shuffled(emoji, lambda one: one.code, spec.seed, spec.name)]


def _redrawn(world: World) -> list[Emoji]:
    plain = [emoji for emoji in world.emoji.train if not emoji.toned]
    return shuffled(plain, lambda one: one.code, "redrawn")[:TWEMOJI_POOL]


# -- pictures to pictures ----------------------------------------------------------------------------------------------------------------


def across_families(world: World, spec: SetSpec) -> TaskRows:
    """The same concept drawn for another family of icons."""
    train = _family_pairs(world.concepts.train, spec)
    test = balanced(_family_pairs(world.concepts.test, spec), lambda pair: pair[0].name, CONCEPT_QUERIES)
    everything = [icon for concept in world.concepts.test for icon in concept.values()]
    questions = []
    for query, gold in test[: spec.queries]:
        pool = [_icon_target(icon, spec) for icon in everything if icon.name != query.name]
        candidates = sampled(spec, _icon_target(gold, spec), [], pool, query.name)
        questions.append(Question(shown(spec.instruction, icon_picture(query)), candidates))
    examples = (Example(shown(spec.instruction, icon_picture(query)), _icon_target(gold, spec)) for query, gold in train[: spec.train])
    return TaskRows(tuple(examples), tuple(questions))


def _family_pairs(concepts: list[dict[str, Icon]], spec: SetSpec) -> list[tuple[Icon, Icon]]:
    """Both directions of every two families that share a concept."""
    pairs = [(query, gold) for concept in concepts for query in concept.values() for gold in concept.values() if query is not gold]
    return shuffled(pairs, lambda pair: (pair[0].name, pair[0].family, pair[1].family), spec.seed, spec.name)


def _icon_target(icon: Icon, spec: SetSpec) -> Side:
    return target_picture(spec.target, icon_picture(icon))


@dataclass(frozen=True)
class Change:
    """An icon, and the same icon with one variant more."""

    before: Icon
    after: Icon
    variant: str


def changed_icons(world: World, spec: SetSpec) -> TaskRows:
    """Composed retrieval: an icon and a change; the icon itself and its other variants are among the candidates."""
    train = balanced(_changes(world.icons.train, spec), lambda change: change.variant, CHANGE_EXAMPLES)
    test = balanced(_changes(world.icons.test, spec), lambda change: change.variant, CHANGE_QUERIES)
    examples = (Example(_asked(change, spec), _icon_target(change.after, spec), (_icon_target(change.before, spec),)) for change in train)
    pool = [_icon_target(icon, spec) for icon in world.icons.test]
    questions = []
    for change in test[: spec.queries]:
        family = [_icon_target(icon, spec) for icon in world.icons.test if icon.parts[0] == change.before.parts[0]]
        questions.append(Question(_asked(change, spec), sampled(spec, _icon_target(change.after, spec), family, pool, change.after.name)))
    return TaskRows(tuple(examples)[: spec.train], tuple(questions))


def _changes(icons: list[Icon], spec: SetSpec) -> list[Change]:
    by_parts = {icon.parts: icon for icon in icons}
    changes = [
        Change(by_parts[stem, variants - {variant}], icon, variant)
        for (stem, variants), icon in by_parts.items()
        for variant in sorted(variants)
        if (stem, variants - {variant}) in by_parts
    ]
    return shuffled(changes, lambda change: (change.after.name, change.variant), spec.seed, spec.name)


def _asked(change: Change, spec: SetSpec) -> Side:
    return shown(spec.instruction, icon_picture(change.before), VARIANTS[change.variant])
