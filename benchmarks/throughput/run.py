"""How fast this library trains and encodes beside sentence-transformers, in one run on the same weights, data, batch and kernel.

    make bench                                     everything but the ablations, on the shape for this device
    make bench ARGS="--quick"                      under two minutes on two cores
    make bench ARGS="--ablate --write docs/performance.md"

README.md beside this file says what exactly is compared.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.throughput import report
from benchmarks.throughput.ablate import ROWS, measure_row
from benchmarks.throughput.child import memory_of
from benchmarks.throughput.compare import compare
from benchmarks.throughput.floor import Arithmetic, measure_rates
from benchmarks.throughput.ours import Ours
from benchmarks.throughput.peer import Peer
from benchmarks.throughput.setting import Setting, table, write_models
from benchmarks.throughput.workloads import KINDS, make_workload


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = next(name for name, entry in table().items() if entry["device"] == ("cuda" if torch.cuda.is_available() else "cpu"))
    parser.add_argument("--shape", choices=table(), default=default, help="sizes of the model (default: %(default)s)")
    parser.add_argument("--workload", choices=KINDS, nargs="+", default=list(KINDS), help="which data (default: all)")
    parser.add_argument("--batch", type=int, help="pairs of a step (default: the shape's)")
    parser.add_argument("--chunk-tokens", type=int, help="padded tokens of a chunk (default: the shape's)")
    parser.add_argument("--repeats", type=int, default=5, help="how often each side runs, in turn (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="number format of weights and products (default: the shape's)")
    parser.add_argument("--attention", default="sdpa", help="attention kernel of both sides (default: %(default)s)")
    parser.add_argument("--only", choices=("training", "encoding"), help="leave the other out")
    parser.add_argument("--ablate", action="store_true", help="measure each saving alone too, on the first workload")
    parser.add_argument("--quick", action="store_true", help="one workload, few pairs, two repetitions, no memory")
    parser.add_argument("--folder", type=Path, help="where models and pictures are written (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write everything measured into this file")
    parser.add_argument("--write", type=Path, help="write the page of the documentation into this file")
    return parser.parse_args(arguments)


def setting_of(options: argparse.Namespace, folder: Path) -> Setting:
    """What the options fix; the shape says the rest."""
    entry = table()[options.shape]
    return Setting(
        shape=options.shape,
        batch=options.batch or (8 if options.quick else entry["batch"]),
        precision=options.precision or entry["precision"],
        attention=options.attention,
        chunk_tokens=options.chunk_tokens or entry["chunk_tokens"],
        folder=str(folder),
    )


def measure(options: argparse.Namespace, setting: Setting) -> Iterator[dict[str, Any]]:
    """Everything the options ask for; what is known so far after each part, so that a run that is stopped leaves something."""
    repeats = 2 if options.quick else options.repeats
    if not setting.adapter.exists():
        write_models(setting)
    names = options.workload[:1] if options.quick else options.workload
    workloads = [make_workload(name, setting.batch, setting.entry["scale"], setting.pictures) for name in names]
    ours, peer = Ours(setting), Peer(setting) if setting.entry["peer"] else None
    results: dict[str, Any] = {
        "format": 1,
        "machine": report.machine(setting),
        "setting": {"device": setting.device.type, **{name: value for name, value in asdict(setting).items() if name != "folder"}},
        "repeats": repeats,
        "rates": asdict(measure_rates(Arithmetic(ours).inventory, setting)),
        "workloads": [],
        "ablations": [],
        "missing": [],
    }
    for workload in workloads:
        child = None if options.quick else partial(memory_of, setting, workload.name)
        results["workloads"].append(compare(setting, workload, ours, peer, repeats, options.only, child))
        yield results
    memory = None if options.quick else cache(partial(memory_of, setting, workloads[0].name))
    for row in ROWS if options.ablate else ():
        found = measure_row(row, setting, workloads[0], repeats, memory)
        results["ablations" if found else "missing"].append(found or row.saving)
        yield results


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    transformers_logging.set_verbosity_error()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made:
        for results in measure(options, setting_of(options, options.folder or Path(made))):
            print(f"{', '.join(found['name'] for found in results['workloads'])}; {len(results['ablations'])} savings", flush=True)
            if options.json:
                options.json.write_text(json.dumps(report.plain(results), indent=1) + "\n", "utf-8")
    print(f"\n{results['machine']}\n\n{report.summary(results)}")
    if options.write:
        options.write.write_text(report.document(results), "utf-8")
    return results


if __name__ == "__main__":
    main()
