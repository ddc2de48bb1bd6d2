"""`vlm2vec push`: an exported folder onto the Hub."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = """Put a folder that `vlm2vec export` wrote onto the Hugging Face Hub, all of it in one commit.

    vlm2vec push exported you/my-embedder --dry-run       what would be sent; nothing is
    vlm2vec push exported you/my-embedder                 make the repository where it is missing, and send
    vlm2vec push exported you/my-embedder --private --revision trial

Run it again after whatever stopped it: what the Hub holds already is not sent twice, and a folder that is there already changes nothing.
The repository holds the old version or the new one, never a mix. HF_TOKEN, or `hf auth login`, gives the right to write; it is never
shown."""


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", type=Path, help="folder that vlm2vec export wrote")
    command.add_argument("repository", help="owner/name of the model repository")
    command.add_argument("--revision", default="main", help="branch, made where it is missing (default: main)")
    command.add_argument("--private", action="store_true", help="make the repository private; refused where it is public already")
    command.add_argument("--replace", action="store_true", help="remove files of the repository that no push put there")
    command.add_argument("--licence", "--license", help="under which the model may be used (default: what the base's card says)")
    command.add_argument("--without-results", action="store_true", help="send a model that was never evaluated")
    command.add_argument("--dry-run", action="store_true", help="say what would be sent and removed")


def run(given: argparse.Namespace) -> None:
    from vlm2vec.push import push_export

    done = push_export(
        given.folder,
        given.repository,
        licence=given.licence,
        without_results=given.without_results,
        revision=given.revision,
        private=given.private,
        replace=given.replace,
        dry_run=given.dry_run,
    )
    changes = done.changes
    for name, size in changes.add.items():
        sys.stdout.write(f"+ {name:<44} {size:>15,} bytes\n")
    for name in changes.remove:
        sys.stdout.write(f"- {name}\n")
    if given.dry_run:
        sys.stdout.write(f"{len(changes.add)} files, {sum(changes.add.values()):,} bytes would go to {done.url}; nothing was sent\n")
        return
    sys.stdout.write(f"{'sent to' if changes else 'already there:'} {done.url}  (commit {done.commit})\n")
    revision = "" if given.revision == "main" else f', revision="{given.revision}"'
    sys.stdout.write(f'next    Encoder.from_pretrained("{given.repository}"{revision})\n')
