"""What one recipe does from end to end: evaluate, train, evaluate again, report. Each stage that finished is not repeated after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm2vec import dist, io, log
from vlm2vec.config import Recipe, dump
from vlm2vec.encoder import Encoder
from vlm2vec.evaluate import evaluate, load_suite
from vlm2vec.report import table, write_report
from vlm2vec.signals import StopSignal
from vlm2vec.trainer import LOG, load_encoder, prepare_run_dir, train

MODEL, BEFORE, AFTER = "model", "results-before.json", "results.json"
_logger = log.get_logger(__name__)


def run(recipe: Recipe, fresh: bool = False) -> dict[str, Any]:
    """Run `recipe` and return {"run_dir", "model", "before", "after", "report"}; results are None where the recipe asks for none.

    Raises RunLockedError if another live process works in the same run folder.
    """
    Path(recipe.run.dir).parent.mkdir(parents=True, exist_ok=True)
    with io.run_lock(Path(recipe.run.dir)), StopSignal() as stop:
        run_dir = prepare_run_dir(recipe, fresh)
        before = _results(recipe, run_dir / BEFORE, lambda: load_encoder(recipe, None)) if recipe.evaluate.before else None
        if stop.requested:
            raise stop.interrupted(f"stopped before training; run the same command to go on in {run_dir}")
        encoder = train(recipe, stop)
        publish(encoder, recipe, run_dir / MODEL)
        after = _results(recipe, run_dir / AFTER, lambda: encoder) if recipe.evaluate.after else None
        report = _report(recipe, run_dir, before, after) if after else {}
    return {"run_dir": run_dir, "model": run_dir / MODEL, "before": before, "after": after, "report": report}


def publish(encoder: Encoder, recipe: Recipe, directory: Path) -> None:
    """Write the final encoder where `Encoder.from_pretrained` finds it."""
    if dist.is_main():
        with io.publishing(directory) as staging:
            encoder.save_pretrained(staging, recipe_digest=recipe.digest)
    dist.barrier()


def _results(recipe: Recipe, file: Path, encoder: Any) -> dict[str, Any] | None:
    """Results of the recipe's suite, read from `file` if this run made them already."""
    if recipe.evaluate.suite is None:
        return None
    if file.exists():
        return io.read_json(file)
    options = recipe.evaluate
    made = encoder()
    results = evaluate(
        made.to("cuda" if _has_cuda() else "cpu"),
        load_suite(options.suite, options.root),
        cache_dir=file.parent / "cache",
        limit=options.limit,
        ties=options.ties,
        bootstrap=options.bootstrap,
        chunk_tokens=options.chunk_tokens,
        recipe_digest=recipe.digest,
    )
    if dist.is_main():
        io.write_json(file, results)
    return results


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _report(recipe: Recipe, run_dir: Path, before: dict[str, Any] | None, after: dict[str, Any]) -> dict[str, Path]:
    if not dist.is_main():
        return {}
    return write_report(run_dir, after, before, io.read_jsonl(run_dir / LOG), dump(recipe), None)


def summary(done: dict[str, Any]) -> str:
    """What a run made and what to do next, for the end of the terminal output."""
    lines = [table(done["after"], done["before"])] if done["after"] else []
    lines += [f"model   {done['model']}"]
    lines += [f"report  {done['report']['html']}"] if done["report"] else []
    lines += [
        "next",
        f"  look at it    open {done['report'].get('html', done['run_dir'])}",
        f"  use it        python -c \"from vlm2vec import Encoder; print(Encoder.from_pretrained('{done['model']}').encode(['a red apple']))\"",
        "  change it     vlm2vec train <recipe> train.lr=1e-4 run.dir=runs/other   (all keys: vlm2vec keys)",
    ]
    return "\n".join(lines)
