"""Reading results with their predictions: found by either path, held against each other, refused by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.measured import prediction, results, write, write_lines
from vlm2vec import results as files
from vlm2vec.errors import InputError

VALUES = {"Groceries": [1.0, 0.0, 1.0], "Names": [0.0, 0.5]}


def test_results_are_found_by_file_and_by_folder(tmp_path: Path) -> None:
    file = write(tmp_path, "model-1.5@abc", VALUES)
    by_file, by_folder = files.read(file), files.read(str(tmp_path / "model-1.5@abc"))
    assert by_file.name == by_folder.name == "model-1.5@abc"
    assert by_file.sets["Groceries"].value_Q.tolist() == [1.0, 0.0, 1.0] and by_file.sets["Names"].hit_Q.tolist() == [False, False]


def test_predictions_are_read_back_where_they_stand(tmp_path: Path) -> None:
    measured = files.read(write(tmp_path, "m", VALUES))
    found = measured.predictions("Groceries", [2, 0])
    assert found == [prediction("Groceries", 2, 1.0), prediction("Groceries", 0, 1.0)]
    assert measured.predictions("Names", [1]) == [prediction("Names", 1, 0.5)]


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, "m", VALUES)
    with pytest.raises(InputError, match=r"nope.json not found; give a results file"):
        files.read(tmp_path / "nope.json")
    (tmp_path / "m" / "predictions.jsonl").unlink()
    with pytest.raises(InputError, match=r"predictions.jsonl not found; the predictions of every query are needed"):
        files.read(file)
    file.unlink()
    with pytest.raises(InputError, match=r"the folder .* is there, its results are not"):
        files.read(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 1}, "m.json: format 1 found, 2 expected; evaluate again"),
        ({"format": None}, "format None found"),
        ({"sets": {}}, "set Groceries has 3 predictions, the results tell of 0"),
    ],
)
def test_results_that_do_not_fit_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        files.read(write(tmp_path, "m", VALUES, **change))


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, "m", VALUES)
    made = json.loads(file.read_text())
    del made["protocol"]
    file.write_text(json.dumps(made))
    with pytest.raises(InputError, match="m.json: protocol is missing"):
        files.read(file)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"set": "Gro', r"predictions.jsonl:2: not JSON .* was the evaluation killed"),
        ("[]", "predictions.jsonl:2: expected an object, got list"),
        ('{"set": "Groceries"}', "predictions.jsonl:2: query_id: expected str, got None"),
        ('{"set": "Groceries", "query_id": "a", "value": "1", "hit": true}', "value: expected a number, got '1'"),
        ('{"set": "Groceries", "query_id": "a", "value": 1.5, "hit": true}', "value: expected a number from 0 to 1, got 1.5"),
        ('{"set": "Groceries", "query_id": "a", "value": 1, "hit": 1}', "hit: expected bool, got 1"),
    ],
)
def test_a_broken_line_is_named(line: str, words: str, tmp_path: Path) -> None:
    file = write(tmp_path, "m", VALUES)
    lines = (tmp_path / "m" / "predictions.jsonl").read_text().splitlines()
    (tmp_path / "m" / "predictions.jsonl").write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")
    with pytest.raises(InputError, match=words):
        files.read(file)


def test_predictions_of_another_run_are_refused(tmp_path: Path) -> None:
    lines = [prediction(name, row, value) for name, found in VALUES.items() for row, value in enumerate(found)]
    with pytest.raises(InputError, match="set Names has 1 predictions, the results tell of 2"):
        files.read(write_lines(tmp_path / "short", "m", results(VALUES), lines[:-1]))
    lines[0]["value"] = 0.0
    with pytest.raises(InputError, match="set Groceries scores 0.333333, the results say 0.666667"):
        files.read(write_lines(tmp_path / "other", "m", results(VALUES), lines))
