"""What one recipe does from end to end: evaluate, train, evaluate again, report. A stage that finished is not repeated after a kill."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlm2vec import dist, io, standings
from vlm2vec.config import Recipe, dump
from vlm2vec.encoder import Encoder
from vlm2vec.engines import launch
from vlm2vec.engines.together import ending_together
from vlm2vec.evalsets import require_data
from vlm2vec.evaluate import evaluate
from vlm2vec.report import table, write_report
from vlm2vec.signals import StopSignal
from vlm2vec.suite import Suite, load_suite
from vlm2vec.trainer import LOG, load_encoder, prepare_run_dir, train

MODEL, BEFORE, AFTER = "model", "results-before.json", "results.json"


@dataclass(frozen=True)
class Done:
    """What a run left: the folder of the trained model, results before and after (None where the recipe asks for none), files of the
    report.
    """

    model: Path
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    report: dict[str, Path] = field(default_factory=dict)

    def summary(self) -> str:
        """What was made and what to do next, for the end of the terminal output."""
        lines = [table(self.after, self.before)] if self.after else []
        lines.append(f"model   {self.model}")
        if self.report:
            lines.append(f"report  {self.report['html']}  (open it in a browser)")
        use = f"from vlm2vec import Encoder; print(Encoder.from_pretrained('{self.model}').encode(['a red apple']).shape)"
        return "\n".join(
            [
                *lines,
                f'next    python -c "{use}"',
                "        vlm2vec train RECIPE train.lr=1e-4 run.dir=runs/other    (all keys: vlm2vec keys)",
            ]
        )


def run(recipe: Recipe, fresh: bool = False) -> Done:
    """Run `recipe` in its run folder, from where an earlier start of it was stopped.

    Raises RunLockedError if another live process works in the same folder, Interrupted after a signal once the state is saved.
    """
    recipe = launch.start(recipe)
    run_dir = Path(recipe.run.dir)
    with ending_together(), io.run_lock(run_dir) if dist.is_main() else nullcontext(), StopSignal() as stop:
        suite = load_suite(recipe.evaluate.suite, recipe.evaluate.root) if recipe.evaluate.suite else None
        if suite:
            require_data(suite)  # said now rather than after the last step
        if dist.is_main():
            prepare_run_dir(recipe, fresh)
        dist.barrier()
        evaluating = "stopped while evaluating; what was embedded is kept, run the same command to go on"
        with stop.cutting(evaluating):
            before = _results(recipe, suite, run_dir / BEFORE, lambda: load_encoder(recipe, None)) if recipe.evaluate.before else None
        encoder = train(recipe, stop)
        _publish(encoder, recipe, run_dir / MODEL)
        with stop.cutting(evaluating):
            after = _results(recipe, suite, run_dir / AFTER, lambda: encoder) if recipe.evaluate.after else None
        report = _report(recipe, suite, before, after) if suite and after and dist.is_main() else {}
    return Done(run_dir / MODEL, before, after, report)


def _publish(encoder: Encoder, recipe: Recipe, directory: Path) -> None:
    """Write the final encoder where `Encoder.from_pretrained` finds it."""
    if dist.is_main():
        with io.publishing(directory) as staging:
            encoder.save_pretrained(staging, recipe_digest=recipe.digest)
    encoder.source = str(directory)
    dist.barrier()


def _results(recipe: Recipe, suite: Suite | None, file: Path, encoder: Callable[[], Encoder]) -> dict[str, Any] | None:
    """Results on `suite`, read from `file` if this run made them already."""
    if suite is None:
        return None
    if file.exists():
        return io.read_json(file)
    options = recipe.evaluate
    evaluation = evaluate(
        encoder().to("cuda" if torch.cuda.is_available() else "cpu"),
        suite,
        file.parent / "cache",
        limit=options.limit,
        protocol=options.protocol,
        chunk_tokens=options.chunk_tokens,
        workers=recipe.data.workers,
        recipe_digest=recipe.digest,
    )
    if dist.is_main():
        evaluation.write(file)
    return evaluation.results


def _report(recipe: Recipe, suite: Suite, before: dict[str, Any] | None, after: dict[str, Any]) -> dict[str, Path]:
    run_dir = Path(recipe.run.dir)
    return write_report(run_dir, after, before, io.read_jsonl(run_dir / LOG), dump(recipe), suite.root, standings.load(suite))
