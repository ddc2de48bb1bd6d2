"""Reports: the scores with their intervals as text, Markdown and one self-contained page with the pictures that were retrieved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm2vec.io import write_atomic
from vlm2vec.report.contrast import table as comparison_table
from vlm2vec.report.contrast_page import write_comparison
from vlm2vec.report.page import render
from vlm2vec.report.tables import markdown, score_table, table
from vlm2vec.standings import Published

__all__ = ["comparison_table", "markdown", "render", "score_table", "table", "write_comparison", "write_report"]


def write_report(
    run_dir: Path,
    after: Mapping[str, Any],
    before: Mapping[str, Any] | None = None,
    log: Sequence[Mapping[str, Any]] | None = None,
    recipe_yaml: str | None = None,
    images_root: Path | None = None,
    published: Published | None = None,
) -> dict[str, Path]:
    """Write `report.md` and `report.html` into `run_dir`; returns their paths as {"markdown": ..., "html": ...}.

    `after` and `before` are results of `evaluate`, `log` the rows of the training log, `images_root` the folder that the examples' picture
    paths start from. A picture that cannot be read becomes a card that says so. `published` puts the scores of other models beside ours.
    Raises InputError for a results format this version does not read, EnvError if the storage fails.
    """
    paths = {"markdown": run_dir / "report.md", "html": run_dir / "report.html"}
    texts = {"markdown": markdown(after, before, log, published), "html": render(after, before, log, recipe_yaml, images_root, published)}
    run_dir.mkdir(parents=True, exist_ok=True)
    for kind, path in paths.items():
        write_atomic(path, texts[kind])
    return paths
