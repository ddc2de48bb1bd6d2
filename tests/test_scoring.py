"""The whole harness against a scorer that was written down straight from the rules, query by query."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.suites import Compass, Row, lists_with_copies, word, write_set, write_suite
from vlm2vec.data.types import Item
from vlm2vec.errors import InputError
from vlm2vec.evaluate import evaluate, scores_json
from vlm2vec.results import predictions_file
from vlm2vec.scoring import Variant
from vlm2vec.suite import load_suite

CORPUS = """suite: corpora
description: one corpus for all
root: .
sets:
- {{name: pages, meta_task: retrieval, split: OOD, path: pages, query_modality: T, target_modality: T, queries: {queries},
   candidates: {candidates}, scope: global, metric: {metric}, source: made up, licence: CC0-1.0}}
"""


class Words(Compass):
    """Rows of multiples of 1/2, so that float32 dot products are exact and ties abound."""

    model = "words"

    def row(self, item: Item) -> np.ndarray:
        return word_row(item.text)


def word_row(text: str) -> np.ndarray:
    return np.array([int(digit) - 1 for digit in text.split()[-1]]) / 4


def run(root: Path, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    evaluation = evaluate(Words(), load_suite(root), root / "cache", **options)
    return evaluation.results, list(evaluation.predictions())


# -- candidates of each query's own ------------------------------------------------------------------------------------------------------


@pytest.fixture
def listed(tmp_path: Path) -> list[Row]:
    rows = lists_with_copies()
    write_suite(tmp_path, {"words": ("retrieval", "IND", rows)})
    return rows


@pytest.mark.parametrize("protocol", ["strict", "reference"])
def test_every_query_against_a_naive_scorer(tmp_path: Path, listed: list[Row], protocol: str) -> None:
    results, predictions = run(tmp_path, protocol=protocol)
    found = {line["row"]: line["hit"] for line in predictions}
    assert found == {number: naive_hit(row, protocol) for number, row in enumerate(listed)}
    assert results["sets"]["words"]["score"] == sum(found.values()) / 200
    assert sum(line["ties"] > 0 for line in predictions) == results["sets"]["words"]["ties"] > 20


def naive_hit(row: Row, protocol: str) -> bool:
    (query, _), candidates = row
    scores = [float(np.dot(word_row(query), word_row(text))) for text, _ in candidates]
    if protocol == "reference":  # the first of the best, and what it says is compared
        return candidates[int(np.argmax(scores))] == candidates[0]
    return all(score < scores[0] for score, candidate in zip(scores, candidates, strict=True) if candidate != candidates[0])


# -- one corpus, several right answers ---------------------------------------------------------------------------------------------------


def write_corpus(root: Path, metric: str) -> tuple[list[str], list[str], dict[int, dict[int, int]]]:
    """Queries, corpus without copies, and the grades by row."""
    dice = random.Random(11)
    queries = [f"{number} {word(dice)}" for number in range(60)]
    corpus = list(dict.fromkeys(word(dice) for _ in range(150)))
    grades = {query: {page: dice.randint(1, 3) for page in dice.sample(range(len(corpus)), dice.randint(1, 4))} for query in range(60)}
    folder = root / "pages"
    folder.mkdir()
    rows = {
        "queries": [{"query-id": f"q{index}", "query": text} for index, text in enumerate(queries)],
        "corpus": [{"corpus-id": f"d{index}", "text": text} for index, text in enumerate(corpus)],
        "qrels": [{"query-id": f"q{q}", "corpus-id": f"d{d}", "score": grade} for q, pages in grades.items() for d, grade in pages.items()],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "datasets.yaml").write_text(CORPUS.format(queries=60, candidates=len(corpus), metric=metric))
    return queries, corpus, grades


@pytest.mark.parametrize("protocol", ["strict", "reference"])
@pytest.mark.parametrize("metric", ["hit@1", "ndcg_linear@5", "recall@10", "mrr@10", "map@5"])
def test_a_corpus_with_graded_answers_against_a_naive_scorer(tmp_path: Path, metric: str, protocol: str) -> None:
    queries, corpus, grades = write_corpus(tmp_path, metric)
    results, predictions = run(tmp_path, protocol=protocol)
    wanted = [naive_value(metric, naive_order(queries[row], corpus, grades[row], protocol), grades[row]) for row in range(60)]
    assert {line["row"]: line["value"] for line in predictions} == pytest.approx(dict(enumerate(wanted)))
    assert results["sets"]["pages"]["score"] == pytest.approx(np.mean(wanted))
    assert results["sets"]["pages"]["metrics"]["hit@5"] >= results["sets"]["pages"]["metrics"]["hit@1"]


def naive_order(query: str, corpus: list[str], grades: dict[int, int], protocol: str) -> list[int]:
    scores = [float(np.dot(word_row(query), word_row(text))) for text in corpus]
    rule = (lambda page: page) if protocol == "reference" else (lambda page: grades.get(page, 0))
    return sorted(range(len(corpus)), key=lambda page: (-scores[page], rule(page)))


def naive_value(metric: str, order: list[int], grades: dict[int, int]) -> float:
    family, k = metric.split("@")[0], int(metric.split("@")[1])
    places = [place for place, page in enumerate(order, 1) if page in grades]
    if family == "hit":
        return float(places[0] <= k)
    if family == "mrr":
        return 1 / places[0] if places[0] <= k else 0.0
    if family == "recall":
        return sum(place <= k for place in places) / len(grades)
    if family == "map":
        return sum(number / place for number, place in enumerate(places, 1) if place <= k) / min(len(grades), k)
    gain = sum(grades.get(page, 0) / np.log2(place + 1) for place, page in enumerate(order[:k], 1))
    return gain / sum(grade / np.log2(place + 1) for place, grade in enumerate(sorted(grades.values(), reverse=True)[:k], 1))


# -- what is written, and the grid -------------------------------------------------------------------------------------------------------


def test_predictions_say_what_came_of_every_query(tmp_path: Path, listed: list[Row]) -> None:
    evaluation = evaluate(Words(), load_suite(tmp_path), tmp_path / "cache")
    evaluation.write(tmp_path / "model@digest.json")
    lines = [json.loads(line) for line in predictions_file(tmp_path / "model@digest.json").read_text().splitlines()]
    assert lines == list(evaluation.predictions()) and len(lines) == 200
    assert json.loads((tmp_path / "model@digest.json").read_text()) == evaluation.results
    assert len({line["query_id"] for line in lines}) == 200
    for line in lines:
        (query, _), candidates = listed[line["row"]]
        assert (line["query"]["text"], line["gold"]["text"]) == (query, candidates[0][0])
        assert line["retrieved"][0]["gold"] == line["hit"] == (line["gold_rank"] == 1) == bool(line["value"])
        texts = [item["text"] for item in line["retrieved"]]
        assert len(texts) == len(set(texts)) == min(5, len({text for text, _ in candidates}))


def test_the_order_of_rows_changes_predictions_by_their_row_numbers_alone(tmp_path: Path, listed: list[Row]) -> None:
    results, predictions = run(tmp_path)
    write_set(tmp_path, "words", listed[::-1])
    again, reversed_predictions = run(tmp_path)
    assert scores_json(again) == scores_json(results)
    assert [{**line, "row": 199 - line["row"]} for line in reversed_predictions] == predictions


class Long(Words):
    """The words behind a number that is never zero, for the first few numbers must not all be."""

    model = "long"

    def row(self, item: Item) -> np.ndarray:
        return np.append(0.25, super().row(item))


def test_shorter_and_coarser_vectors_are_scored_in_the_same_run(tmp_path: Path, listed: list[Row]) -> None:
    variants = [Variant(2), Variant(None, "int8"), Variant(3, "binary"), Variant(5)]
    results = evaluate(Long(), load_suite(tmp_path), tmp_path / "cache", variants=variants).results
    cells = results["grid"]
    assert [(cell["dims"], cell["precision"]) for cell in cells] == [(2, "float32"), (5, "int8"), (3, "binary"), (5, "float32")]
    whole = results["sets"]["words"]["score"]
    assert cells[3]["sets"]["words"]["score"] == whole == cells[3]["means"]["overall"]["score"]
    assert cells[0]["sets"]["words"]["score"] < whole  # most of the numbers are gone
    assert set(cells[0]["means"]) == set(results["means"])
    assert "grid" in json.loads(scores_json(results)) and run(tmp_path)[0]["grid"] == []
    with pytest.raises(InputError, match="dims: expected 1 to 5"):
        evaluate(Long(), load_suite(tmp_path), tmp_path / "cache", variants=[Variant(6)])
