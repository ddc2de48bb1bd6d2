from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.suites import PENCIL, TIED, Broken, Compass, Constant, Row, lists_with_copies, paint, pencil_suite, write_set, write_suite
from vlm2vec import fill as filling
from vlm2vec.cache import EmbeddingCache
from vlm2vec.data.types import Item
from vlm2vec.errors import DataError, InputError, NonFiniteError
from vlm2vec.evaluate import evaluate, load_suite, scores_json

SEED = 3


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_suite(tmp_path / "data", pencil_suite(tmp_path / "data"))
    return tmp_path / "data"


def run(root: Path, encoder: Any = None, cache: str = "cache", **options: Any) -> dict[str, Any]:
    options = {"seed": SEED, **options}
    return evaluate(encoder or Compass(), load_suite(root), root.parent / cache, **options).results


# -- scores ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PENCIL)
def test_twelve_queries_by_hand(root: Path, name: str) -> None:
    found = run(root)["sets"][name]
    assert found["score"] == sum(PENCIL[name]) / 12
    assert (found["n"], found["metric"], found["ties"]) == (12, "precision@1", TIED[name])
    assert found["interval"][0] < found["score"] < found["interval"][1]


@pytest.mark.parametrize("name", PENCIL)
def test_examples_show_what_the_pencil_says(root: Path, name: str) -> None:
    rows = pencil_suite(root)[name][2]
    right = {(query, candidates[0]): bool(hit) for (query, candidates), hit in zip(rows, PENCIL[name], strict=True)}
    examples = run(root)["examples"][name]
    assert [example["hit"] for example in examples] == [True] * 4 + [False] * 4
    for example in examples:
        (query, gold), hit = next((key, hit) for key, hit in right.items() if key == (_side(example["query"]), _side(example["gold"])))
        assert example["hit"] is hit
        assert example["retrieved"][0]["gold"] is hit is (example["gold_rank"] == 1)
        scores = [item["score"] for item in example["retrieved"]]
        assert scores == sorted(scores, reverse=True) and len(scores) <= 5
        assert example["retrieved"][example["gold_rank"] - 1]["gold"]


def _side(shown: dict[str, Any]) -> tuple[str, str]:
    return shown["text"], (shown["image"] or "").removeprefix("eval_images/")


def test_means_over_sets_and_over_meta_tasks(root: Path) -> None:
    means = run(root)["means"]
    score = {name: sum(hits) / 12 for name, hits in PENCIL.items()}
    assert list(means) == ["classification", "vqa", "retrieval", "grounding", "IND", "OOD", "overall", "macro"]
    assert means["vqa"]["score"] == score["answers"]
    assert means["IND"]["score"] == pytest.approx((score["labels"] + score["answers"]) / 2)
    assert means["OOD"]["score"] == pytest.approx((score["pictures"] + score["crops"]) / 2)
    assert means["overall"]["score"] == means["macro"]["score"] == pytest.approx(sum(score.values()) / 4)
    width = {name: mean["interval"][1] - mean["interval"][0] for name, mean in means.items()}
    assert width["overall"] < min(width["vqa"], width["retrieval"])  # a mean over independent sets is surer than a part of it


def test_macro_weighs_meta_tasks_and_overall_weighs_sets(tmp_path: Path) -> None:
    def one(hit: bool) -> list[Row]:
        return [(("@0", ""), [("right @1", ""), (f"wrong @{60 if hit else 0}", "")])]

    write_suite(tmp_path, {"a": ("vqa", "IND", one(True)), "b": ("vqa", "OOD", one(False)), "c": ("retrieval", "OOD", one(False))})
    means = run(tmp_path)["means"]
    assert {name: mean["score"] for name, mean in means.items()} == {
        "vqa": 0.5, "retrieval": 0.0, "IND": 1.0, "OOD": 0.0, "overall": pytest.approx(1 / 3), "macro": 0.25,
    }  # fmt: skip


def test_chance_counts_distinct_candidates(root: Path) -> None:
    sets = run(root)["sets"]
    assert sets["labels"]["chance"] == 0.25 and sets["labels"]["candidates"] == 4
    assert sets["crops"]["chance"] == pytest.approx((10 / 2 + 2 / 3) / 12)  # copies of a crop count once


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_a_collapsed_model_scores_zero_and_is_called_so(root: Path, noise: float) -> None:
    results = run(root, Constant(noise=noise))
    lone = {"answers": 1 / 12}  # its last query has a single candidate, which even a constant finds
    assert {name: found["score"] for name, found in results["sets"].items()} == {name: lone.get(name, 0) for name in PENCIL}
    counts = _distinct(root).items()
    assert results["warnings"] == [f"{name}: all {count} candidates within 1e-06: model collapsed?" for name, count in counts]


def _distinct(root: Path) -> dict[str, int]:
    counts = {name: len({side for _, candidates in rows for side in candidates}) for name, (_, _, rows) in pencil_suite(root).items()}
    return {**counts, "crops": counts["crops"] - 1}  # one crop is there under two names


def test_the_published_rule_gives_a_constant_full_marks(root: Path) -> None:
    results = run(root, Constant(), protocol="reference")
    assert {found["score"] for found in results["sets"].values()} == {1.0}
    assert len(results["warnings"]) == 4
    assert run(root, protocol="reference")["sets"]["answers"]["score"] == (sum(PENCIL["answers"]) + 1) / 12


def test_nan_is_an_error_that_names_the_item_and_is_not_kept(root: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"1 of \d+ embeddings are NaN or infinite, first 'cat @100'"):
        run(root, Broken())
    assert run(root, Compass())["sets"]["labels"]["score"] == sum(PENCIL["labels"]) / 12


class Words(Compass):
    """Rows of multiples of 1/2, so that float32 dot products are exact and ties abound."""

    model = "words"

    def row(self, item: Item) -> np.ndarray:
        return np.array([int(digit) - 1 for digit in item.text.split()[-1]]) / 2


@pytest.mark.parametrize("protocol", ["strict", "reference"])
def test_against_a_naive_loop_on_ties_and_duplicates(tmp_path: Path, protocol: str) -> None:
    rows = lists_with_copies()
    write_suite(tmp_path, {"words": ("retrieval", "IND", rows)})
    found = run(tmp_path, Words(), protocol=protocol)["sets"]["words"]
    assert found["score"] == sum(_naive(row, protocol) for row in rows) / len(rows)
    assert found["ties"] > 20


def _naive(row: Row, protocol: str) -> bool:
    (query, _), candidates = row
    scores = [float(np.dot(Words().row(Item(query)), Words().row(Item(text)))) for text, _ in candidates]
    if protocol == "reference":
        return candidates[int(np.argmax(scores))] == candidates[0]
    return all(score < scores[0] for score, candidate in zip(scores, candidates, strict=True) if candidate != candidates[0])


# -- the same bytes ----------------------------------------------------------------------------------------------------------------------


def test_order_of_rows_and_candidates_changes_nothing(root: Path) -> None:
    before = scores_json(run(root))
    sets = pencil_suite(root)
    for seed in range(5):
        dice = random.Random(seed)
        for name, (_, _, rows) in sets.items():
            shuffled = [(query, [candidates[0], *dice.sample(candidates[1:], len(candidates) - 1)]) for query, candidates in rows]
            write_set(root, name, dice.sample(shuffled, len(shuffled)))
        assert scores_json(run(root)) == before


@pytest.mark.parametrize("protocol", ["strict", "reference"])
def test_place_of_the_data_batch_and_cache_change_nothing(root: Path, protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(root, protocol=protocol)
    again = Compass()
    assert scores_json(run(root, again, protocol=protocol)) == scores_json(first)
    assert again.encoded == []  # everything was in the cache
    moved = root.rename(root.parent / "elsewhere")
    monkeypatch.setattr(filling, "BLOCK", 3)
    fresh = Compass()
    assert scores_json(run(moved, fresh, cache="other", protocol=protocol, chunk_tokens=7)) == scores_json(first)
    assert len(fresh.encoded) == first["timing"]["encoded"] == first["timing"]["items"]


def test_blocks_do_not_depend_on_the_order_of_rows(root: Path) -> None:
    encoders = Compass(), Compass()
    run(root, encoders[0], cache="first")
    for name, (_, _, rows) in pencil_suite(root).items():
        write_set(root, name, rows[::-1])
    run(root, encoders[1], cache="second")
    assert encoders[0].encoded == encoders[1].encoded


def test_ranks_encode_their_share_and_agree(root: Path, monkeypatch: pytest.MonkeyPatch, ranks: Callable) -> None:
    monkeypatch.setattr(filling, "BLOCK", 5)
    alone = Compass()
    whole = run(root, alone, cache="alone")

    def one(rank: int) -> None:
        encoder = Compass()
        results = run(root, encoder)
        (root.parent / f"{rank}.json").write_text(scores_json(results))
        (root.parent / f"{rank}.txt").write_text("\n".join(item.key for item in encoder.encoded))

    ranks(one)
    assert [(root.parent / f"{rank}.json").read_text() for rank in (0, 1)] == [scores_json(whole)] * 2
    shares = [(root.parent / f"{rank}.txt").read_text().split() for rank in (0, 1)]
    assert sorted(shares[0] + shares[1]) == sorted(item.key for item in alone.encoded)  # each item by one rank
    assert abs(len(shares[0]) - len(shares[1])) < 10  # two blocks


def test_each_distinct_item_is_encoded_once(root: Path) -> None:
    encoder = Compass()
    run(root, encoder)
    shown = [(item.text, tuple(image.source.read_bytes() for image in item.images)) for item in encoder.encoded]
    assert len(shown) == len(set(shown))


def test_a_cached_run_decodes_no_picture(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run(root)

    def refuse(image: Any) -> None:
        raise AssertionError(f"decoded {image}")

    monkeypatch.setattr("vlm2vec.evalsets.load_image", refuse)
    assert scores_json(run(root)) == scores_json(before)


class Mortal(Compass):
    """Dies by SIGKILL in the middle of its n-th call."""

    def window(self, items: Any) -> Any:
        self.settings["lives"].pop()
        if not self.settings["lives"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().window(items)

    def fingerprint(self) -> str:
        return Compass().fingerprint()


@pytest.mark.parametrize("seed", range(10))
def test_killed_anywhere_a_run_goes_on_to_the_same_bytes(root: Path, seed: int, monkeypatch: pytest.MonkeyPatch, forked: Callable) -> None:
    monkeypatch.setattr(filling, "BLOCK", 4)
    whole = run(root, cache="undisturbed")
    dice = random.Random(seed)
    items = whole["timing"]["items"]
    blocks = -(-items // 4)

    def disturbed() -> None:
        if seed % 2:
            run(root, Mortal(lives=[None] * dice.randint(1, blocks)))
        os.environ["VLM2VEC_FAULT"] = f"*:{dice.randint(1, 12 * blocks)}:kill"  # 12: two files per block, six points where a write can die
        run(root)

    assert forked(disturbed) == -signal.SIGKILL
    kept = len(EmbeddingCache(root.parent / "cache", Compass().fingerprint())._places)
    encoder = Compass()
    assert scores_json(run(root, encoder)) == scores_json(whole)
    assert len(encoder.encoded) == items - kept


def test_four_processes_share_a_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "BLOCK", 2)
    whole = scores_json(run(root, cache="undisturbed"))
    children = []
    for number in range(4):
        if not (child := os.fork()):
            try:
                (root.parent / f"{number}.json").write_text(scores_json(run(root)))
            finally:
                os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert [(root.parent / f"{number}.json").read_text() == whole for number in range(4)] == [True] * 4
    encoder = Compass()
    assert scores_json(run(root, encoder)) == whole and encoder.encoded == []


# -- what is missing ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(root: Path) -> Path:
    """Two sets lose pictures: one file is gone that both use, one is a web page; a third set loses its rows."""
    for file, text in {"50.png": "", "20.png": "<html>404</html>", "3.png": ""}.items():
        (root / "eval_images" / "angles" / file).unlink()
        if text:
            (root / "eval_images" / "angles" / file).write_text(text)
    (root / "eval" / "answers" / "test-00000-of-00001.parquet").unlink()
    return root


def test_everything_missing_is_listed_before_anything_is_encoded(damaged: Path) -> None:
    encoder = Compass()
    with pytest.raises(DataError) as caught:
        run(damaged, encoder)
    message = str(caught.value)
    assert "3 of 4 sets cannot be scored; nothing was encoded" in message
    for part in ("answers: ", "pictures: ", "crops: ", "50.png", "angles/20.png", "3.png", "looks like HTML"):
        assert part in message
    assert "labels: " not in message and encoder.encoded == []


def test_allowed_to_miss_sets_the_rest_is_scored_and_their_means_withheld(damaged: Path) -> None:
    results = run(damaged, allow_missing=True)
    assert list(results["sets"]) == ["labels"]
    assert [entry["name"] for entry in results["missing"]] == ["answers", "pictures", "crops"]
    assert results["means"]["classification"]["score"] == sum(PENCIL["labels"]) / 12
    withheld = {name for name, mean in results["means"].items() if mean == {"score": None, "interval": None}}
    assert withheld == {"vqa", "retrieval", "grounding", "IND", "OOD", "overall", "macro"}
    with pytest.raises(DataError, match="2 of 2 sets"):
        run(damaged, allow_missing=True, subsets=["answers", "crops"])


def test_counts_that_contradict_the_suite_are_refused(root: Path) -> None:
    rows = pencil_suite(root)["labels"][2]
    for changed, counts in ((rows[:11], "11 queries and 4"), ([(query, found[:3]) for query, found in rows], "12 queries and 3")):
        write_set(root, "labels", changed)
        with pytest.raises(DataError, match=f"{counts} candidates .* the suite says 12 and 4"):
            run(root)


def test_no_data_folder(root: Path) -> None:
    with pytest.raises(DataError, match="data folder nowhere does not exist"):
        evaluate(Compass(), load_suite(root, "nowhere"), root.parent / "cache")


# -- options -----------------------------------------------------------------------------------------------------------------------------


def test_a_limit_chooses_queries_by_content_and_keeps_their_candidates(root: Path) -> None:
    results = run(root, limit=5)
    assert {found["n"] for found in results["sets"].values()} == {5}
    assert results["sets"]["labels"]["candidates"] == 4 and results["sets"]["labels"]["chance"] == 0.25
    assert results["protocol"]["limit"] == 5 and "hash" in results["protocol"]["limit_rule"]
    assert results["protocol_digest"] != run(root)["protocol_digest"]
    for name, (_, _, rows) in pencil_suite(root).items():
        write_set(root, name, rows[::-1])
    assert scores_json(run(root, limit=5)) == scores_json(results)
    assert scores_json(run(root, limit=5, seed=SEED + 1)) != scores_json(results)


def test_subsets_and_unknown_ones(root: Path) -> None:
    results = run(root, subsets=["crops", "labels"])
    assert list(results["sets"]) == ["labels", "crops"] and results["protocol"]["subsets"] == ["crops", "labels"]
    assert results["means"]["overall"]["score"] == pytest.approx((sum(PENCIL["labels"]) + sum(PENCIL["crops"])) / 24)
    with pytest.raises(DataError, match="no set 'lables'; did you mean labels?"):
        run(root, subsets=["lables"])


def test_unknown_protocol(root: Path) -> None:
    with pytest.raises(InputError, match="strict, reference, got 'optimistic'"):
        run(root, protocol="optimistic")


def test_results_say_what_was_measured_and_on_what(root: Path) -> None:
    results = run(root, recipe_digest="abc")
    parts = "format suite description protocol protocol_digest model versions sets means grid missing warnings examples timing"
    assert list(results) == parts.split()
    assert results["model"] == {"path": "compass", "fingerprint": Compass().fingerprint(), "recipe_digest": "abc", "dims": 2}
    assert set(results["versions"]) == {"python", "torch", "transformers", "vlm2vec"}
    assert "timing" not in json.loads(scores_json(results)) and results["timing"]["items"] > 0
    paint(root, 49, "angles/40.png")  # one picture says something else now
    changed = run(root)["protocol"]
    assert [name for name in PENCIL if changed["data"][name] != results["protocol"]["data"][name]] == ["answers", "pictures"]
    assert changed | {"data": ""} == results["protocol"] | {"data": ""}
