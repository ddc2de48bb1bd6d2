"""`vlm2vec data from-folder | validate | split`: one's own pairs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from vlm2vec import io
from vlm2vec.commands import positive, say
from vlm2vec.errors import DataError

FOLDER_HELP = """Write the pairs of a folder of pictures with captions, as <folder>/pairs.jsonl.

Captions stand in metadata.csv, metadata.jsonl, captions.csv or captions.jsonl inside the folder (columns file_name and text), or beside
every picture in a .txt file of its name.

  vlm2vec data from-folder photos                                          captions look for pictures
  vlm2vec data from-folder photos --query image --instruction "Name it:"   pictures look for captions"""

VALIDATE_HELP = """Look at every row and picture of files of pairs: what is wrong, with file and line, and what they hold.

  vlm2vec data validate photos/pairs.jsonl
  vlm2vec data validate photos/split/train.jsonl photos/split/eval.jsonl --root photos    also: does anything leak from one to the other?

The exit code is 0 if nothing is wrong and 2 if something is. docs/own_data.md describes the rows."""

SPLIT_HELP = """Hold a part of a file of pairs out for evaluation: DIR/train and DIR/eval, rows as they were.

  vlm2vec data split photos/pairs.jsonl --eval 0.1 --to photos/split

Rows with the same group stay together; where there is none, rows with the same first picture of the query, or else of the positive, or
else with the same query (--by says otherwise). A hash decides, so that rows added later move none of these. Pictures that both parts show
all the same are counted; --drop-leaks leaves their rows out of training."""


def arguments(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The actions on one's own pairs."""
    folder = _action(actions, "from-folder", "write the pairs of a folder of pictures with captions", FOLDER_HELP, _from_folder)
    folder.add_argument("folder", metavar="DIR", help="the folder")
    folder.add_argument("--query", choices=["text", "image"], default="text", help="what looks for the other one (default: text)")
    folder.add_argument("--instruction", default="", help="instruction of every query")
    validate = _action(actions, "validate", "find all that is wrong in files of pairs", VALIDATE_HELP, _validate)
    validate.add_argument("files", nargs="+", metavar="FILE", help="a .jsonl or .parquet file")
    validate.add_argument("--root", help="folder at which the paths of pictures start (default: the folder of the file)")
    validate.add_argument("--no-pictures", action="store_true", help="do not open pictures")
    validate.add_argument("--show", type=positive, default=5, metavar="N", help="places shown of each kind of problem (default: 5)")
    validate.add_argument("--model", help="also count tokens, as this model's tokenizer makes them, of the first 2,000 texts of each side")
    validate.add_argument("--workers", type=positive, help="processes (default: one a core)")
    validate.add_argument("--json", metavar="FILE", help="also write the report as JSON")
    split = _action(actions, "split", "hold a part of a file of pairs out", SPLIT_HELP, _split)
    split.add_argument("file", metavar="FILE", help="a .jsonl or .parquet file")
    split.add_argument("--eval", type=float, required=True, metavar="SHARE", help="share of the keys held out, between 0 and 1")
    split.add_argument("--to", required=True, metavar="DIR", help="folder of the two files, below the folder of the file")
    split.add_argument("--by", choices=["group", "query", "positive", "picture"], help="what stays together (default: see above)")
    split.add_argument("--root", help="folder at which the paths of pictures start (default: the folder of the file)")
    split.add_argument("--seed", type=int, default=17, help="another seed, another choice (default: 17)")
    split.add_argument("--drop-leaks", action="store_true", help="leave rows out of training whose pictures the held-out part shows")


def _action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    description: str,
    run: Callable[[argparse.Namespace], None],
) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    action: argparse.ArgumentParser = actions.add_parser(name, help=summary, description=description, formatter_class=raw)
    action.set_defaults(run=run)
    return action


def _root(given: argparse.Namespace) -> Path | None:
    if given.root and not Path(given.root).is_dir():
        raise DataError(f"--root {given.root}: no such folder")
    return Path(given.root) if given.root else None


def _from_folder(given: argparse.Namespace) -> None:
    from vlm2vec.data.own.folder import write_pairs

    file, rows = write_pairs(Path(given.folder), given.query, given.instruction)
    say(f"ready: {file}, {rows:,} rows\nnext   vlm2vec data validate {file}")


def _validate(given: argparse.Namespace) -> None:
    from vlm2vec.data.own.validate import require_files, validate

    files = [Path(name) for name in given.files]
    require_files(files)
    tokens = _tokens(given.model) if given.model else None
    report = validate(files, _root(given), not given.no_pictures, given.workers, tokens)
    if given.json:
        io.write_json(Path(given.json), report.as_dict())
    say(report.text(given.show))
    if not report.ok:
        lost = "missing picture" in report.problems and not given.root
        hint = "; paths of pictures start at the folder of the file, --root names another one" if lost else ""
        raise DataError(f"the data are not right{hint}")


def _tokens(model: str) -> Callable[[list[str]], list[int]]:
    """Counts the tokens of texts as a model's tokenizer makes them, without a prompt around them."""
    from vlm2vec.encoder import Encoder

    tokenizer = Encoder.from_pretrained(model).processor.tokenizer
    return lambda texts: [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _split(given: argparse.Namespace) -> None:
    from vlm2vec.data.own.split import split
    from vlm2vec.data.own.validate import require_files

    file, root = Path(given.file), _root(given)
    require_files([file])
    made = split(file, Path(given.to), given.eval, root, given.by, given.seed, given.drop_leaks)
    say(f"train   {made.train}  {made.rows[0]:,} rows\neval    {made.eval}  {made.rows[1]:,} rows")
    what = "were left out" if made.dropped else "show a picture that the held-out part shows too (--drop-leaks leaves them out)"
    say(f"leaks   {made.leaks:,} training rows" + (f" {what}" if made.leaks else ""))
    say(f"next    vlm2vec eval MODEL --suite {made.eval} --root {root or file.parent}")
