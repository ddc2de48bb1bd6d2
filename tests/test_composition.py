"""What a batch looks like: floors against the loss itself and against brute force, counts by hand."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from vlm2vec.composition import ALL, Composition, Share, compose
from vlm2vec.config import LossConfig
from vlm2vec.data.types import Item, Pair
from vlm2vec.losses.info_nce import InfoNCE


def pairs_of(*rows: str, source: str = "A") -> list[Pair]:
    """Pairs from rows like "query > positive" or "query > positive > negative, negative"."""
    made = []
    for number, row in enumerate(rows):
        query, positive, negatives = (*row.split(" > "), "")[:3]
        items = tuple(Item(text) for text in negatives.split(", ") if text)
        made.append(Pair(f"{source}:{number}", source, Item(query), Item(positive), items))
    return made


def random_pairs(case: int) -> list[Pair]:
    """Twelve pairs of few queries and few targets, a third of them with a negative."""
    draw = random.Random(case)
    rows = [f"q{draw.randrange(6)} > t{draw.randrange(5)}" + draw.choice(["", "", f" > t{draw.randrange(7)}"]) for _ in range(12)]
    return pairs_of(*rows)


def share(pairs: Sequence[Pair], source: str = ALL, **loss: object) -> Share:
    return compose([pairs], LossConfig(**loss)).shares[source]  # type: ignore[arg-type]


# -- against the loss ----------------------------------------------------------------------------------------------------------------------


def texts(pairs: Sequence[Pair]) -> list[str]:
    return sorted({item.text for pair in pairs for item in (pair.query, pair.positive, *pair.negatives)})


def targets_of(pairs: Sequence[Pair]) -> list[str]:
    """The text of every column."""
    return [pair.positive.text for pair in pairs] + [item.text for pair in pairs for item in pair.negatives]


def loss_of(pairs: Sequence[Pair], embedding: dict[str, torch.Tensor], **options: object) -> torch.Tensor:
    """What `losses.info_nce` makes of these pairs if an item has the embedding of its text."""
    names = texts(pairs)
    sides = [pair.query.text for pair in pairs], targets_of(pairs)
    query_BD, target_ND = (torch.stack([embedding[text] for text in side]).double() for side in sides)
    query_id_B, target_id_N = (torch.tensor([names.index(text) for text in side]) for side in sides)
    loss = InfoNCE(LossConfig(**options))  # type: ignore[arg-type]
    return loss(query_BD, target_ND, torch.arange(len(pairs)), target_id_N, query_id_B)[0]


MODES = [{"duplicates": duplicates, "symmetric": symmetric} for duplicates in ("positive", "mask") for symmetric in (False, True)]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("case", range(10))
def test_the_start_is_the_loss_of_equal_similarities(case: int, mode: dict[str, object]) -> None:
    pairs = random_pairs(case)
    equal = {text: torch.tensor([0.6, 0.8]) for text in texts(pairs)}
    assert share(pairs, **mode).start == pytest.approx(float(loss_of(pairs, equal, **mode)), abs=1e-6)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("case", range(10))
def test_no_embeddings_come_below_the_floor(case: int, mode: dict[str, object]) -> None:
    """Not even those that an optimizer finds."""
    pairs = random_pairs(case)
    torch.manual_seed(case)
    free = {text: torch.randn(16, dtype=torch.float64, requires_grad=True) for text in texts(pairs)}
    floor = share(pairs, **mode).floor
    optimizer = torch.optim.Adam(free.values(), lr=0.05)
    for _ in range(60):
        unit = {text: row / row.norm() for text, row in free.items()}
        found = loss_of(pairs, unit, temperature=0.05, **mode)
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        assert float(found.detach()) >= floor - 1e-9


@pytest.mark.parametrize(("duplicates", "floor"), [("positive", (math.log(2) * 2 + 0) / 3), ("mask", 0.0)])
def test_the_floor_is_reached(duplicates: str, floor: float) -> None:
    """One query with two positives, between which its embedding lies, and another query with its own."""
    pairs = pairs_of("q > a", "q > b", "p > c")
    axes = torch.eye(3, dtype=torch.float64)
    embedding = {"a": axes[0], "b": axes[1], "c": axes[2], "q": (axes[0] + axes[1]) / math.sqrt(2), "p": axes[2]}
    found = float(loss_of(pairs, embedding, duplicates=duplicates, temperature=0.01))
    assert found == pytest.approx(floor, abs=1e-6) == pytest.approx(share(pairs, duplicates=duplicates).floor, abs=1e-6)


def test_a_label_that_many_share_has_a_floor_in_the_other_direction_only() -> None:
    """Two labels in a hundred pairs: a query knows its label, a label cannot know its query."""
    pairs = pairs_of(*(f"picture {row} > {'Yes' if row % 2 else 'No'}" for row in range(100)))
    axes = torch.eye(2, dtype=torch.float64)
    embedding = {text: axes[int(text == "Yes" or text[-1] in "13579")] for text in texts(pairs)}
    for symmetric, floor in ((False, 0.0), (True, math.log(50) / 2)):
        assert share(pairs, symmetric=symmetric).floor == pytest.approx(floor)
        assert float(loss_of(pairs, embedding, symmetric=symmetric, temperature=0.01)) == pytest.approx(floor, abs=1e-6)
    assert share(pairs, symmetric=True, duplicates="mask").floor == 0


# -- the usual cross entropy ---------------------------------------------------------------------------------------------------------------


def naive(pairs: Sequence[Pair], score: dict[tuple[str, str], float]) -> float:
    """Cross entropy over columns, each its own target, when a query and a target that are equal to others score as they do."""
    columns = targets_of(pairs)
    rows = [np.array([score[pair.query.text, text] for text in columns]) for pair in pairs]
    return float(np.mean([np.log(np.exp(row).sum()) - row[number] for number, row in enumerate(rows)]))


@pytest.mark.parametrize("case", range(20))
def test_the_naive_floor_is_the_best_of_all_scores(case: int) -> None:
    """Reached by scores that are the logarithms of what is asked how often, and by no others undercut."""
    pairs = random_pairs(case)
    columns = targets_of(pairs)
    asked = [(pair.query.text, pair.positive.text) for pair in pairs]
    queries = [query for query, _ in asked]
    floor = share(pairs).naive_floor

    def best(query: str, target: str) -> float:
        return math.log(max(1e-30, asked.count((query, target)) / queries.count(query) / columns.count(target)))

    scores = {(query, target): best(query, target) for query in queries for target in columns}
    assert naive(pairs, scores) == pytest.approx(floor, abs=1e-9)
    draw = random.Random(case)
    for _ in range(50):
        assert naive(pairs, {key: value + draw.gauss(0, 1) for key, value in scores.items()}) >= floor - 1e-12


def test_hateful_memes_in_a_block_of_1024() -> None:
    """Half of all answers are one's own: 511 false negatives, a floor of ln 512, none when equal targets are one."""
    found = share(pairs_of(*(f"meme {row} > {'Yes' if row % 2 else 'No'}" for row in range(1024))))
    assert found.same_target == 511
    assert found.naive_floor == pytest.approx(math.log(512)) and found.floor == 0
    assert found.chance == 0.5 and found.start == pytest.approx(math.log(2))


# -- counts --------------------------------------------------------------------------------------------------------------------------------


def test_counts_by_hand() -> None:
    """A has an equal query, the two sources an equal positive, and a negative of A is a positive of B."""
    batch = pairs_of("q > a > x, c", "q > b > x", "r > b", source="A") + pairs_of("s > b", "t > c", source="B")
    found = compose([batch], LossConfig())
    first, second, whole = found.shares["A"], found.shares["B"], found.shares[ALL]
    assert list(found.shares) == ["A", "B", ALL] and found.sources == (2, 2)
    assert (first.pairs, second.pairs, whole.pairs) == (3, 2, 5)
    assert first.same_query == pytest.approx(2 / 3) and second.same_query == 0
    assert first.same_target == pytest.approx((0 + 2 + 2) / 3) and second.same_target == pytest.approx((2 + 1) / 2)
    assert first.negatives == 1 and first.without == pytest.approx(1 / 3) and second.without == 1
    assert whole.negatives == pytest.approx(3 / 5)
    assert second.naive_floor == pytest.approx((math.log(3) + math.log(2)) / 2)
    assert whole.start == pytest.approx(math.log(4))  # a, b, c, x
    assert whole.chance == pytest.approx((2 + 2 + 1 + 1 + 1) / 5 / 4)


def test_negatives_that_the_loss_does_not_use_are_not_there() -> None:
    found = share(pairs_of("q > a > b, x", "r > b"), explicit_negatives=False)
    assert (found.negatives, found.without, found.same_target) == (0, 1, 0)
    assert found.start == pytest.approx(math.log(2))


def test_means_run_over_pairs_of_all_batches() -> None:
    batches = [pairs_of("q > a", "r > a"), pairs_of("q > a") + pairs_of("s > b", source="B")]
    found: Composition = compose(iter(batches), LossConfig())
    assert found.batches == 2 and found.sources == (1, 2)
    assert found.shares["A"].pairs == 1.5 and found.shares["B"].pairs == 1  # where there are any
    assert found.shares["A"].same_target == pytest.approx(2 / 3)


def test_lines_stand_under_their_headings() -> None:
    head, *rows = compose([pairs_of("q > a > n", "r > a")], LossConfig()).lines()
    assert [name for name, _ in (head, *rows)] == ["source", "A", ALL]
    assert {len(line) for _, line in (head, *rows)} == {len(head[1])}
    assert rows[0][1].split() == ["2", "0.00", "1.00", "0.69", "0.00", "0.69", "50.00", "%", "0.50", "50.0", "%"]
