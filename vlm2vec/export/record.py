"""What an export carries of the run it comes from: recipe and scores, without any place on the machine that made them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from vlm2vec import io
from vlm2vec.config import dump, load_recipe
from vlm2vec.results import model_name, require_format

RESULTS, RECIPE = "results.json", "recipe.yaml"  # names in a run folder and in an export
ONLY_HERE = ("examples", "timing")  # what of the results is about pictures and hours of that machine


@dataclass(frozen=True)
class Record:
    """Texts of the two files; "" where there is none."""

    recipe: str
    results: str

    def write(self, folder: Path) -> None:
        """Write what there is."""
        for name, text in ((RECIPE, self.recipe), (RESULTS, self.results)):
            if text:
                io.write_atomic(folder / name, text)


def record_of(source: str, results: str | Path | None = None) -> Record:
    """Recipe and scores of a run folder; `results` is a file of scores in the place of its own.

    Raises InputError for a file that holds no results of this version, RecipeError for a recipe that it does not read.
    """
    run = Path(source).expanduser()
    file = Path(results) if results else run / RESULTS
    return Record(
        recipe=_recipe(run / RECIPE) if (run / RECIPE).is_file() else "",
        results=_results(file) if results or file.is_file() else "",
    )


def _results(file: Path) -> str:
    found = io.read_json(file)
    require_format(found, str(file))
    found = {key: value for key, value in found.items() if key not in ONLY_HERE}
    found["model"] = {**found["model"], "path": model_name(found["model"]["path"])}
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def _recipe(file: Path) -> str:
    recipe = load_recipe(file)
    evaluate = recipe.evaluate
    return dump(
        replace(
            recipe,
            run=replace(recipe.run, dir=""),
            model=replace(recipe.model, path=_name(recipe.model.path)),
            data=replace(recipe.data, root=_name(recipe.data.root)),
            evaluate=replace(evaluate, root=evaluate.root and _name(evaluate.root), suite=evaluate.suite and _name(evaluate.suite)),
        )
    )


def _name(path: str) -> str:
    """The last part of a path that says where things lie on a machine; a relative path or a name on the Hub as it is."""
    return Path(path).name if Path(path).expanduser().is_absolute() else path
