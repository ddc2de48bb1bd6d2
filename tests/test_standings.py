"""Published scores: the file that is shipped agrees with itself, and a broken one is refused by file and key."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from vlm2vec import standings
from vlm2vec.errors import InputError
from vlm2vec.standings import Published, Quote
from vlm2vec.suite import load_suite

META_TASKS = {"classification": 10, "vqa": 10, "retrieval": 12, "grounding": 4}
FILE = Path(__file__).parents[1] / "benchmarks" / "mmeb" / "reference.json"
TOLERANCE = 0.001 + 1e-9  # 0.1 points


@pytest.fixture(scope="module")
def mmeb() -> Published:
    published = standings.load("mmeb")
    assert published is not None
    return published


def quotes(published: Published, source: str) -> dict[str, Quote]:
    return {model.name: quote for model in published.models for quote in model.quotes if quote.source.key == source}


def recomputed(published: Published) -> dict[tuple[str, str, str, str], float]:
    """Every printed mean that can be checked, by (model, source, mean, basis), made again from scores of sets or from other means."""
    sets = {spec.name: spec for spec in load_suite("mmeb").sets}
    found = {}
    for source in published.sources:
        for model, quote in quotes(published, source.key).items():
            column = quotes(published, source.columns)[model].sets if source.columns and model in quotes(published, source.columns) else {}
            for mean in quote.means if len(column) == 36 else ():
                members = [name for name, spec in sets.items() if mean in (spec.meta_task, spec.split, "overall")]
                found[model, source.key, mean, "sets"] = fmean(column[name] for name in members)
            astray = [entry for entry in published.inconsistencies if (entry.model, entry.source, entry.basis) == (model, source, "sets")]
            if set(META_TASKS) | {"overall"} <= set(quote.means) and not astray:
                weighted = sum(count * quote.means[name] for name, count in META_TASKS.items()) / 36
                found[model, source.key, "overall", "meta-tasks"] = weighted
    return found


def test_every_mean_follows_from_its_parts_but_for_the_documented_ones(mmeb: Published) -> None:
    documented = {(entry.model, entry.source.key, entry.mean, entry.basis): entry for entry in mmeb.inconsistencies}
    checked = recomputed(mmeb)
    assert set(documented) <= set(checked)
    assert len([key for key in checked if key[3] == "sets"]) == 8 * 7 + 8 * 5  # Table 6 of the first paper, Table 2 of the second
    for key, value in checked.items():
        model, source, mean, _ = key
        difference = abs(value - quotes(mmeb, source)[model].means[mean])
        if key in documented:
            assert difference > TOLERANCE, key
            assert documented[key].recomputed == pytest.approx(value, abs=0.0006) and documented[key].published != value
        else:
            assert difference <= TOLERANCE, (key, value)


def test_the_two_known_columns_are_among_the_documented(mmeb: Published) -> None:
    found = {(entry.model, entry.mean) for entry in mmeb.inconsistencies if entry.basis == "sets"}
    assert found == {("SigLIP", "retrieval"), *(("UniIR (CLIP_SF)", mean) for mean in ("grounding", "IND", "OOD", "overall"))}


def test_every_known_column_is_whole_and_in_the_order_of_the_suite(mmeb: Published) -> None:
    order = [spec.name for spec in load_suite("mmeb").sets]
    columns = [quote.sets for model in mmeb.models for quote in model.quotes if len(quote.sets) > 10]
    assert len(columns) == 8 + 8 + 8
    assert all(list(column) == order for column in columns)


def test_a_model_that_is_quoted_differently_keeps_all_its_numbers(mmeb: Published) -> None:
    model = next(model for model in mmeb.models if model.name == "VLM2Vec-Qwen2-VL-2B")
    overall = {quote.source.key: mmeb.mean(quote, "overall") for quote in model.quotes}
    assert overall["readme"] == pytest.approx(0.601) and overall["leaderboard"] == pytest.approx(0.593)
    assert overall["harness-2.0.0"] == pytest.approx(0.5974, abs=1e-4) and overall["v2-paper-table-2"] == pytest.approx(0.597)
    assert overall["hub-scores"] is None  # one set of 36


def test_groups_are_those_of_the_suite(mmeb: Published) -> None:
    assert {key: len(names) for key, names in mmeb.groups.items()} == {**META_TASKS, "IND": 20, "OOD": 16, "overall": 36}


def test_best_is_the_highest_score_with_its_model(mmeb: Published) -> None:
    best = mmeb.best("CIRR")
    assert best is not None and (best.score, best.model, best.source.key) == (0.573, "VLM2Vec-V2.0 (Qwen2-VL-2B)", "harness-2.0.1")
    assert mmeb.best("no such set") is None


def test_a_suite_without_published_scores_has_none() -> None:
    assert standings.load("mini") is None


def set_at(top: Any, path: list[Any], value: Any) -> None:
    for step in path[:-1]:
        top = top[step]
    top[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["format"], 2, "reference.json: format: expected 1, got 2"),
        (["suite"], "mini", "suite: expected 'mmeb', got 'mini'"),
        (["unit"], "fraction", "unit: expected 'per cent'"),
        (["extra"], 1, "extra: unknown key"),
        (["models"], {}, r"models: expected a list, got \{\}"),
        (["sources", 1, "confidence"], "sure", r"sources\[1\].confidence: expected one of high, medium, low, got 'sure'"),
        (["sources", 0, "where"], None, r"sources\[0\].where: expected text, got None"),
        (["models", 3, "quotes", 0, "source"], "rumour", r"models\[3\].quotes\[0\].source: expected one of .*, got 'rumour'"),
        (
            ["models", 0, "quotes", 0, "means", "vqa"],
            "9.1",
            r"models\[0\].quotes\[0\].means.vqa: expected per cent from 0 to 100, got '9.1'",
        ),
        (["models", 0, "quotes", 0, "means", "vqa"], 910, "got 910"),
        (["models", 0, "quotes", 0, "means", "vqa"], True, "got True"),
        (["models", 0, "quotes", 0, "means", "visual_grounding"], 1, "means.visual_grounding: unknown key; known: classification, vqa"),
        (["models", 0, "quotes", 1, "sets", "ImageNet"], 1, "sets.ImageNet: unknown key"),
        (["models", 0, "quotes", 1, "sets"], [1], r"sets. expected an object, got \[1\]"),
        (["models", 1, "name"], "CLIP", r"models\[1\].name: expected a name that was not used before, got 'CLIP'|models\[1\].name"),
        (["inconsistencies", 0, "model"], "SigLip", r"inconsistencies\[0\].model: expected one of"),
        (["inconsistencies", 0, "mean"], "macro", r"inconsistencies\[0\].mean"),
    ],
)
def test_a_broken_file_is_refused_by_file_and_key(path: list[Any], value: Any, words: str, tmp_path: Path) -> None:
    top = copy.deepcopy(json.loads(FILE.read_text("utf-8")))
    set_at(top, path, value)
    (tmp_path / "reference.json").write_text(json.dumps(top))
    with pytest.raises(InputError, match=words) as error:
        standings.read(tmp_path / "reference.json", load_suite("mmeb"))
    assert str(tmp_path / "reference.json") in str(error.value)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    top = json.loads(FILE.read_text("utf-8"))
    del top["sources"][0]["title"]
    (tmp_path / "reference.json").write_text(json.dumps(top))
    with pytest.raises(InputError, match=r"sources\[0\].title: expected text, got nothing"):
        standings.read(tmp_path / "reference.json", load_suite("mmeb"))
