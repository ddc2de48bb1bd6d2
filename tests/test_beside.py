"""Reports: published models beside ours, smaller vectors, other metrics, and what 36 sets need."""

from __future__ import annotations

from typing import Any

import pytest

from tests.test_report import Page, results
from vlm2vec import standings
from vlm2vec.report import beside, markdown, render, smaller, summary, table
from vlm2vec.standings import Published
from vlm2vec.suite import load_suite


@pytest.fixture(scope="module")
def published() -> Published:
    found = standings.load("mmeb")
    assert found is not None
    return found


def mmeb(score: float = 0.62, **changes: Any) -> dict[str, Any]:
    """Results over all 36 sets, each with the same score."""
    sets = {}
    for spec in load_suite("mmeb").sets:
        sets[spec.name] = {"meta_task": spec.meta_task, "split": spec.split, "metric": "precision@1", "score": score, "interval": None}
        sets[spec.name] |= {"n": 1000, "candidates": spec.candidates, "chance": 0.001, "ties": 0, "metrics": {}}
    keys = ("classification", "vqa", "retrieval", "grounding", "IND", "OOD", "overall", "macro")
    means = {key: {"score": score, "interval": None} for key in keys}
    return results() | {"suite": "mmeb", "sets": sets, "means": means, "examples": {}} | changes


def cells(markdown_line: str) -> list[str]:
    return [cell.strip(" *") for cell in markdown_line.split("|")[1:-1]]


def test_our_means_stand_among_the_published_ones(published: Published) -> None:
    text = markdown(mmeb(), None, None, published)
    lines = text[text.index("## Beside") :].splitlines()
    rows = [cells(line) for line in lines if line.startswith("|")][2:]
    overall = [float(row[1].rstrip("†")) for row in rows]
    assert len(rows) == 1 + 34 and overall == sorted(overall, reverse=True)
    assert ["This model", *["62.0"] * 7, "this report", ""] in rows
    qwen = next(row for row in rows if row[0] == "VLM2Vec-Qwen2-VL-2B")
    assert qwen[1] == "59.3†" and qwen[-1] == r"59.7 (harness-2.0.1, harness-2.0.0, v2-paper-table-2); 60.1 (readme)"
    assert "SigLIP, Retrieval: printed 31.6, the scores of its sets give 44.1" in text
    assert "arXiv:2410.05160" in text and "Overall 62.0 %: of 34 published models, 11 score higher." in text


def test_ours_are_marked_by_word_and_class(published: Published) -> None:
    page = Page(render(mmeb(), mmeb(0.30), None, None, None, published))
    assert [attributes["class"] for attributes in page.all("tr") if attributes.get("class") == "ours"] == ["ours", "ours"]
    assert "This model" in page.text and "This model, before training" in page.text
    assert page.stack == [] and {found["href"] for found in page.all("a")} >= {"#published"}


def test_best_published_score_stands_in_the_row_of_its_set(published: Published) -> None:
    line = next(line for line in markdown(mmeb(), None, None, published).splitlines() if line.startswith("| CIRR |"))
    assert cells(line)[-1] == "57.3 VLM2Vec-V2.0 (Qwen2-VL-2B)"
    assert render(mmeb(), published=published).count('class="best"') == 36 + 1  # and the legend
    assert 'class="best"' not in render(mmeb())


def test_means_over_other_sets_are_not_put_beside_published_ones(published: Published) -> None:
    after = mmeb()
    del after["sets"]["OVEN"]  # retrieval, OOD
    after["protocol"] = after["protocol"] | {"limit": 50}
    found = beside.beside(after, None, published)
    ours = found.standings[0]
    assert ours.ours and [key for key, value in ours.means.items() if value is None] == ["retrieval", "OOD", "overall"]
    assert found.cautions[0].startswith("Only 50 queries per set") and found.cautions[1].startswith("Means of which not every set")
    assert beside.place(found) == "Without an overall mean there is no place for this model among the 34 published ones."


def test_the_mean_that_is_published_leads(published: Published) -> None:
    after = mmeb()
    after["means"]["macro"] = {"score": 0.7, "interval": None}
    assert summary.sentence(summary.summarize(after, None, published)).startswith("Overall precision@1 is 62.0 %")
    assert summary.sentence(summary.summarize(after)).startswith("Macro precision@1 is 70.0 %")


GRID = [
    {"dims": dims, "precision": precision, "sets": {}, "means": {"overall": {"score": score}, "macro": {"score": score}}}
    for dims, precision, score in [(256, "binary", 0.40), (256, "float32", 0.49), (100, "int8", 0.45), (100, "binary", None)]
]


def test_smaller_vectors_have_their_bytes_and_change() -> None:
    found = smaller.sizes(results() | {"grid": GRID})
    assert [(size.dims, size.precision, size.vector_bytes) for size in found] == [
        (512, "float32", 2048),  # the vectors as they are
        (256, "float32", 1024),
        (100, "int8", 104),
        (256, "binary", 32),
        (100, "binary", 13),
    ]
    assert [size.change and round(size.change, 6) for size in found] == [0.0, -0.01, -0.05, -0.1, None]


def test_smaller_vectors_are_told_everywhere() -> None:
    after = results() | {"grid": GRID}
    page = " ".join("".join(Page(render(after)).text).split())
    assert "Smaller vectors" in page and "-1.0 · 1,024 B" in page
    assert "| 100 | int8 | 104 | -5.0 | 45.0 |" in markdown(after)
    lines = table(after).splitlines()
    assert ["256", "binary", "32", "-10.0", "40.0", "40.0"] in [line.split() for line in lines] and max(map(len, lines)) <= 100
    assert "Smaller vectors" not in render(results()) + markdown(results())


def test_other_metrics_are_a_table_of_their_own() -> None:
    text = " ".join("".join(Page(render(results())).text).split())
    assert "Other metrics" in text and "mrr@10" in text and "69.3" in text


def test_times_of_sets_are_told_as_the_slowest() -> None:
    after = results() | {"timing": {"encode_seconds": 9.5, "sets": {f"set {index}": float(index) for index in range(36)}}}
    text = markdown(after)
    assert "`encode_seconds 9.5, slowest set 35 35.0 s, set 34 34.0 s, set 33 33.0 s`" in text
    after["protocol"] = {"data": {f"set {index}": "d" * 64 for index in range(36)}}
    assert "protocol: data: `36 values, sha256 " in markdown(after)


def test_many_sets_fold_their_table() -> None:
    assert "All scores as a table" in "".join(Page(render(mmeb())).text)
    assert "All scores as a table" not in "".join(Page(render(results())).text)
