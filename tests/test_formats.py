"""Foreign formats: the files per set hold what was predicted, row by row; the submission holds what was measured and nothing else."""

from __future__ import annotations

import ast
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.measured import prediction, results
from vlm2vec import formats
from vlm2vec.errors import InputError, PathError

VALUES = {"Groceries": [1, 0, 1], "Names": [0, 0, 1]}
MMEB = {"ImageNet-1K": ("classification", "IND"), "OVEN": ("retrieval", "OOD")}
ALL = dict.fromkeys(formats.METRICS, 0.25)


@pytest.fixture
def lines() -> list[dict[str, Any]]:
    found = [prediction(name, row, value) for name, row_values in VALUES.items() for row, value in enumerate(row_values)]
    found[0]["retrieved"][0] |= {"text": '<|image_1|>\nit\'s "this"\n', "image": "eval_images/Groceries/a b.jpg"}
    return found


def test_score_file_counts_the_hits(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    paths = formats.write_reference_files(results(VALUES), reversed(lines), tmp_path)
    assert [path.name for path in paths] == ["Groceries_score.json", "Groceries_pred.txt", "Names_score.json", "Names_pred.txt"]
    assert json.loads((tmp_path / "Groceries_score.json").read_text()) == {"acc": 2 / 3, "num_correct": 2, "num_pred": 3}


def test_prediction_file_has_a_tuple_per_row_in_the_order_of_the_rows(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    formats.write_reference_files(results(VALUES), reversed(lines), tmp_path)
    rows = (tmp_path / "Groceries_pred.txt").read_text().splitlines()
    assert [ast.literal_eval(row) for row in rows] == [
        ('<|image_1|>\nit\'s "this"\n', "Groceries/a b.jpg"),  # relative to the picture folder, as in the data
        (lines[1]["retrieved"][0]["text"], ""),
        ("candidate 0", ""),
    ]


def test_a_set_that_is_not_scored_by_hits_is_left_out(
    tmp_path: Path, lines: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    made = results(VALUES)
    made["sets"]["Names"]["metric"] = "ndcg_linear@5"
    with caplog.at_level(logging.WARNING, "vlm2vec"):
        assert len(formats.write_reference_files(made, lines, tmp_path)) == 2
    assert "Names: scored by ndcg_linear@5" in caplog.text


def test_predictions_of_other_results_are_refused(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    with pytest.raises(InputError, match="set Names: 2 predictions, the results tell of 3"):
        formats.write_reference_files(results(VALUES), lines[:-1], tmp_path)
    with pytest.raises(InputError, match="predictions of set 'Icons'"):
        formats.write_reference_files(results(VALUES), [*lines, prediction("Icons", 0, 1)], tmp_path)
    with pytest.raises(InputError, match="format 1 found, 2 expected"):
        formats.write_reference_files(results(VALUES, format=1), lines, tmp_path)


def test_the_name_of_a_set_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    made = results({"../evil": [1]}, {"../evil": ("vqa", "IND")})
    with pytest.raises(PathError):
        formats.write_reference_files(made, [prediction("../evil", 0, 1)], tmp_path / "out")


def mmeb(**metrics: float) -> dict[str, Any]:
    made = results({name: [1, 0] for name in MMEB}, MMEB, suite="mmeb")
    for entry in made["sets"].values():
        entry["metrics"] = ALL | metrics
    return made


def test_submission_has_the_measured_sets_in_the_leaderboards_order(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "vlm2vec"):
        made = formats.submission(mmeb(), {"model_name": "ours", "report_generated_date": "2026-01-01"})
    assert made["metadata"] == {"model_name": "ours", "data_source": "Self-Reported", "report_generated_date": "2026-01-01"}
    assert list(made["metrics"]) == ["image"] and list(made["metrics"]["image"]) == ["ImageNet-1K", "OVEN"]
    entry = made["metrics"]["image"]["OVEN"]
    assert list(entry) == [*formats.METRICS, "num_pred", "num_data"] and entry["num_data"] == 2 and entry["hit@1"] == 0.25
    assert len(formats.METRICS) == 24 and formats.METRICS[:4] == ("hit@1", "hit@5", "hit@10", "ndcg_linear@1")
    assert "34 of 36 sets are left out" in caplog.text and "not measured" not in caplog.text


def test_what_was_not_measured_is_left_out_and_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    made = mmeb()
    del made["sets"]["OVEN"]["metrics"]["hit@1"], made["sets"]["ImageNet-1K"]["metrics"]["mrr@10"]
    made["protocol"]["limit"] = 2
    with caplog.at_level(logging.WARNING, "vlm2vec"):
        image = formats.submission(made, {"model_name": "ours"})["metrics"]["image"]
    assert list(image) == ["ImageNet-1K"] and "mrr@10" not in image["ImageNet-1K"]
    assert "ImageNet-1K: mrr@10 not measured" in caplog.text and "only 2 queries per set" in caplog.text


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "model_name is required"),
        ({"model_name": ""}, "model_name: expected str, got ''"),
        ({"model_name": "x", "size": 2}, "unknown key 'size'; known: model_name, model_backbone"),
        ({"model_name": "x", "embedding_dimension": 1536.0}, "embedding_dimension: expected int"),
        ({"model_name": "x", "model_size": True}, "model_size: expected float"),
    ],
)
def test_metadata_is_checked(metadata: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        formats.submission(mmeb(), metadata)


def test_only_mmeb_can_be_submitted() -> None:
    with pytest.raises(InputError, match="suite mini: the leaderboard takes mmeb only"):
        formats.submission(results(VALUES), {"model_name": "x"})
    assert formats.submission(mmeb(), {"model_name": "x", "model_size": 2})["metadata"]["model_size"] == 2
