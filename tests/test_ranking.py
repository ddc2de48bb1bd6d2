"""Positions, ties and winners against sorting whole lists, for candidates of all kinds and corpora in pieces."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm2vec import ranking
from vlm2vec.errors import DataError, InputError, NonFiniteError
from vlm2vec.quantize import PRECISIONS, Quantized, exact, quantize
from vlm2vec.ranking import TIES, Ranking, candidate_scores, rank, similarity


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def tied_rows(stream: np.random.Generator, count: int, dims: int = 3) -> np.ndarray:
    """Rows of +-1 at unit length: eight directions at three dims, four scores."""
    return unit(stream.choice([-1.0, 1.0], size=(count, dims)))


class Case:
    """Random queries over few directions, with ragged candidate lists that repeat entries and one to four graded relevant candidates."""

    def __init__(self, seed: int, queries: int = 30, targets: int = 40, dims: int = 3) -> None:
        stream = np.random.default_rng(seed)
        self.query, self.target = tied_rows(stream, queries, dims), tied_rows(stream, targets, dims)
        self.candidates = [stream.integers(0, targets, stream.integers(5, 60)) for _ in range(queries)]
        self.relevant = [
            stream.choice(np.unique(row), min(len(np.unique(row)), stream.integers(1, 5)), replace=False) for row in self.candidates
        ]
        self.grades = [stream.integers(1, 4, len(row)).astype(np.float32) for row in self.relevant]

    def rank(self, **options: object) -> Ranking:
        given = {"targets": self.target, "candidates_QM": self.candidates, "top": 7} | options
        return rank(self.query, relevant_QR=self.relevant, grades_QR=self.grades, **given)  # type: ignore[arg-type]


def sort_whole_list(case: Case, query: int, members: list[int], ties: str) -> tuple[list[int], list[int], int]:
    """Positions of the relevant candidates, the sorted list, and the ties of the best relevant one: by the plain meaning of the rules."""
    grade = dict(zip(case.relevant[query].tolist(), case.grades[query].tolist(), strict=True))
    score = {index: float(np.sign(case.query[query]) @ np.sign(case.target[index])) for index in members}
    place = {index: members.index(index) for index in members}
    key = {
        "pessimistic": lambda index: (-score[index], grade.get(index, 0), index),
        "reference": lambda index: (-score[index], place[index]),
    }[ties]
    order = sorted(set(members), key=key)
    best = max(score[index] for index in grade)
    return [order.index(index) + 1 for index in grade], order, sum(score[index] == best and index not in grade for index in score)


def same(left: Ranking, right: Ranking) -> bool:
    """Equal to the last bit."""
    return all(np.array_equal(a, b) for x, y in zip(astuple(left), astuple(right), strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("everything", [False, True], ids=["local", "global"])
def test_ranking_equals_sorting_every_list(ties: str, everything: bool) -> None:
    tied = 0
    for seed in range(10):
        case = Case(seed)
        found = case.rank(ties=ties, **({"candidates_QM": None} if everything else {}))
        for query in range(30):
            members = list(range(40)) if everything else case.candidates[query].tolist()
            positions, order, equal = sort_whole_list(case, query, members, ties)
            assert found.position_QR[query].tolist() == positions
            assert found.top_QK[query].tolist() == order[:7]
            assert found.ties_Q[query] == equal
            exact_scores = case.target[order[:7]].astype(np.float64) @ case.query[query]
            np.testing.assert_allclose(found.top_score_QK[query], exact_scores, atol=1e-6)
            tied += equal
    assert tied > 500


@pytest.mark.parametrize("ties", TIES)
def test_positions_from_scores_of_others_are_those_of_the_ranking(ties: str) -> None:
    stream = np.random.default_rng(2)
    query, targets = tied_rows(stream, 30), tied_rows(stream, 12)
    listed = [stream.permutation(12)[: stream.integers(3, 12)] for _ in query]
    places = [stream.permutation(len(row))[: stream.integers(1, 3)] for row in listed]
    grades = [stream.integers(1, 3, len(row)) for row in places]
    ordered = [np.sort(row) if ties == "pessimistic" else row for row in listed]  # the order that decides between equal grades
    places = [np.flatnonzero(np.isin(row, members[place])) for row, members, place in zip(ordered, listed, places, strict=True)]
    ranked = rank(query, targets, listed, [row[place] for row, place in zip(ordered, places, strict=True)], grades, ties)
    scores = candidate_scores(query, targets, ordered)
    found = ranking.positions(scores, places, grades, ties)
    assert ranked.ties_Q.sum() > 10
    assert [row.tolist() for row in found] == [row.tolist() for row in ranked.position_QR]


def test_by_hand() -> None:
    """Scores 1, 0.6, 0.6, 0.6, 0; relevant are the second (grade 2), the third (grade 1) and the last (grade 3)."""
    target = np.float32([[1, 0], [0.6, 0.8], [0.6, -0.8], [0.6, 0.8], [0, 1]])
    given = {"relevant_QR": [[1, 2, 4]], "grades_QR": [[2, 1, 3]], "top": 4}
    for candidates in (None, [np.arange(5)]):
        pessimistic, reference = (rank(np.float32([[1, 0]]), target, candidates, ties=ties, **given) for ties in TIES)
        assert pessimistic.position_QR[0].tolist() == [4, 3, 5] and pessimistic.top_QK[0].tolist() == [0, 3, 2, 1]
        assert reference.position_QR[0].tolist() == [2, 3, 5] and reference.top_QK[0].tolist() == [0, 1, 2, 3]
        assert pessimistic.ties_Q.tolist() == reference.ties_Q.tolist() == [1]
        assert pessimistic.top_score_QK[0].tolist() == pytest.approx([1, 0.6, 0.6, 0.6])


def test_reference_rule_follows_the_list_not_the_index() -> None:
    target = np.float32([[1, 0], [1, 0], [1, 0]])
    for members, position in (([2, 0, 1], 1), ([0, 2, 1], 2), ([1, 0, 2, 2], 3), ([2, 1, 2], 1)):
        assert rank(target[:1], target, [members], [[2]], [[1]], "reference").position_QR[0].tolist() == [position]


def test_reference_rule_is_argmax_where_the_gold_is_listed_first() -> None:
    case = Case(seed=1)
    gold = [row[:1] for row in case.candidates]
    found = rank(case.query, case.target, case.candidates, gold, [[1]] * 30, "reference")
    scores = [similarity(exact(case.query[[q]]), exact(case.target[row]))[0] for q, row in enumerate(case.candidates)]
    hits = [row[np.argmax(score)] == row[0] for row, score in zip(case.candidates, scores, strict=True)]
    assert [position[0] == 1 for position in found.position_QR] == hits and 2 < sum(hits) < 28


@pytest.mark.parametrize("everything", [False, True])
def test_a_collapsed_model_is_last_everywhere(everything: bool) -> None:
    """All embeddings equal, 1000 candidates, two relevant: they stand last under our rule, first under the published one."""
    point = unit(np.random.default_rng(2).normal(size=(1, 333)))
    query, target = np.repeat(point, 20, 0), np.repeat(point, 1000, 0)
    candidates = None if everything else [np.arange(1000)] * 20
    found, published = (rank(query, target, candidates, [[0, 1]] * 20, [[1, 1]] * 20, ties) for ties in TIES)
    assert {tuple(row) for row in found.position_QR} == {(999, 1000)} and set(found.ties_Q) == {998}
    assert {tuple(row) for row in published.position_QR} == {(1, 2)}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), queries=st.integers(1, 12), targets=st.integers(5, 60), dims=st.integers(1, 6))
def test_nothing_depends_on_the_order_of_queries_candidates_and_targets(seed: int, queries: int, targets: int, dims: int) -> None:
    case = Case(seed, queries, targets, dims)
    stream = np.random.default_rng(seed)
    moved = np.argsort(shuffle := stream.permutation(targets))  # target i stands at moved[i] of the shuffled ones
    asked = stream.permutation(queries)
    for everything in (False, True):
        expected = case.rank(candidates_QM=None) if everything else case.rank()
        found = rank(
            case.query[asked],
            case.target[shuffle],
            None if everything else [moved[stream.permutation(case.candidates[q])] for q in asked],
            [moved[case.relevant[q]] for q in asked],
            [case.grades[q] for q in asked],
            top=7,
        )
        for new, old in enumerate(asked):
            by_grade = [sorted(zip(case.grades[old], row, strict=True)) for row in (expected.position_QR[old], found.position_QR[new])]
            assert by_grade[0] == by_grade[1]  # relevant candidates of equal grade and score may change places
            assert found.top_score_QK[new].tolist() == expected.top_score_QK[old].tolist()
        assert np.array_equal(found.ties_Q, expected.ties_Q[asked])


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("everything", [False, True])
def test_size_of_tiles_and_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch, ties: str, everything: bool) -> None:
    stream = np.random.default_rng(3)
    case = Case(seed=3, targets=300, dims=4)
    case.query, case.target = unit(stream.normal(size=(30, 50))), unit(stream.normal(size=(300, 50)))[stream.integers(0, 300, 300)]
    options = {"ties": ties, **({"candidates_QM": None} if everything else {})}
    expected = case.rank(**options)
    for rows, queries in ((1, 7), (7, 1), (299, 30), (10**6, 29)):
        monkeypatch.setattr(ranking, "TILE_BYTES", 8 * 50 * rows)
        monkeypatch.setattr(ranking, "QUERIES_AT_ONCE", queries)
        assert same(case.rank(**options), expected)


def test_a_list_of_all_targets_is_the_same_as_none() -> None:
    case = Case(seed=4)
    for ties in TIES:
        assert same(case.rank(ties=ties, candidates_QM=[np.arange(40)] * 30), case.rank(ties=ties, candidates_QM=None))


@pytest.mark.parametrize("top", [0, 1, 100])
def test_as_many_winners_as_asked_for_and_there_are(top: int) -> None:
    case = Case(seed=5)
    for candidates, sizes in ((None, [40] * 30), (case.candidates, [len(np.unique(row)) for row in case.candidates])):
        found = case.rank(candidates_QM=candidates, top=top)
        assert [len(row) for row in found.top_QK] == [len(row) for row in found.top_score_QK] == [min(top, size) for size in sizes]
        assert all(np.array_equal(*pair) for pair in zip(found.position_QR, case.rank(candidates_QM=candidates).position_QR, strict=True))


# -- targets of other kinds --------------------------------------------------------------------------------------------------------------


class Shards:
    """Targets in two arrays that are only ever read in slices of a few rows."""

    def __init__(self, rows: np.ndarray, most: int) -> None:
        self.parts, self.most = np.array_split(rows, 2), most

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, part: slice) -> np.ndarray:
        assert isinstance(part, slice) and part.stop - part.start <= self.most
        return np.concatenate(self.parts)[part]


def test_memory_maps_shards_and_codes_rank_as_arrays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = Case(seed=6, targets=500)
    np.save(tmp_path / "corpus.npy", case.target)
    monkeypatch.setattr(ranking, "TILE_BYTES", 8 * 3 * 64)
    mapped = {mode: np.load(tmp_path / "corpus.npy", mmap_mode=mode) for mode in ("r", "r+", "c")}
    mapped["c"][:] = case.target[::-1]  # changes that no file holds
    kinds = {"shards": Shards(case.target, 64), "codes": exact(case.target), "lazy": Quantized(case.target)} | mapped
    for candidates in (None, case.candidates):
        for name, targets in kinds.items():
            expected = case.rank(candidates_QM=candidates, targets=case.target[::-1] if name == "c" else case.target)
            assert same(case.rank(candidates_QM=candidates, targets=targets), expected), name


def test_a_memory_map_is_given_back_tile_by_tile(tmp_path: Path) -> None:
    """16 MiB of targets in tiles of 256 KiB: at the end, and while it lasts, few pages are mapped."""
    resident = Path("/proc/self/smaps_rollup")
    if not resident.exists():
        pytest.skip("needs /proc")
    rows = np.lib.format.open_memmap(tmp_path / "corpus.npy", "w+", np.float32, (1 << 16, 64))
    rows[:, 0] = 1
    rows.flush()
    corpus, seen = np.load(tmp_path / "corpus.npy", mmap_mode="r"), []
    del rows

    class Watched:
        """The map as an object that knows how much of it is mapped whenever a tile is read."""

        def __init__(self) -> None:
            self.rows = corpus

        def __len__(self) -> int:
            return len(corpus)

        def __getitem__(self, part: slice) -> np.ndarray:
            seen.append(mapped_kib())
            return corpus[part]

    def mapped_kib() -> int:
        """Resident part of the file in KiB."""
        block = Path("/proc/self/smaps").read_text().split(str(tmp_path / "corpus.npy"))[1]
        return int(next(line for line in block.splitlines() if line.startswith("Rss:")).split()[1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "TILE_BYTES", 1 << 19)
        rank(corpus[:2].copy(), Watched(), None, [[0], [1]], [[1], [1]])
    assert len(seen) > 64 and max(seen) < 1024


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dims", [None, 16, 5])
def test_quantized_targets_rank_as_their_codes(monkeypatch: pytest.MonkeyPatch, precision: str, dims: int | None) -> None:
    stream = np.random.default_rng(7)
    query, target = unit(stream.normal(size=(9, 32))), unit(stream.normal(size=(200, 32)))
    given = {"relevant_QR": [[q] for q in range(9)], "grades_QR": [[1]] * 9}
    asked = quantize(query, dims, precision)
    expected = rank(asked, quantize(target, dims, precision), None, **given)
    monkeypatch.setattr(ranking, "TILE_BYTES", 8 * 5 * 17)
    assert same(rank(asked, Quantized(target, dims, precision), None, **given), expected)
    assert same(rank(asked, Quantized(target, dims, precision), [np.arange(200)] * 9, **given), expected)
    if (precision, dims) == ("binary", 5):
        assert expected.ties_Q.min() >= 1  # six scores for 200 targets: every gold ties, and stands behind all it ties with
        scores = candidate_scores(asked, Quantized(target, dims, precision), [np.arange(200)] * 9)
        assert [row[0] for row in expected.position_QR] == [int((score >= score[q]).sum()) for q, score in enumerate(scores)]


# -- scores ------------------------------------------------------------------------------------------------------------------------------


def test_similarity_is_a_dot_product_in_float32() -> None:
    stream = np.random.default_rng(8)
    query, target = unit(stream.normal(size=(3, 17))), unit(stream.normal(size=(50, 17)))
    found = similarity(exact(query), exact(target))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, query.astype(np.float64) @ target.T, rtol=0, atol=1e-7)


def test_scores_do_not_depend_on_the_company(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = np.random.default_rng(9)
    query, target = unit(stream.normal(size=(150, 384))), unit(stream.normal(size=(700, 384)))
    members = [stream.choice(700, size=stream.integers(1, 300), replace=False) for _ in range(150)]
    monkeypatch.setattr(ranking, "QUERIES_AT_ONCE", 64)
    scores = candidate_scores(query, target, members)
    for index in range(0, 150, 7):  # one at a time, against every target, the other way round
        alone = candidate_scores(query[[index]], target[::-1], [699 - members[index][::-1]])[0][::-1]
        assert alone.tobytes() == scores[index].tobytes()
        as_float64 = query[index].astype(np.float64) @ target[members[index]].astype(np.float64).T
        assert np.abs(scores[index] - as_float64).max() < 2e-7


# -- what cannot be ranked ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("everything", [False, True])
def test_non_finite_embeddings_are_named(bad: float, everything: bool) -> None:
    case = Case(seed=10)
    options = {"candidates_QM": None} if everything else {}
    case.target[int(case.candidates[4][0]), 1] = bad
    with pytest.raises(NonFiniteError, match=f"embedding of target {case.candidates[4][0]} is NaN or infinite"):
        case.rank(**options)
    case.query[7, 2] = bad
    with pytest.raises(NonFiniteError, match="embedding of query 7 is NaN or infinite"):
        case.rank(**options)


def test_rows_that_are_not_of_unit_length_are_refused() -> None:
    case = Case(seed=11)
    with pytest.raises(DataError, match=r"embedding of target 39 has length 1\.5; expected unit rows"):
        case.rank(targets=np.concatenate([case.target[:39], 1.5 * case.target[39:]]), candidates_QM=None)
    with pytest.raises(DataError, match="queries have 3 numbers, those of targets 2"):
        case.rank(targets=case.target[:, :2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relevant_QR": [[1], []], "grades_QR": [[1], []]}, "query 1 has no relevant candidates"),
        ({"candidates_QM": [[0, 1], []]}, "query 1 has no candidates"),
        ({"candidates_QM": [[0, 2], [0]]}, "query 0: relevant candidate 1 is not among the query's candidates"),
        ({"candidates_QM": [[0, 1], [0, 3]]}, "query 1: candidate 3 does not exist; there are 3 targets"),
        ({"relevant_QR": [[1], [-1]]}, "query 1: candidate -1 does not exist"),
        ({"relevant_QR": [[1], [0, 0]], "grades_QR": [[1], [1, 2]]}, "query 1: a relevant candidate is listed twice"),
        ({"grades_QR": [[1, 2], [1]]}, r"query 0: 1 relevant candidates with grades \[1, 2\]"),
        ({"grades_QR": [[1], [0]]}, r"query 1: .* grades \[0\]; each needs one above 0"),
        ({"grades_QR": [[1], [np.nan]]}, "query 1: .* above 0"),
        ({"grades_QR": [[np.inf], [1]]}, "query 0: .* above 0"),
        ({"relevant_QR": [[1]]}, "2 queries and 1 lists of relevant candidates"),
        ({"candidates_QM": [[0, 1]]}, "2 queries and 1 lists of candidates"),
        ({"query_QD": np.empty((0, 2)), "relevant_QR": [], "grades_QR": []}, "0 queries and 0 lists"),
        ({"query_QD": np.float32([1, 0])}, r"embeddings of shape \(2,\); expected rows"),
    ],
)
def test_lists_that_cannot_be_right_are_refused(change: dict, message: str) -> None:
    point = np.float32([[1, 0]])
    given = {
        "query_QD": point[[0, 0]],
        "targets": point[[0, 0, 0]],
        "candidates_QM": None,
        "relevant_QR": [[1], [0]],
        "grades_QR": [[1], [1]],
    }
    rank(**given)
    with pytest.raises(DataError, match=message):
        rank(**(given | change))


def test_unknown_rule_is_refused() -> None:
    with pytest.raises(InputError, match="unknown rule for ties 'expected'; the rules are pessimistic, reference"):
        Case(seed=12).rank(ties="expected")
