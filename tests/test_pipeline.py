"""What a whole run hands from its recipe to the stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.runs import tiny_recipe
from vlm2vec import pipeline


def test_evaluation_reads_ahead_with_the_workers_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def evaluate(encoder: Any, suite: Any, cache: Path, **options: Any) -> SimpleNamespace:
        asked.update(options)
        return SimpleNamespace(results={"means": {}}, write=lambda file: None)

    monkeypatch.setattr(pipeline, "evaluate", evaluate)
    recipe = tiny_recipe(tmp_path)
    recipe = replace(recipe, data=replace(recipe.data, workers=3))
    encoder = SimpleNamespace(to=lambda device: None)
    assert pipeline._results(recipe, SimpleNamespace(), tmp_path / "results.json", lambda: encoder) == {"means": {}}  # type: ignore[arg-type,return-value]
    assert asked["workers"] == 3 and asked["recipe_digest"] == recipe.digest
