"""Tables of what was measured, for the terminal and, inside the text of `performance.md`, for the documentation."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from string import Template
from typing import Any

import torch

from benchmarks.throughput.measure import STAGES, Ratio
from benchmarks.throughput.setting import Setting

TEMPLATE = Path(__file__).with_name("performance.md")
PEER = "sentence-transformers"
MEBI = 2**20


def plain(value: Any) -> Any:
    """The same in what JSON knows."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def machine(setting: Setting) -> str:
    """What ran it."""
    what = torch.cuda.get_device_name() if setting.device.type == "cuda" else f"CPU ({platform.machine()})"
    load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
    versions = ", ".join(f"{name} {_version(name)}" for name in ("torch", "transformers", "peft", PEER))
    cores = f"{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads"
    return f"{what}, {cores}, load of the machine {load} (1, 5 and 15 minutes); Python {platform.python_version()}, {versions}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns line up in a terminal too; all but the first are numbers."""
    cells = [list(head), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def ratio(found: Ratio | None) -> str:
    """Median and range."""
    return "-" if found is None else f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"


def training(results: dict[str, Any]) -> str:
    """Both sides in training."""
    rows = []
    for found in results["workloads"]:
        if "training" in found:
            memories = [side["training"] / MEBI for side in found.get("memory", [])]
            settled = [found["settled memory"]["training"] / MEBI, *memories[1:]] if memories else []
            rows.append(_training(f"{found['name']}, one graph at a time", found, found["training"], memories))
            rows.append(_training(f"{found['name']}, as a run settles it", found, found["training"]["settled"], settled))
    head = ["training", f"pairs/s, ours and {PEER}", "whole step", "model only", "whole, CPU time", "model, CPU time", "peak memory, MiB"]
    return _table(head, rows)


def _training(name: str, found: dict[str, Any], both: dict[str, Any], memories: Sequence[float]) -> list[str]:
    whole = [found["pairs"] / median(each) for each in both["whole"]["seconds"]]
    ratios = [both[part].get(kind) for kind in ("ratio", "computed") for part in ("whole", "model")]
    return [name, _pair(whole, "{:.2f}"), *map(ratio, ratios), _pair(memories, "{:.0f}")]


def encoding(results: dict[str, Any]) -> str:
    """Both sides in encoding, from files."""
    rows = []
    for found in results["workloads"]:
        for name, both in found.get("encoding", {}).items():
            speed = [both["items"] / median(each) for each in both["seconds"]]
            label = f"{found['name']}, {name.replace('distinct', 'each item once')}"
            rows.append([label, _pair(speed, "{:.2f}"), ratio(both.get("ratio")), ratio(both.get("computed"))])
    return _table(["encoding", f"items/s, ours and {PEER}", "ratio", "CPU time"], rows)


def counts(results: dict[str, Any]) -> str:
    """Padding, operations, memory and the floor of a training step."""
    rows = []
    for found in results["workloads"]:
        sides = [found["counts"][name] for name in ("ours", "peer") if name in found["counts"]]
        useful = found["counts"]["ours"]["useful"]
        rows.append(
            [
                found["name"],
                f"{found['counts']['distinct']} of {found['counts']['items']}",
                _pair([side["padding"] for side in sides], "{:.1%}"),
                _pair([side["largest"] for side in sides], "{:.0f}"),
                _pair([useful / side["done"] for side in sides], "{:.0%}"),
                f"{useful / results['rates']['products']:.2f}",
                _pair(_distances(found, results), "{:.2f}"),
            ]
        )
    head = ["one step", "distinct items", "padding", "largest chunk, tokens", "useful of done"]
    head += [f"floor, {_unit(results)}", "time over floor"]
    return _table(head, rows)


def _unit(results: dict[str, Any]) -> str:
    """What the seconds of the floor are."""
    return "s" if results["setting"]["device"] == "cuda" else "CPU s"


def _distances(found: dict[str, Any], results: dict[str, Any]) -> list[float]:
    """Busy seconds of the model over those of the floor, each side."""
    floor = found["counts"]["ours"]["useful"] / results["rates"]["products"]
    return [median(each) / floor for each in found["training"]["model"]["busy"]] if "training" in found else []


def stages(results: dict[str, Any]) -> str:
    """Milliseconds by stage of one whole step, and the share of the step."""
    head, rows = ["ms (share of the step)"], {name: [name] for name in STAGES}
    for found in results["workloads"]:
        for side, spent in zip(("ours", "peer"), found.get("training", {}).get("stages", []), strict=False):
            head.append(f"{found['name']}, {side}")
            for name in STAGES:
                rows[name].append(f"{1000 * spent[name]:.0f} ({spent[name] / sum(spent.values()):.0%})")
    return _table(head, rows.values())


def ablations(results: dict[str, Any]) -> str:
    """One row per saving."""
    rows = []
    for row in results["ablations"]:
        on, off = (f"{row['memory'][side] / MEBI:.0f}" if row["memory"] else "-" for side in row["sides"])
        rows.append([row["saving"], ratio(row["ratio"]), ratio(row["computed"]), on, off, f"{row['difference']:.0e}"])
    return _table(["saving", "time without / with", "CPU time", "MiB with", "MiB without", "largest difference of gradients"], rows)


def agreement(results: dict[str, Any]) -> str:
    """What both sides have in common, before anything was timed."""
    rows = [
        [found["name"], f"{each['cosine']:.7f}", f"{each['entry']:.0e}", f"{each['gradient']:.0e}", f"{each['pairs']} of {found['pairs']}"]
        for found in results["workloads"]
        if (each := found.get("agreement"))
    ]
    return _table(["same computation", "least cosine", "largest entry", "largest gradient", "pairs for gradients"], rows)


def bounds(results: dict[str, Any]) -> str:
    """Where our time goes, in sentences."""
    return "\n".join(_bound(found, results["rates"]) for found in results["workloads"] if "training" in found)


def _bound(found: dict[str, Any], rates: dict[str, float]) -> str:
    spent, read = found["training"]["stages"][0], found["counts"]["bytes"]
    whole = sum(spent.values())
    first, second = sorted(spent, key=lambda name: -spent[name])[:2]
    return (
        f"- {found['name']}: {first} takes {spent[first] / whole:.0%} of our step and {second} {spent[second] / whole:.0%}; "
        f"decoding {_per_picture(spent['decode'], found)}, cutting into patches {_per_picture(spent['process pictures'], found)}; "
        f"{read / 1e9:.2f} GB of weights are read, {read / rates['copying']:.2f} s at the rate of a copy."
    )


def _per_picture(seconds: float, found: dict[str, Any]) -> str:
    pictures = found["counts"]["pictures"]
    return f"{1000 * seconds / pictures:.1f} ms a picture" if pictures else "nothing"


def _pair(values: Sequence[float], form: str) -> str:
    return ", ".join(form.format(value) for value in values) or "-"


def summary(results: dict[str, Any]) -> str:
    """All tables."""
    parts = [agreement, training, encoding, counts, stages, bounds, *([ablations] if results["ablations"] else [])]
    return "\n\n".join(part(results) for part in parts)


def document(results: dict[str, Any]) -> str:
    """The page of the documentation."""
    names = (agreement, training, encoding, counts, stages, bounds, ablations)
    setting = results["setting"]
    return Template(TEMPLATE.read_text("utf-8")).substitute(
        {part.__name__: part(results) for part in names},
        machine=results["machine"],
        workloads="\n".join(f"- {found['name']}: {found['meaning']}" for found in results["workloads"]),
        setting=f"shape `{setting['shape']}`, {setting['batch']} pairs, {setting['precision']}, attention {setting['attention']}, "
        f"{setting['chunk_tokens']} padded tokens a chunk, {results['repeats']} repetitions",
        rate=f"{results['rates']['products'] / 1e9:.1f}",
        copying=f"{results['rates']['copying'] / 1e9:.1f}",
        per="second" if _unit(results) == "s" else "second of a thread",
        missing=", ".join(results["missing"]) or "none",
    )
