"""`vlm2vec eval`: a model in, a results file, a report and predictions out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm2vec.commands import positive, say
from vlm2vec.commands.loading import device_arguments, load_encoder, model_arguments, start_ranks

HELP = """Score a model on a benchmark suite: precision@1 with 95 % intervals, a report with pictures, what was retrieved for each query.

  vlm2vec eval runs/quickstart/model --suite mini
  vlm2vec data get mmeb-eval                                              once, into data/MMEB-eval
  vlm2vec eval TIGER-Lab/VLM2Vec-Full --suite mmeb                          a published checkpoint
  vlm2vec eval runs/lora/model --suite mmeb --root /data/MMEB-eval        the benchmark's data elsewhere
  vlm2vec eval MODEL --suite mmeb --subset OK-VQA CIRR --limit 100        a quick look
  vlm2vec eval MODEL --suite photos/split/eval.jsonl --root photos        your own pairs: each query against all that the file names
  vlm2vec eval MODEL --suite mmeb --dims 64 256 --precisions int8 binary  what shorter and coarser vectors cost, in the same run
  accelerate launch --multi_gpu --num_processes 8 --module vlm2vec eval MODEL --suite mmeb

Everything that was encoded is kept in <to>/cache, by content: run the same command again after a kill and it goes on; change a picture, a
prompt or a weight and only what it touches is encoded anew. The results are <to>/<model>@<digest>.json, and the folder of that name."""


def arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    model_arguments(command)
    command.add_argument("--suite", default="mini", help="a name under benchmarks/, a datasets.yaml or a file of pairs (default: mini)")
    command.add_argument("--root", help="folder of the suite's data (default: what the suite names)")
    command.add_argument("--subset", nargs="+", metavar="SET", help="only these sets")
    command.add_argument("--limit", type=positive, help="at most this many queries per set, chosen by a hash")
    command.add_argument(
        "--protocol",
        choices=["strict", "reference"],
        default="strict",
        help="strict: a tie is a miss; reference: the choices of VLM2Vec's own evaluation, to compare with published numbers",
    )
    command.add_argument("--dims", nargs="+", type=positive, default=[], help="also score vectors cut to these lengths (Matryoshka)")
    command.add_argument(
        "--precisions", nargs="+", choices=["int8", "binary"], default=[], help="also score vectors stored in these precisions"
    )
    device_arguments(command)
    command.add_argument(
        "--allow-missing", action="store_true", help="report sets whose data is missing instead of stopping; withholds the means"
    )
    command.add_argument("--reference-files", action="store_true", help="also write {set}_score.json and {set}_pred.txt as VLM2Vec does")
    command.add_argument(
        "--submission",
        nargs="+",
        type=_pair,
        default=[],
        metavar="KEY=VALUE",
        help="also write what MMEB's leaderboard takes, e.g. model_name=Mine",
    )
    command.add_argument("--name", help="name of the model in the results (default: from its path)")
    command.add_argument("--to", default="results", help="folder for results and cache (default: results)")


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"must look like KEY=VALUE, got {text!r}")
    return key, value


def run(given: argparse.Namespace) -> None:
    """Evaluate and write: results, predictions, report."""
    from vlm2vec import dist
    from vlm2vec.evalsets import require_data
    from vlm2vec.evaluate import evaluate, load_suite

    suite = load_suite(given.suite, given.root)
    require_data(suite)
    suite = suite.only(given.subset) if given.subset else suite  # a misspelt set is said before a model is loaded
    start_ranks(given)
    evaluation = evaluate(
        load_encoder(given),
        suite,
        Path(given.to) / "cache",
        limit=given.limit,
        subsets=given.subset,
        protocol=given.protocol,
        variants=_variants(given.dims, given.precisions),
        chunk_tokens=given.chunk_tokens,
        workers=given.workers,
        allow_missing=given.allow_missing,
    )
    if dist.is_main():
        _write(given, suite, evaluation)


def _variants(dims: Sequence[int], precisions: Sequence[str]) -> list[Any]:
    """All combinations of the lengths and precisions asked for, less the vectors as they are."""
    from vlm2vec.scoring import Variant

    grid = [Variant(cut, precision) for cut in (None, *dims) for precision in ("float32", *precisions)]
    return grid[1:]


def _write(given: argparse.Namespace, suite: Any, evaluation: Any) -> None:
    from vlm2vec.report import table, write_report
    from vlm2vec.results import model_name, predictions_file
    from vlm2vec.standings import load

    results = evaluation.results
    file = Path(given.to) / f"{given.name or model_name(given.adapter or given.model)}@{evaluation.digest[:12]}.json"
    folder = predictions_file(file).parent
    evaluation.write(file)
    paths = write_report(folder, results, images_root=suite.root, published=load(suite))
    say(table(results))
    say(f"results      {file}")
    say(f"report       {paths['html']}  (open it in a browser)")
    say(f"predictions  {predictions_file(file)}")
    _write_for_others(given, evaluation, folder)
    say(f"next         vlm2vec compare {file} OTHER.json    (is the difference more than noise?)")


def _write_for_others(given: argparse.Namespace, evaluation: Any, folder: Path) -> None:
    from vlm2vec import io
    from vlm2vec.formats import submission, write_reference_files
    from vlm2vec.strict_yaml import resolve

    if given.reference_files:
        write_reference_files(evaluation.results, evaluation.predictions(), folder / "reference")
        say(f"reference    {folder / 'reference'}")
    if given.submission:
        io.write_json(folder / "submission.json", submission(evaluation.results, {key: resolve(value) for key, value in given.submission}))
        say(f"submission   {folder / 'submission.json'}")
