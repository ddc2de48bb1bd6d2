"""`vlm2vec verify`: is an exported folder what it was, and do all tools read it alike?"""

from __future__ import annotations

import argparse

from vlm2vec.commands import say

HELP = """Check an exported folder: every file against its digest, our embeddings against those that were stored when it was made, and
those of transformers, sentence-transformers and vLLM, as far as they are installed, against ours.

  vlm2vec verify exported
  vlm2vec verify owner/name --revision v1.0
  vlm2vec verify exported --dtype bfloat16 --device cuda

Embeddings of one item must have a cosine of 0.9999 in float32, 0.999 in float16 and 0.99 in bfloat16."""


def arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    command.add_argument("model", metavar="DIR", help="an exported folder, or its id on the Hub")
    command.add_argument("--revision", help="commit or tag of a model on the Hub")
    formats = ["float32", "bfloat16", "float16"]
    command.add_argument("--dtype", choices=formats, default="float32", help="number format to compute in (default: float32)")
    command.add_argument("--device", default="cpu", help="cpu, cuda or cuda:<n> (default: cpu)")


def run(given: argparse.Namespace) -> None:
    """Compare, print, and fail where anything differs."""
    from vlm2vec.verify import verify

    report = verify(given.model, given.revision, given.device, given.dtype)
    say(report.table())
    report.require()
    say(f"{given.model} is what was exported, and all that could read it agree")
