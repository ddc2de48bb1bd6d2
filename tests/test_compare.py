"""Comparing evaluations: what is paired with what, what is refused, what the verdicts rest on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.measured import SETS, prediction, results, write, write_lines
from vlm2vec import results as files
from vlm2vec.compare import Comparison, Row, compare, flips, mean_weights, pair, to_json
from vlm2vec.errors import InputError
from vlm2vec.results import Measured, Outcomes

N = 200


def hits(right: range | list[int], count: int = N) -> list[float]:
    """Hits on the queries of `right`."""
    return [1.0 if query in right else 0.0 for query in range(count)]


BASE = {"Groceries": hits(range(100)), "Icons": hits(range(50)), "Questions": hits(range(20)), "Names": hits(range(150))}
# Groceries: 30 gained, 5 lost; Icons: 3 gained, 1 lost; the others unchanged
OTHER = BASE | {"Groceries": hits(range(5, 130)), "Icons": hits([*range(1, 50), 60, 61, 62])}


def read(folder: Path, name: str, values: dict[str, list[float]], **changes: Any) -> Measured:
    return files.read(write(folder, name, values, **changes))


@pytest.fixture
def both(tmp_path: Path) -> list[Measured]:
    return [read(tmp_path, "base@1", BASE), read(tmp_path, "other@2", OTHER, model={"path": "runs/other", "fingerprint": "be" * 32})]


def row(comparison: Comparison, key: str, which: int = 0) -> Row:
    contrast = comparison.contrasts[which]
    return next(row for row in (*contrast.sets, *contrast.means) if row.key == key)


def test_flips_scores_and_exact_p_values_of_sets(both: list[Measured]) -> None:
    found = row(compare(both), "Groceries")
    assert (found.won, found.lost, found.queries) == (30, 5, N)
    assert (found.first, found.second, found.difference) == pytest.approx((0.5, 0.625, 0.125))
    closed = 2 * sum(math.comb(35, count) for count in range(6)) / 2**35
    assert found.p == pytest.approx(closed) and found.p_holm == pytest.approx(4 * closed)
    assert found.interval[0] < 0.125 < found.interval[1] and found.interval[0] > 0.05


def test_verdicts(both: list[Measured]) -> None:
    comparison = compare(both)
    assert {key: row(comparison, key).verdict for key in SETS} == {
        "Groceries": "better",
        "Icons": "noise",
        "Questions": "identical",
        "Names": "identical",
    }
    assert row(comparison, "overall").verdict == "better" and row(comparison, "vqa").verdict == "identical"
    backwards = compare(both[::-1])
    assert row(backwards, "Groceries").verdict == "worse" and row(backwards, "overall").difference < 0


def test_holm_decides_which_sets_differ(tmp_path: Path) -> None:
    """9 against 1 is p = 0.021: a difference for one set, none as the smallest of four."""
    first = {name: hits(range(1)) for name in SETS}
    second = first | {"Icons": hits(range(1, 10))}
    alone = compare([read(tmp_path, "a", {"Icons": first["Icons"]}), read(tmp_path, "b", {"Icons": second["Icons"]})])
    among = compare([read(tmp_path, "c", first), read(tmp_path, "d", second)])
    assert row(alone, "Icons").verdict == "better" and row(among, "Icons").verdict == "noise"
    assert row(among, "Icons").p == row(alone, "Icons").p == pytest.approx(22 / 1024)


def test_means_are_unweighted_over_sets_and_nested_for_macro(both: list[Measured]) -> None:
    comparison = compare(both)
    assert [found.key for found in comparison.contrasts[0].means] == [
        "classification",
        "vqa",
        "retrieval",
        "IND",
        "OOD",
        "overall",
        "macro",
    ]
    assert row(comparison, "overall").difference == pytest.approx((0.125 + 0.01) / 4)
    assert row(comparison, "macro").difference == pytest.approx((0.125 + 0.01) / 2 / 3)
    assert row(comparison, "OOD").first == pytest.approx((0.25 + 0.75) / 2)
    assert (row(comparison, "overall").won, row(comparison, "overall").lost, row(comparison, "overall").queries) == (33, 6, 4 * N)


def test_weights_of_every_mean_sum_to_one() -> None:
    entries = {name: {"meta_task": kind, "split": split} for name, (kind, split) in SETS.items()}
    weights = mean_weights(entries)
    assert all(sum(found.values()) == pytest.approx(1.0) for found in weights.values())
    assert weights["macro"] == pytest.approx({"Groceries": 1 / 6, "Icons": 1 / 6, "Questions": 1 / 3, "Names": 1 / 3})


def test_identical_inputs_are_identical(both: list[Measured]) -> None:
    comparison = compare([both[0], both[0]])
    contrast = comparison.contrasts[0]
    assert {found.verdict for found in (*contrast.sets, *contrast.means)} == {"identical"}
    assert {found.p for found in (*contrast.sets, *contrast.means)} == {1.0}


def test_real_values_are_compared_too(tmp_path: Path) -> None:
    stream = np.random.default_rng(0)
    ranks = stream.integers(1, 30, N)
    first = {"Names": (1 / ranks).tolist()}
    better = {"Names": (1 / np.maximum(1, ranks - stream.integers(0, 6, N))).tolist()}
    metric = {"sets": {"Names": results(first)["sets"]["Names"] | {"metric": "mrr@10"}}}
    second = {"sets": {"Names": results(better)["sets"]["Names"] | {"metric": "mrr@10"}}}
    comparison = compare([read(tmp_path, "a", first, **metric), read(tmp_path, "b", better, **second)])
    assert comparison.metrics == ("mrr@10",) and row(comparison, "Names").verdict == "better" and row(comparison, "Names").lost == 0


def test_equal_inputs_give_equal_bytes(both: list[Measured]) -> None:
    first, second = (json.dumps(to_json(compare(both)), allow_nan=False) for _ in range(2))
    assert first == second
    tree = json.loads(first)
    assert tree["format"] == 1 and tree["contrasts"][0]["sets"][0]["verdict"] == "better" and tree["level"] == 0.05


# -- pairing -----------------------------------------------------------------------------------------------------------------------------


def outcomes(*ids: str) -> Outcomes:
    return Outcomes(ids, np.zeros(len(ids)), np.zeros(len(ids), bool), np.zeros(len(ids), np.int64))


def test_queries_are_paired_by_id_and_copies_in_their_order() -> None:
    left, right = pair(outcomes("a", "b", "a", "c"), outcomes("c", "a", "d", "a"))
    assert left.tolist() == [0, 2, 3] and right.tolist() == [1, 3, 0]
    left, right = pair(outcomes("a"), outcomes("b"))
    assert left.tolist() == right.tolist() == []


def test_the_order_of_the_predictions_does_not_matter(tmp_path: Path, both: list[Measured]) -> None:
    lines = [prediction(name, query, value) for name, values in OTHER.items() for query, value in enumerate(values)]
    shuffled = files.read(write_lines(tmp_path, "shuffled", results(OTHER), lines[::-1]))
    assert compare([both[0], shuffled]).contrasts[0].sets == compare(both).contrasts[0].sets


# -- what may be compared ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"protocol": {"ties": "reference"}}, "not measured alike: ties: pessimistic in A, reference in B. --force"),
        ({"protocol": {"limit": 50}}, "limit: none in A, 50 in B"),
        ({"protocol": {"suite_digest": "ee" * 32}}, "suite_digest: d1d1d1d1d1d1… in A, eeeeeeeeeeee… in B"),
        ({"protocol": {"new_rule": True}}, "new_rule: none in A, True in B"),
        ({"suite": "other"}, "suite: mini in A, other in B"),
    ],
)
def test_other_protocols_are_refused_by_key(change: dict[str, Any], words: str, both: list[Measured], tmp_path: Path) -> None:
    other = read(tmp_path, "unlike", OTHER, **change)
    with pytest.raises(InputError, match=words):
        compare([both[0], other])
    forced = compare([both[0], other], force=True)
    assert forced.contrasts[0].sets == compare(both).contrasts[0].sets and len(forced.forced) == 1


def test_what_depends_on_the_model_or_the_interval_does_not_forbid(both: list[Measured], tmp_path: Path) -> None:
    protocol = {"pooling": "mean", "bootstrap": 99, "seed": 3, "intervals": "others"}
    assert not compare([both[0], read(tmp_path, "mean", OTHER, protocol=protocol)]).forced


def test_other_metrics_and_candidates_are_refused_by_set(both: list[Measured], tmp_path: Path) -> None:
    sets = results(OTHER)["sets"]
    sets["Icons"] |= {"metric": "hit@5", "candidates": 9}
    with pytest.raises(InputError, match="metric of Icons: precision@1 in A, hit@5 in B; candidates of Icons: 5 in A, 9 in B"):
        compare([both[0], read(tmp_path, "unlike", OTHER, sets=sets)])


def test_digests_by_set_are_looked_at_for_common_sets_only(tmp_path: Path) -> None:
    digests = {"Groceries": "aa", "Icons": "bb"}
    one = read(tmp_path, "one", {key: BASE[key] for key in digests}, protocol={"data": digests, "subsets": ["Groceries", "Icons"]})
    two = read(tmp_path, "two", {"Groceries": OTHER["Groceries"]}, protocol={"data": {"Groceries": "aa"}, "subsets": ["Groceries"]})
    assert compare([one, two]).left_out == {"Icons": "A"}
    bad = read(tmp_path, "bad", {"Groceries": OTHER["Groceries"]}, protocol={"data": {"Groceries": "cc"}, "subsets": ["Groceries"]})
    with pytest.raises(InputError, match="data of Groceries: aa in A, cc in B"):
        compare([one, bad])


def test_other_queries_are_refused_and_by_force_the_common_ones_compared(tmp_path: Path) -> None:
    lines = [prediction("Names", query, 1) for query in range(5, 25)]
    first = read(tmp_path, "a", {"Names": hits(range(20), 20)})
    other = files.read(write_lines(tmp_path, "b", results({"Names": [1] * 20}), lines))
    with pytest.raises(InputError, match="queries of Names: 5 only in A, 5 only in B"):
        compare([first, other])
    assert row(compare([first, other], force=True), "Names").queries == 15
    apart = files.read(write_lines(tmp_path, "c", results({"Names": [1] * 20}), [prediction("Names", query, 1) for query in range(50, 70)]))
    with pytest.raises(InputError, match="set Names: A and B have no query in common"):
        compare([first, apart], force=True)


def test_sets_that_not_all_have_are_listed_and_left_out(tmp_path: Path, both: list[Measured]) -> None:
    """A run over fewer sets has another digest of the suite's data, which says nothing about the sets that are common."""
    part = {"Groceries": OTHER["Groceries"], "Icons": OTHER["Icons"]}
    third = read(tmp_path, "part", part, protocol={"subsets": ["Groceries", "Icons"], "suite_digest": "ab" * 32})
    comparison = compare([*both, third])
    assert comparison.left_out == {"Questions": "AB", "Names": "AB"} and not comparison.forced
    assert [found.key for found in comparison.contrasts[1].sets] == ["Groceries", "Icons"]
    assert row(comparison, "overall").sets == 2 and row(comparison, "overall", 1).difference == pytest.approx((0.125 + 0.01) / 2)


def test_there_must_be_something_to_compare(tmp_path: Path, both: list[Measured]) -> None:
    with pytest.raises(InputError, match="1 results given; give from 2 to 26"):
        compare(both[:1])
    with pytest.raises(InputError, match="no set is in all of the results; A has Groceries, Icons, Questions, Names; B has Else"):
        compare([both[0], files.read(write(tmp_path, "else", {"Else": [1.0]}, {"Else": ("vqa", "IND")}))])


# -- flips -------------------------------------------------------------------------------------------------------------------------------


def test_flips_are_the_queries_that_one_alone_got_right(both: list[Measured]) -> None:
    found = flips(*both, "Groceries", most=4)
    assert [flip.gained for flip in found] == [True] * 4 + [False] * 4
    for flip in found:
        assert flip.first["query_id"] == flip.second["query_id"] and flip.second["hit"] is flip.gained is not flip.first["hit"]
        assert flip.first["row"] in (range(100, 130) if flip.gained else range(5))
    assert [flip.first["row"] for flip in found[:4]] != [100, 101, 102, 103]  # chosen by hash, not by place
    assert found == flips(*both, "Groceries", most=4) and not flips(*both, "Names", most=4)
    assert len(flips(*both, "Icons", most=99)) == 4
