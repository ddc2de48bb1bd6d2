"""`vlm2vec export`: a run in, a folder for everybody's tools out."""

from __future__ import annotations

import argparse

from vlm2vec.commands import say

HELP = """Write one folder that vlm2vec, transformers, sentence-transformers and vLLM read, and check that they give the same embeddings.

  vlm2vec export runs/quickstart --to exported                  whole weights, in the number format of the base
  vlm2vec export runs/quickstart --to exported --dtype bfloat16
  vlm2vec export runs/lora --to adapter --adapter               the adapter alone; its base is loaded from where it names it
  vlm2vec export owner/name --to merged                         what others published

RUN is a run folder, a model folder, a Hub id or builtin/<name>. The folder appears whole or not at all, and only after the check passed;
docs/export.md describes its files."""


def arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    command.add_argument("run_folder", metavar="RUN", help="a run, a model folder, a Hub id or builtin/<name>")
    command.add_argument("--to", required=True, metavar="DIR", help="the folder to write")
    forms = command.add_mutually_exclusive_group()
    forms.add_argument("--merged", dest="form", action="store_const", const="merged", default="merged", help="whole weights (default)")
    forms.add_argument("--adapter", dest="form", action="store_const", const="adapter", help="the adapter alone, as PEFT reads it")
    formats = ["float32", "bfloat16", "float16"]
    command.add_argument("--dtype", choices=formats, help="number format of whole weights (default: the base's on disk)")
    command.add_argument("--results", metavar="FILE", help="results.json that travels with the model (default: the run's, if it has one)")
    command.add_argument("--revision", help="commit or tag of a model on the Hub")
    command.add_argument("--overwrite", action="store_true", help="replace another export in that folder")
    command.add_argument("--no-verify", action="store_true", help="skip the check, for a machine too small to load the model several times")
    command.add_argument("--device", default="cpu", help="where the check runs: cpu, cuda or cuda:<n> (default: cpu)")


def run(given: argparse.Namespace) -> None:
    """Export, and say what was made and checked."""
    from vlm2vec.export import export

    report = export(
        given.run_folder,
        given.to,
        given.form,
        given.dtype,
        revision=given.revision,
        results=given.results,
        overwrite=given.overwrite,
        check=not given.no_verify,
        device=given.device,
    )
    if report is None:
        say(f"{given.to} holds this export already; nothing to do")
        return
    if report.rows:
        say(report.table())
    say(f"wrote  {given.to}")
    say(f"next   vlm2vec push {given.to} owner/name --dry-run    (a copy elsewhere is checked by vlm2vec verify)")
