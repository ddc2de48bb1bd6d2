"""`vlm2vec train | eval | encode | data`: arguments in, exit codes out. The work is done elsewhere; imports are local so that `--help` is
quick.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm2vec import cli_data, log
from vlm2vec.errors import InputError, Vlm2VecError

EXIT_CODES = """exit codes: 0 finished, 2 wrong input, 3 not-a-number stopped the run, 4 disk or machine refused, 5 run folder in use,
130 or 143 interrupted after saving (run the same command to go on)"""

TRAIN_HELP = """Train a recipe from its newest checkpoint, or from the start; evaluate and report if the recipe says so.

  vlm2vec train recipes/quickstart.yaml                        the embedded demo
  vlm2vec train recipes/quickstart.yaml --dry-run              what it would do: data mix, batch, parameters, memory
  vlm2vec train recipes/quickstart.yaml --tiny                 every code path in seconds on a CPU
  vlm2vec train recipes/quickstart.yaml train.lr=1e-4 run.dir=runs/lr1e-4
  accelerate launch train.py recipes/quickstart.yaml           the same on several processes"""

EVAL_HELP = """precision@1 with 95 % intervals on a benchmark suite.

  vlm2vec eval runs/quickstart/model --suite mini
  vlm2vec eval builtin/vista-minilm --suite mini --limit 50"""

ENCODE_HELP = """Embed items into a safetensors file with one unit row each.

  vlm2vec encode runs/quickstart/model items.jsonl --to vectors.safetensors
Each line of items.jsonl is {"text": ..., "image": ..., "instruction": ...}; a picture's path is relative to that file."""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="vlm2vec", description="Turn any vision-language model into an embedding model.", epilog=EXIT_CODES)
    top.add_argument("--verbose", action="store_true", help="log details, and show the traceback of an error")
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    _train_arguments(_command(commands, "train", "train, evaluate and report from a recipe", TRAIN_HELP))
    _eval_arguments(_command(commands, "eval", "evaluate a model on a suite", EVAL_HELP))
    _encode_arguments(_command(commands, "encode", "embed the items of a JSONL file", ENCODE_HELP))
    cli_data.add_arguments(_command(commands, "data", "build, fetch or check data", cli_data.DATA_HELP))
    keys = _command(commands, "keys", "list every key of a recipe with type, default and meaning", "Every key of a recipe.")
    keys.set_defaults(run=_keys)
    return top


def _command(commands: Any, name: str, summary: str, description: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EXIT_CODES
    )


def _train_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", help="a YAML file, see recipes/")
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys of the recipe to change, e.g. train.lr=1e-4 (all keys: vlm2vec keys)"
    )
    command.add_argument("--tiny", action="store_true", help="shrink every size: seconds on a CPU, the same code paths")
    command.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    command.add_argument("--fresh", action="store_true", help="forget an earlier run in the same folder")
    command.set_defaults(run=_train)


def _eval_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="a folder, a Hub id or builtin/<name>")
    command.add_argument("--suite", default="mini", help="a name under benchmarks/ or a datasets.yaml (default: mini)")
    command.add_argument("--adapter", help="an adapter folder on top of the model")
    command.add_argument("--root", help="folder of the suite's data (default: what the suite names)")
    command.add_argument("--subset", nargs="+", help="only these sets")
    command.add_argument("--limit", type=int, help="at most this many queries per set")
    command.add_argument(
        "--ties", choices=["pessimistic", "reference"], default="pessimistic", help="what a tie with another candidate counts as"
    )
    command.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    command.add_argument(
        "--allow-missing", action="store_true", help="report sets whose data is missing instead of stopping; withholds the means"
    )
    command.add_argument("--to", help="folder for results and report (default: runs/eval/<model>)")
    command.set_defaults(run=_eval)


def _encode_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="a folder, a Hub id or builtin/<name>")
    command.add_argument("items", help="a JSONL file")
    command.add_argument("--to", required=True, help="the safetensors file to write")
    command.add_argument("--adapter", help="an adapter folder on top of the model")
    command.add_argument("--instruction", default="", help="instruction for items that bring none")
    command.add_argument("--workers", type=int, default=0, help="processes that decode pictures")
    command.set_defaults(run=_encode)


def _train(arguments: argparse.Namespace) -> None:
    from vlm2vec.config import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides, tiny=arguments.tiny)
    if arguments.dry_run:
        _dry_run(recipe)
        return
    from vlm2vec import dist, pipeline

    done = pipeline.run(recipe, fresh=arguments.fresh)
    if dist.is_main():
        _say(done.summary())


def _dry_run(recipe: Any) -> None:
    from vlm2vec.plan import dry_run
    from vlm2vec.trainer import load_encoder, mixture_of

    _say(dry_run(recipe, load_encoder(recipe, None), mixture_of(recipe)))


def _eval(arguments: argparse.Namespace) -> None:
    from vlm2vec import io
    from vlm2vec.encoder import Encoder
    from vlm2vec.evaluate import evaluate, load_suite
    from vlm2vec.report import table, write_report

    suite = load_suite(arguments.suite, arguments.root)
    encoder = Encoder.from_pretrained(arguments.model, arguments.adapter)
    encoder.precision = arguments.precision
    target = Path(arguments.to or f"runs/eval/{Path(arguments.model).name}")
    results = evaluate(
        encoder,
        suite,
        cache_dir=target / "cache",
        limit=arguments.limit,
        subsets=arguments.subset,
        ties=arguments.ties,
        allow_missing=arguments.allow_missing,
    )
    io.write_json(target / "results.json", results)
    paths = write_report(target, results, images_root=suite.root)
    _say(table(results))
    _say(f"wrote {target / 'results.json'} and {paths['html']}")


def _encode(arguments: argparse.Namespace) -> None:
    from safetensors.torch import save_file

    from vlm2vec.encoder import Encoder

    items = read_items(Path(arguments.items))
    encoder = Encoder.from_pretrained(arguments.model, arguments.adapter)
    rows = encoder.encode(items, instruction=arguments.instruction, workers=arguments.workers, progress=True)
    save_file({"embeddings": rows}, arguments.to)
    _say(f"wrote {rows.shape[0]} rows of {rows.shape[1]} to {arguments.to}; row i belongs to line i + 1 of {arguments.items}")


def read_items(file: Path) -> list[Any]:
    """Items of a JSONL file, pictures resolved against its folder. Raises InputError naming the line."""
    from vlm2vec.encoder import as_item

    if not file.is_file():
        raise InputError(f"{file} not found")
    items = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
        try:
            row = json.loads(line)
            items.append(as_item(_anchored(row, file.parent)))
        except (json.JSONDecodeError, InputError) as error:
            raise InputError(f"{file}:{number}: {error}; found {line[:80]!r}") from error
    return items


def _anchored(row: Any, folder: Path) -> Any:
    if not isinstance(row, dict) or not row.get("image"):
        return row
    images = row["image"] if isinstance(row["image"], list) else [row["image"]]
    return {**row, "image": [folder / image if isinstance(image, str) else image for image in images]}


def _keys(arguments: argparse.Namespace) -> None:
    from vlm2vec.config import reference

    for key, kind, default, meaning in reference():
        _say(f"{key:<32} {kind:<28} {default!s:<12} {meaning}")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of one command; overrides may stand before and after options, which argparse alone does not allow behind a sub-command."""
    whole = parser()
    arguments, rest = whole.parse_known_args(argv)
    if rest and (arguments.command != "train" or any(word.startswith("-") for word in rest)):
        whole.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _parse(argv)
    log.setup("debug" if arguments.verbose else "info")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.|peft\.")  # for their developers, not for our users
    try:
        arguments.run(arguments)
    except Vlm2VecError as error:
        if arguments.verbose:
            raise
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0
