"""The rows of each set as things and pictures, following what a suite says of it; `write` gives them the form of the files.

Shape letters: Q queries, M candidates of a query, N distinct candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vlm2vec.data.made import texts, traps
from vlm2vec.data.made.pictures import COLOURS, ENCODERS, Picture, Thing, things
from vlm2vec.data.sampler import permutation, random_words
from vlm2vec.suite import SetSpec, Suite, TrainSpec


@dataclass(frozen=True)
class Size:
    """How much is made of each set; `full` is as much as the suite says, and then the other two say nothing."""

    queries: int = 8
    candidates: int = 6
    full: bool = False

    def counts(self, spec: SetSpec) -> tuple[int, int, int]:
        """(Q, M, N). The smaller size keeps whether a set has more, as many or fewer distinct candidates than a list is long."""
        if self.full:
            return spec.queries, spec.candidates, spec.distinct or max(spec.queries, spec.candidates)
        queries, listed = min(self.queries, spec.queries), min(self.candidates, spec.candidates)
        if spec.distinct is None:
            return queries, listed, max(2, queries, listed)
        if spec.distinct > spec.candidates:
            return queries, listed, min(spec.distinct, 2 * max(queries, listed))
        return queries, listed, max(2, listed * spec.distinct // spec.candidates)


@dataclass(frozen=True)
class Side:
    """A query or a candidate: what stands for {text} in its template, and its picture."""

    words: str
    picture: Picture | None = None


@dataclass(frozen=True)
class Cast:
    """What a set shows: its things, and the pictures of them. `home` is the evaluation set whose things and scenes these are."""

    spec: SetSpec
    home: str
    things: list[Thing]
    folders: tuple[str, str]  # of its own pictures, and of the scenes
    key: tuple[object, ...]

    def thing(self, index: int) -> Thing:
        return self.things[index % len(self.things)]

    def photo(self, thing: Thing, role: str, number: int) -> Picture:
        """`thing` alone; equal keys, roles and numbers give an equal picture."""
        encoder = self._encoder(role, number)
        path = f"{self.folders[0]}/{_stem(self.spec.name, number)}{'' if role == 'photo' else '_' + role}{ENCODERS[encoder][0]}"
        return Picture(path, ((thing, (*self.key, role, number)),), encoder=encoder)

    def scene(self, number: int) -> Picture:
        """Thing `number` and the one after it side by side."""
        encoder = self._encoder("photo", number)
        panels = [(self.thing(number + step), (*self.key, "scene", number, step)) for step in range(2)]
        ordered = tuple(reversed(panels)) if self.side(number) else tuple(panels)
        return Picture(f"{self.folders[1]}/{_stem(self.home, number)}{ENCODERS[encoder][0]}", ordered, encoder=encoder)

    def side(self, number: int) -> int:
        """Which half of scene `number` shows thing `number`: 0 left, 1 right."""
        return int(random_words(1, *self.key, "side", number)[0] % 2)

    def crop(self, number: int) -> Picture:
        """Thing `number` cut out of its scene."""
        name = traps.CROP_FILE.format(number=traps.FIRST_CROP + number, words=self.thing(number).words)
        return replace(self.scene(number), path=f"{self.folders[0]}/{name}.jpg", crop=self.side(number), encoder="jpeg")

    def _encoder(self, role: str, number: int) -> str:
        odd = role == "photo" and number % traps.ENCODED_EVERY == 0
        return traps.ENCODED.get(self.home, "jpeg") if odd else "jpeg"


def _stem(name: str, number: int) -> str:
    return traps.FILES.get(name, f"{name}_image_{{number}}").format(number=number)


# -- kinds of sets -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """The query of row `number`, whose gold is candidate `index`, and candidate `index`."""

    query: Callable[[Cast, int, int], Side]
    target: Callable[[Cast, int], Side]


def kind_of(spec: SetSpec) -> Kind:
    """What a set asks for, by its meta-task and modalities."""
    if spec.meta_task == "grounding":
        return MATCHING if spec.target_modality == "I+T" else GROUNDING
    if spec.meta_task != "retrieval":
        return CLASSIFICATION if spec.meta_task == "classification" else VQA
    if spec.target_modality == "I+T":
        return Kind(_about_a_place if spec.query_modality == "T" else _taken_at_a_place, _captioned)
    query = {"T": _describe, "I": _show, "I+T": _change}[spec.query_modality]
    return Kind(query, _caption if spec.target_modality == "T" else _photo)


def _class_name(cast: Cast, index: int) -> Side:
    names = traps.ANSWERS.get(cast.spec.name)
    return Side(names[index % len(names)] if names else cast.thing(index).words)


def _show(cast: Cast, number: int, index: int) -> Side:
    """The picture and, where there is room for words, some that do not give it away."""
    thing = cast.thing(index)
    return Side(f"A report on {thing.kind} from {texts.place(number)}.", cast.photo(thing, "photo", number))


def _ask(cast: Cast, number: int, index: int) -> Side:
    padding = " " if cast.spec.name in traps.PADDED and number % 3 == 0 else ""
    return Side(texts.question(cast.spec.name, cast.side(number)) + padding, cast.scene(number))


def _words(cast: Cast, index: int) -> Side:
    return Side(cast.thing(index).words)


def _describe(cast: Cast, number: int, index: int) -> Side:
    return Side(texts.dialogue(cast.thing(index)) if "dialogue" in cast.spec.query else _caption(cast, index).words)


def _caption(cast: Cast, index: int) -> Side:
    return Side(f"{texts.sentence(cast.thing(index).words)}, seen in {texts.place(index)}.")


def _photo(cast: Cast, index: int) -> Side:
    """Another picture than the query's, if that has one."""
    return Side("", cast.photo(cast.thing(index), "photo" if cast.spec.query_modality == "T" else "other", index))


def _change(cast: Cast, number: int, index: int) -> Side:
    """The wanted thing in another colour, and which colour is wanted."""
    wanted = cast.thing(index)
    others = [colour for colour in COLOURS if colour != wanted.colour]
    shown = replace(wanted, colour=others[number % len(others)])
    return Side(f"The same, but {wanted.colour} instead of {shown.colour}.", cast.photo(shown, "photo", number))


def _subject(index: int) -> int:
    """The picture of a captioned candidate: every fourth candidate has that of the one before it, taken at another place."""
    return index - (index % 4 == 1)


def _captioned(cast: Cast, index: int) -> Side:
    """The words tell shape and place, the picture colour and number."""
    thing = cast.thing(_subject(index))
    role = "photo" if cast.spec.query_modality == "T" else "other"
    return Side(f"{texts.sentence(thing.kind)} in {texts.place(index)}.", cast.photo(thing, role, _subject(index)))


def _about_a_place(cast: Cast, number: int, index: int) -> Side:
    return Side(f"What do {cast.thing(_subject(index)).words} look like in {texts.place(index)}?")


def _taken_at_a_place(cast: Cast, number: int, index: int) -> Side:
    return Side(f"What is this in {texts.place(index)}?", cast.photo(cast.thing(_subject(index)), "photo", number))


def _point(cast: Cast, number: int, index: int) -> Side:
    words = cast.thing(number).words
    asked = f"Which box frames {words}?" if "question" in cast.spec.query else words
    return Side(f"{words} on the {texts.SIDES[cast.side(number)]}" if "expression" in cast.spec.query else asked, cast.scene(number))


def _crop(cast: Cast, index: int) -> Side:
    return Side("", cast.crop(index))


def _half(index: int) -> tuple[int, int]:
    """Of two neighbouring numbers, both mean one scene and each one of its things."""
    return index // 2, index // 2 + index % 2


def _refer(cast: Cast, number: int, index: int) -> Side:
    scene, _ = _half(index)
    return Side(f"all on the {texts.SIDES[cast.side(scene) ^ (index % 2)]}", cast.scene(scene))


def _referred(cast: Cast, index: int) -> Side:
    scene, thing = _half(index)
    return Side(cast.thing(thing).words, cast.scene(scene))


CLASSIFICATION, VQA = Kind(_show, _class_name), Kind(_ask, _words)
GROUNDING, MATCHING = Kind(_point, _crop), Kind(_refer, _referred)


# -- evaluation --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class EvalRows:
    """An evaluation set. Query q has the candidates `[candidates[index] for index in members_QM[q]]`, its gold first."""

    spec: SetSpec  # with the counts that were made
    queries: list[Side]
    candidates: list[Side]
    members_QM: NDArray[np.int64]

    @cached_property
    def pictures(self) -> list[Picture]:
        """One per file, of the queries and the listed candidates."""
        listed = [self.candidates[index] for index in np.unique(self.members_QM).tolist()]
        return _files([*self.queries, *listed])


def _files(sides: Iterable[Side]) -> list[Picture]:
    return list({side.picture.path: side.picture for side in sides if side.picture}.values())


def eval_rows(spec: SetSpec, suite: Suite, size: Size, seed: int) -> EvalRows:
    """The set `spec` of `suite`."""
    cast, kind = _cast(spec, suite, size, seed, "eval"), kind_of(spec)
    queries, listed, distinct = size.counts(spec)
    members_QM = candidate_lists(queries, listed, distinct, seed, "candidates", spec.name)
    candidates = [kind.target(cast, index) for index in range(distinct)]
    asked = [kind.query(cast, row, index) for row, index in enumerate(members_QM[:, 0].tolist())]
    if spec.name in traps.LONG_QUERY:
        asked[0] = replace(asked[0], words=texts.long(asked[0].words))
    if spec.name in traps.LONG_TARGET:
        candidates[0] = replace(candidates[0], words=texts.long(candidates[0].words))
    made = replace(spec, queries=queries, candidates=listed, distinct=len(np.unique(members_QM)))
    return EvalRows(made, asked, candidates, members_QM)


def candidate_lists(queries: int, listed: int, distinct: int, *key: object) -> NDArray[np.int64]:
    """(Q, M) numbers of candidates, the gold of query q, q modulo N, first.

    The others are distinct and never the gold if there are enough; else all `distinct` ones again and again, the gold among them. Every
    candidate is in some list where Q (M - 1) >= N.
    """
    order_N = permutation(distinct, *key)
    gold_Q = np.arange(queries) % distinct
    start_Q1 = (np.arange(queries) * -(-distinct // queries))[:, None]
    if distinct < listed:
        return np.column_stack([gold_Q, order_N[(start_Q1 + np.arange(listed - 1)) % distinct]])
    window_QM = order_N[(start_Q1 + np.arange(listed)) % distinct]
    dropped_QM = window_QM == gold_Q[:, None]
    dropped_QM[~dropped_QM.any(axis=1), -1] = True
    return np.column_stack([gold_Q, window_QM[~dropped_QM].reshape(queries, listed - 1)])


def _cast(spec: SetSpec, suite: Suite, size: Size, seed: int, split: str) -> Cast:
    by_name = {other.name: other for other in suite.sets}
    home = by_name.get(traps.HOMES.get(spec.name, ""), spec)
    key = (seed, home.name)
    count = size.counts(home)[2]
    return Cast(spec, home.name, things(count, "things", *key), (spec.name, home.name), (*key, split))


# -- training ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TrainRows:
    """A training set: queries with their positives and their negatives, wrong candidates of which the first is the hardest."""

    spec: TrainSpec
    shown: SetSpec  # the evaluation set it belongs to, with the templates of its training rows
    queries: list[Side]
    positives: list[Side]
    negatives: list[list[Side]]

    def pictures(self, negatives: int) -> list[Picture]:
        """One per file, with that many negatives per row."""
        return _files([*self.queries, *self.positives, *(side for row in self.negatives for side in row[:negatives])])


def train_rows(spec: TrainSpec, suite: Suite, rows: int, size: Size, seed: int, negatives: int = 1) -> TrainRows:
    """The training set `spec` of `suite`: the things of the evaluation set it belongs to, in other pictures."""
    tested = next(other for other in suite.sets if other.train == spec.name)
    cast = replace(_cast(tested, suite, size, seed, "train"), folders=(f"images/{spec.name}/Train",) * 2)
    kind = kind_of(tested)
    queries = [kind.query(cast, row, row) for row in range(rows)]
    positives = [kind.target(cast, row) for row in range(rows)]
    wrong = [[kind.target(cast, row + step + 1) for step in range(negatives)] for row in range(rows)]
    shown = replace(tested, query=spec.query or tested.query, target=spec.target or tested.target)
    return TrainRows(replace(spec, rows=rows, rounded=1), shown, queries, positives, wrong)
