"""The model card of a repository on the Hub: what machines read in front, then what the model is, how it scores and how it was trained.

A card says what is known and no more. It is made of the exported folder alone, so that the same folder gives the same card.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from vlm2vec import io
from vlm2vec.config import load_recipe
from vlm2vec.encoder import SETTINGS
from vlm2vec.export.card import card
from vlm2vec.export.record import RECIPE, RESULTS
from vlm2vec.report import score_table
from vlm2vec.report.summary import META_TASKS, percent, summarize

TAGS = ["sentence-transformers", "vlm2vec", "multimodal", "embeddings"]


def model_card(folder: Path, repository: str, licence: str) -> str:
    """Markdown with YAML in front for the export in `folder`, as the Hub shows it under `repository`.

    Raises InputError for results of a format that this version does not read.
    """
    settings = io.read_json(folder / SETTINGS)
    results = io.read_json(folder / RESULTS) if (folder / RESULTS).exists() else None
    parts = [
        f"---\n{metadata(repository, settings, licence, results).to_yaml()}\n---",
        card(repository, settings).strip(),
        *([_scores(results)] if results else []),
        *([_training(folder / RECIPE, results)] if (folder / RECIPE).exists() else []),
    ]
    return "\n\n".join(parts) + "\n"


def metadata(repository: str, settings: Mapping[str, Any], licence: str, results: Mapping[str, Any] | None) -> ModelCardData:
    """What the Hub files the model under. Merged weights count as fine-tuned from their base, which is left out if it is not public."""
    export = settings["export"]
    relation = "adapter" if export["form"] == "adapter" else "finetune"
    based = {"base_model": export["base"], "base_model_relation": relation} if export["base"] else {}
    return ModelCardData(
        license=licence,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=TAGS,
        model_name=repository.rpartition("/")[2] if results else None,
        eval_results=list(_entries(results)) if results else None,
        **based,
    )


def _entries(results: Mapping[str, Any]) -> Iterator[EvalResult]:
    """A line of the model index for each set and for each mean over sets: the score in per cent."""
    summary = summarize(results)
    for row in (*summary.totals, *summary.sets):
        if row.after is None:
            continue
        metric, task = str(row.details.get("metric", summary.metric)), str(row.details.get("meta_task", row.title))
        interval = "" if row.after.low is None else f", 95 % interval {percent(row.after.low)} to {percent(row.after.high)}"
        yield EvalResult(
            task_type="retrieval",
            task_name=META_TASKS.get(task, task),
            dataset_type=str(results["suite"]),
            dataset_name=f"{results['suite']} {row.title}",
            dataset_config=row.key,
            dataset_split="test",
            metric_type=metric,
            metric_name=f"{metric} in %{interval}",
            metric_value=round(100 * row.after.value, 2),
        )


def _scores(results: Mapping[str, Any]) -> str:
    told = {"protocol digest": results["protocol_digest"], "model fingerprint": results["model"]["fingerprint"]}
    provenance = "; ".join(f"{name} `{value}`" for name, value in told.items())
    limit = results["protocol"].get("limit")
    warnings = [*([f"At most {limit} queries of each set were asked."] if limit else []), *summarize(results).warnings]
    return "\n\n".join(
        [
            f"## Scores on {results['suite']}",
            score_table(results),
            f"In %, with 95 % intervals, measured before the export, which may round weights. `{RESULTS}` has all of it ({provenance}).",
            *warnings,
        ]
    )


def _training(recipe: Path, results: Mapping[str, Any] | None) -> str:
    """The whole recipe: what was trained on what, and how, in its own words."""
    sources = ", ".join(source.name for source in load_recipe(recipe).data.sources)
    digest = (results or {}).get("model", {}).get("recipe_digest")
    told = f", digest `{digest}`," if digest else ""
    text = recipe.read_text(encoding="utf-8").strip()
    return (
        f"## Training\n\nContrastive pairs of {sources}. The recipe{told} trains again once its `data.root` names the data.\n\n"
        f"<details><summary>{RECIPE}</summary>\n\n```yaml\n{text}\n```\n\n</details>"
    )
