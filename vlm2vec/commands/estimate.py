"""`vlm2vec estimate`: what a recipe costs, before anybody pays for it."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from typing import Any

from vlm2vec.commands import say

HELP = """Memory, speed and hours of a recipe on a GPU, from its arithmetic: nothing is downloaded, trained or measured.

  vlm2vec estimate recipes/NAME.yaml --gpu h200x8
  vlm2vec estimate recipes/NAME.yaml --gpu 4090 train.chunk_tokens=4096
  vlm2vec estimate recipes/NAME.yaml --gpu h100x8 --mfu 0.42 --json
GPUs: h200, h100, a100-80g, l40s, 4090; h200x8 is eight of them. Items come from the recipe's data where it is there, else from stated
assumptions. docs/estimate.md has the formulas and their errors."""


CROSSING = "layers that read pictures across are counted as if they read text: operations are off by up to a half"


def arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    command.add_argument("recipe", help="a YAML file, see recipes/")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the recipe to change")
    command.add_argument("--gpu", default="h200x8", help="device and count, e.g. h100x8 (default %(default)s)")
    command.add_argument("--mfu", type=share, help="share of the device's peak that is reached; measured or believed")
    command.add_argument("--json", action="store_true", help="print everything as JSON: bytes, seconds, operations")


def share(text: str) -> float:
    """An argument that must be above 0 and at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {value:g}")
    return value


def run(given: argparse.Namespace) -> None:
    """Estimate and print."""
    from vlm2vec.config import load_recipe
    from vlm2vec.devices import find
    from vlm2vec.estimate import estimate, plan

    device, count = find(given.gpu)
    recipe = load_recipe(given.recipe, given.overrides)
    with redirect_stdout(sys.stderr):  # some libraries greet on stdout when they are imported
        found = estimate(plan(recipe, device, count, given.mfu))
    say(json.dumps(found, indent=2) if given.json else table(found, given.recipe))


def table(found: dict[str, Any], recipe: str) -> str:
    """The estimate for people."""
    sections = [
        (f"{recipe} on {found['device']['count']} x {found['device']['name']}", _subject(found)),
        ("a step on one device", _step(found)),
        ("memory of one device, GB", _memory(found)),
        ("to change", [("", line) for line in found["advice"]]),
        ("read this with", [("", line) for line in _notes(found)]),
    ]
    return "\n".join("\n".join([title, *(f"  {name:<24} {value}".rstrip() for name, value in rows)]) for title, rows in sections if rows)


def _subject(found: dict[str, Any]) -> list[tuple[str, str]]:
    model, hours = found["model"], found["hours"]
    adapter = f", an adapter of {model['adapter_bytes'] / 1e6:.1f} MB" if model["adapter_bytes"] else ""
    verdict = "fits" if found["fits"] else "does NOT fit"
    return [
        ("model", f"{model['parameters'] / 1e9:.3f} B parameters, {model['trained'] / 1e6:.1f} M trained{adapter}"),
        ("hours", f"{hours['likely']:.3g} ({hours['low']:.3g} to {hours['high']:.3g}) for {found['recipe']['steps']} steps"),
        ("pairs per second", f"{found['pairs_per_second']:.1f}, {found['recipe']['pairs']} a step"),
        ("bound by", found["bound"]),
        ("engine", found["recipe"]["engine"]),
        ("memory", f"{found['memory']['sum'] / 1e9:.1f} of {found['device']['memory'] / 1e9:.0f} GB: {verdict}"),
    ]


def _step(found: dict[str, Any]) -> list[tuple[str, str]]:
    items, chunks, ops, seconds = found["items"], found["chunks"], found["operations"], found["seconds"]
    parts = ", ".join(f"{part} {ops[part] / 1e12:.4g}" for part in ("vision", "projector", "language"))
    return [
        ("items", f"{items['count']:.0f}, {items['pictures']:.0f} pictures, {items['tokens']:.0f} tokens, {items['longest']} the longest"),
        ("chunks", f"{items['chunks']:.1f} of {chunks['chunk_tokens']} tokens, {items['padding']:.0%} padding; {_graphs(chunks)}"),
        ("useful", f"{ops['useful'] / 1e12:.4g} TFLOP: every item once forward, once backward where something is trained"),
        ("done", f"{ops['done'] / 1e12:.4g} TFLOP ({parts}); {ops['once'] / 1e12:.4g} if every graph were kept"),
        ("floor", f"{seconds['floor']:.3g} s: what is useful at the device's peak"),
        ("matrix products", f"{seconds['products']:.3g} s at {found['efficiency']['assumed']:.0%} of the peak"),
        ("memory traffic", f"{seconds['traffic']:.3g} s at least"),
        ("starting kernels", f"{seconds['launches']:.3g} s"),
        ("exchange", f"{seconds['exchange']:.3g} s"),
        ("pictures on the host", f"{seconds['host']:.3g} s"),
        ("together", f"{seconds['step']:.3g} s ({seconds['step_low']:.3g} to {seconds['step_high']:.3g})"),
    ]


def _graphs(chunks: dict[str, Any]) -> str:
    kept = f"graphs of {chunks['keep_tokens']} tokens kept" if chunks["keep_tokens"] else "no graph kept"
    return kept + ", activations recomputed" * chunks["activation_checkpointing"]


def _memory(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, f"{value / 1e9:8.2f}") for name, value in found["memory"].items()]


def _notes(found: dict[str, Any]) -> list[str]:
    share = found["efficiency"]
    assumed = f"the share of the peak is assumed, {share['low']:.0%} to {share['high']:.0%}: give a measured one with --mfu"
    return [
        assumed if share["low"] != share["high"] else f"the share of the peak was given: {share['assumed']:.0%}",
        f"items: {found['items']['basis']}",
        f"sizes: {found['model']['source']}",
        "operations agree with torch's counter; time and memory were never compared with a run on a GPU: docs/estimate.md",
        *[CROSSING] * found["model"]["crossing"],
    ]
