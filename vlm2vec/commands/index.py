"""`vlm2vec index`: items in, an index out that `vlm2vec search` answers from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vlm2vec.commands import corpus_arguments, say
from vlm2vec.commands.loading import chosen_device, chosen_options, device_arguments, load_encoder, model_arguments, start_ranks
from vlm2vec.errors import InputError
from vlm2vec.signals import StopSignal

HELP = """Make pictures, JSONL or parquet searchable.

  vlm2vec index pictures --model runs/quickstart/model --to pictures.index     a folder of pictures, found by content, with all below it
  vlm2vec index items.jsonl --model MODEL --to items.index                     lines of text, image, instruction, id
  vlm2vec index pictures --to pictures.index                                   again: what is new or changed comes in, what is gone goes
  vlm2vec index corpus --model MODEL --to corpus.index --approximate           and lists for approximate search, for millions of items

Killed, the same command goes on where it was; an index that is there answers until the new one is complete. docs/search.md describes it."""


def arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    corpus_arguments(command)
    command.add_argument("--to", required=True, help="the folder of the index")
    model_arguments(command, "--model")
    command.add_argument("--instruction", help="instruction for items that bring none (default: the model's target instruction)")
    command.add_argument("--approximate", action="store_true", help="make lists for search --approximate, and measure their recall")
    device_arguments(command)


def run(given: argparse.Namespace) -> None:
    """Make the index, and say what it holds and how to ask it."""
    if not Path(given.items).exists():
        raise InputError(f"{given.items} not found")
    if Path(given.to).is_file():
        raise InputError(f"--to {given.to}: names a folder, and that is a file")
    from vlm2vec.index import build_index, check_alone

    start_ranks(given)
    check_alone()  # before the model, which may take long
    encoder, loading = _encoder(given)
    with StopSignal() as stop:
        made = build_index(
            encoder,
            given.items,
            given.to,
            instruction=given.instruction,
            dims=given.dims,
            columns=dict(given.columns),
            images=given.images,
            skip_bad=given.skip_bad,
            approximately=given.approximate,
            loading=loading,
            chunk_tokens=given.chunk_tokens,
            workers=given.workers,
            stop=stop,
        )
    _say_made(given, made)


def _encoder(given: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The encoder that is named, or else the one that the index was made with; and how to load it another time."""
    from vlm2vec.index import Index

    if given.model:
        path, adapter = _lasting(given.model), given.adapter and _lasting(given.adapter)
        loading = {"path": path, "revision": given.revision, "adapter": adapter, "options": chosen_options(given)}
        return load_encoder(given), loading | {"precision": given.autocast}
    try:
        index = Index.open(given.to)
    except InputError as error:
        raise InputError(f"--model: say which model is to encode the items ({error})") from None
    return index.load_encoder(device=chosen_device(given)), index.meta["loading"]


def _lasting(name: str) -> str:
    """A path as it is called from any folder; a name on the Hub as it is."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def _say_made(given: argparse.Namespace, made: dict[str, Any]) -> None:
    say(f"index    {made['items']:,} items, {made['dims']} numbers each, in {given.to}")
    say(f"         {made['added']:,} new, {made['changed']:,} changed, {made['removed']:,} gone; {made['encoded']:,} encoded")
    if made["skipped"]:
        say(f"skipped  {made['skipped']:,} items that cannot be read; the reasons are in {Path(given.to) / 'skipped.jsonl'}")
    lists = made["approximate"]
    if lists:
        recall = f"finds {lists['recall']:.1%} of the true best ten, measured on {lists['trials']} disturbed rows"
        say(f"lists    {lists['probes']:,} of {lists['lists']:,} are looked into by search --approximate, which {recall}")
    say(f'search   vlm2vec search {given.to} "what to look for" --html found.html')
