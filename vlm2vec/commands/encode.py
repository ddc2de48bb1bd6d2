"""`vlm2vec encode`: items in, a folder of vectors out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vlm2vec.commands import corpus_arguments, positive, say
from vlm2vec.commands.loading import device_arguments, load_encoder, model_arguments, start_ranks
from vlm2vec.errors import InputError
from vlm2vec.signals import StopSignal

HELP = """Embed a corpus of any size into a folder of vectors.

  vlm2vec encode runs/quickstart/model pictures --to vectors                a folder of pictures, found by content, with all below it
  vlm2vec encode runs/quickstart/model items.jsonl --to vectors --query     lines of text, image, instruction, id
  vlm2vec encode MODEL corpus --to vectors --workers 8 --autocast bf16      a folder of parquet or JSONL files
  vlm2vec encode MODEL corpus --to vectors --dry-run                        how many items, shards and bytes
  vlm2vec encode MODEL corpus --to vectors --precision int8 --dims 256      smaller vectors
  accelerate launch --multi_gpu --num_processes 8 --module vlm2vec encode MODEL corpus --to vectors

A picture is a path below the folder of the file, or the struct of bytes and path that image datasets have; a list of them is one item with
several pictures. Killed, the same command goes on where it was. docs/encode.md describes the folder and how to read it."""


def arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    model_arguments(command)
    corpus_arguments(command)
    command.add_argument("--to", required=True, help="the folder to fill")
    roles = command.add_mutually_exclusive_group()
    roles.add_argument("--instruction", default="", help="instruction for items that bring none")
    roles.add_argument("--query", action="store_true", help="use the query instruction that the model was saved with")
    roles.add_argument("--target", action="store_true", help="use the target instruction that the model was saved with")
    command.add_argument("--precision", choices=["float32", "float16", "int8", "binary"], default="float32", help="how numbers are stored")
    command.add_argument("--format", choices=["safetensors", "numpy"], default="safetensors", help="files of the shards")
    command.add_argument("--shard-items", type=positive, default=4096, help="items of a shard (default: 4096); a kill costs at most one")
    command.add_argument("--dry-run", action="store_true", help="count, and encode nothing")
    device_arguments(command)


def run(given: argparse.Namespace) -> None:
    """Encode, and say what was made and how to load it."""
    if not Path(given.items).exists():
        raise InputError(f"{given.items} not found")
    if Path(given.to).suffix in (".safetensors", ".npy") or Path(given.to).is_file():
        raise InputError(f"--to {given.to}: names a folder, which will hold shards; give it a name without a file's ending")
    from vlm2vec import dist
    from vlm2vec.bulk import encode_corpus

    start_ranks(given)
    encoder = load_encoder(given)
    made = {"precision": given.precision, "dims": given.dims, "shard_items": given.shard_items, "columns": dict(given.columns)}
    if given.dry_run:
        _say_estimate(encoder, given, made)
        return
    with StopSignal() as stop:
        manifest = encode_corpus(
            encoder,
            given.items,
            given.to,
            instruction=_instruction(encoder, given),
            storage=given.format,
            images=given.images,
            skip_bad=given.skip_bad,
            chunk_tokens=given.chunk_tokens,
            workers=given.workers,
            stop=stop,
            **made,
        )
    if dist.is_main():
        _say_made(given.to, manifest)


def _instruction(encoder: Any, given: argparse.Namespace) -> str:
    if given.query:
        return encoder.query_instruction
    return encoder.target_instruction if given.target else given.instruction


def _say_estimate(encoder: Any, given: argparse.Namespace, made: dict[str, Any]) -> None:
    from vlm2vec import dist
    from vlm2vec.bulk import estimate

    if dist.is_main():
        found = estimate(encoder, given.items, **made)
        say(f"{found.items:,} items ({found.kind}) in {found.shards:,} shards of {given.shard_items:,}")
        say(f"{found.bytes:,} bytes of {given.precision} rows, {found.dims} numbers each, and the ids; nothing was encoded or written")


def _say_made(folder: str, manifest: dict[str, Any]) -> None:
    size = sum(file["bytes"] for file in manifest["files"].values())
    say(f"wrote    {manifest['rows']:,} rows of {manifest['dims']} numbers, {manifest['precision']}, {len(manifest['shards']):,} shards")
    say(f"         {size:,} bytes in {folder}")
    if manifest["skipped"]:
        say(f"skipped  {manifest['skipped']:,} items that cannot be read; the reasons are in {Path(folder) / 'skipped.jsonl'}")
    say("load     from vlm2vec import read_vectors")
    say(f"         ids, rows = read_vectors({folder!r})")
    say("         print(ids[0], rows[0], rows.shape)  # float32, read from disk as asked for; numpy.asarray(rows) is all of them")
