"""`vlm2vec search`: queries in, the nearest items of an index out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vlm2vec.commands import positive, say
from vlm2vec.errors import DataError, InputError

HELP = """Find the items of an index that are nearest to a text, a picture or both.

  vlm2vec search pictures.index "a red car"
  vlm2vec search pictures.index --image query.jpg
  vlm2vec search pictures.index "the same at night" --image query.jpg --instruction "Find an image that matches:"
  vlm2vec search pictures.index "a red car" --top 50 --html found.html      a page with pictures, in one file
  vlm2vec search pictures.index --queries queries.jsonl --json              lines of text, image, instruction, id; a line of results each

Scores are cosines. Search is exact; --approximate is faster where there are millions, and says what it may miss."""


def arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    command.add_argument("index", help="a folder that vlm2vec index made")
    command.add_argument("text", nargs="?", help="what to look for")
    command.add_argument("--image", action="append", default=[], help="a picture to look for, with or without a text; may be repeated")
    command.add_argument("--queries", help="a .jsonl file of queries in the place of one: text, image, instruction, id")
    command.add_argument("--instruction", help="instruction for queries that bring none (default: the model's query instruction)")
    command.add_argument("--top", type=positive, default=10, help="how many items (default: 10)")
    command.add_argument("--approximate", action="store_true", help="look into the lists of vlm2vec index --approximate")
    command.add_argument("--html", metavar="FILE", help="write a page with the pictures that were found")
    command.add_argument("--json", action="store_true", help="a line of JSON for each query")
    command.add_argument("--model", help="where the model of the index lies now, if it has moved")
    command.add_argument("--device", help="cpu, cuda or cuda:<n> (default: a GPU if there is one)")


def run(given: argparse.Namespace) -> None:
    """Search, and show what was found."""
    from vlm2vec.commands.loading import chosen_device
    from vlm2vec.index import Index

    index = Index.open(given.index)
    queries = _queries(given)
    encoder = index.load_encoder(given.model, chosen_device(given))
    instruction = encoder.query_instruction if given.instruction is None else given.instruction
    found = index.search(index.embed(encoder, [item for _, item in queries], instruction), given.top, given.approximate)
    if given.html:
        from vlm2vec.io import write_atomic
        from vlm2vec.report.found import render

        asked = [(item, hits) for (_, item), hits in zip(queries, found, strict=True)]
        write_atomic(Path(given.html), render(index.meta, asked, instruction, given.approximate))
    for (id, item), hits in zip(queries, found, strict=True):
        if given.json:
            say(json.dumps({"id": id, "results": [_plain(rank, hit) for rank, hit in enumerate(hits, 1)]}))
        else:
            _show(item, hits)
    if not given.json:
        _say_how(given, index.meta)


def _queries(given: argparse.Namespace) -> list[tuple[Any, Any]]:
    """(id, item) of every query. Raises InputError where there is none, and what reading them raises."""
    from vlm2vec.encoder import as_item

    if given.queries and (given.text or given.image):
        raise InputError("--queries is instead of a text and --image: give one or the other")
    if given.queries:
        return _listed(Path(given.queries))
    if not (given.text or "").strip() and not given.image:
        raise InputError('nothing to look for: give a text, as in vlm2vec search INDEX "a red car", or --image FILE, or --queries FILE')
    return [(0, as_item({"text": given.text, "image": given.image}))]


def _listed(file: Path) -> list[tuple[Any, Any]]:
    from vlm2vec.data.items import item_of, scan

    if file.suffix != ".jsonl" or not file.is_file():
        raise DataError(f"--queries {file}: expected a .jsonl file")
    corpus = scan(file, file)
    return [(row.id, item_of(row, file.parent)) for row in corpus.read([range(len(corpus))])]


def _plain(rank: int, hit: Any) -> dict[str, Any]:
    """A hit as JSON."""
    about = {"id": hit.id, "row": hit.number, "text": hit.text, "instruction": hit.instruction, "images": list(map(str, hit.images))}
    return {"rank": rank, "score": hit.score, **about}


def _show(item: Any, hits: list[Any]) -> None:
    """A line for each hit, and its picture where the terminal shows pictures."""
    from vlm2vec.commands.terminal import painter, width
    from vlm2vec.report.markup import clean

    paint = painter()
    say(clean(" + ".join([*([" ".join(item.text.split())] if item.text else []), *(str(image.source) for image in item.images)])))
    for rank, hit in enumerate(hits, 1):
        words = " ".join(hit.text.split())
        line = clean(f"{rank:>4}  {hit.score:7.4f}  {hit.id}{'  ' if words else ''}{words}").replace("\n", " ")
        say(line if len(line) <= width() else line[: width() - 1] + "\N{HORIZONTAL ELLIPSIS}")
        if paint and (hit.images or hit.thumbnail):
            paint(hit.images[0] if hit.images else hit.thumbnail)


def _say_how(given: argparse.Namespace, meta: dict[str, Any]) -> None:
    lists = meta["approximate"]
    how = f"approximate, {lists['recall']:.1%} of the true best ten when it was made" if given.approximate else "exact"
    say(f"among {meta['items']:,} items, {how}" + (f"; the page is {given.html}" if given.html else ""))
