"""One workload on both sides: first that they compute the same, then how fast, with how much memory, and where the time goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.throughput.ablate import VARIANTS
from benchmarks.throughput.floor import Arithmetic
from benchmarks.throughput.measure import Ratio, Spent, Stages, in_turn, spent
from benchmarks.throughput.ours import Ours, differs
from benchmarks.throughput.peer import Peer
from benchmarks.throughput.setting import Setting
from benchmarks.throughput.workloads import Workload
from vlm2vec.data.types import Item

# By precision: least cosine, largest difference of an entry, largest relative difference of a gradient.
LIMITS = {"fp32": (0.9999, 1e-5, 2e-5), "bf16": (0.99, 5e-2, 2e-1)}
KINDS = {"seconds": "passed", "busy": "busy"}  # what is kept of each repetition
Side = Ours | Peer


class Disagreement(Exception):
    """The two sides do not compute the same, so there is nothing to time."""


def agree(ours: Ours, peer: Peer, workload: Workload, precision: str) -> dict[str, float]:
    """Tokens must be equal, embeddings and gradients within the limits. Raises Disagreement.

    Gradients are compared on the pairs without repeated items: we take equal targets for one, the peer takes them for negatives.
    """
    single = workload.without_repeats()
    batch, columns = ours.prepare(single.pairs), peer.prepare(single.pairs)
    theirs = [ids[mask.bool()] for column in columns for ids, mask in zip(column["input_ids"], column["attention_mask"], strict=True)]
    rows = torch.cat([batch.query_B, batch.positive_B]).tolist()
    if not all(torch.equal(batch.features[row].input_ids, ids) for row, ids in zip(rows, theirs, strict=True)):
        raise Disagreement(f"{workload.name}: the two sides see different tokens")
    first, second = ours.encode(workload.distinct), peer.encode(workload.distinct).float()
    found = {
        "cosine": float(torch.nn.functional.cosine_similarity(first, second).min()),
        "entry": float((first - second).abs().max()),
        "gradient": differs(ours.gradients(batch), peer.gradients(columns)),
        "pairs": len(single.pairs),
    }
    cosine, entry, gradient = LIMITS[precision]
    if found["cosine"] < cosine or found["entry"] > entry or found["gradient"] > gradient:
        raise Disagreement(f"{workload.name}: the two sides differ: {found}, limits {LIMITS[precision]}")
    return found


def _train(side: Side, workload: Workload) -> dict[str, Spent]:
    """A step from files; what comes before the model and the model itself follow each other, so their times add up."""
    prepared, features = spent(lambda: side.prepare(workload.pairs))
    return {"prepare": prepared, "model": spent(lambda: side.train(features))[0]}


def _encode(side: Side, items: Sequence[Item]) -> dict[str, Spent]:
    return {"whole": spent(lambda: side.encode(items))[0]}


def _profile(side: Side, workload: Workload) -> dict[str, float]:
    """Seconds of a step by stage."""
    stages = Stages()
    with stages(side.stages()):
        side.train(side.prepare(workload.pairs))  # type: ignore[arg-type]
    return stages.seconds


def train(sides: Sequence[Side], settled: Ours, workload: Workload, repeats: int) -> dict[str, Any]:
    """Times of both sides in turn, and of ours as a run settles it, their ratios, and the stages of one step more."""
    everyone = [settled, *sides]
    _warm(everyone, workload)
    rounds = in_turn([partial(_train, side, workload) for side in everyone], repeats)
    times = {
        "whole": [[row["prepare"] + row["model"] for row in rows] for rows in rounds],
        "model": [[row["model"] for row in rows] for rows in rounds],
    }
    return {
        **{name: _summary(each[1:]) for name, each in times.items()},
        "settled": {name: _summary([each[0], *each[2:]]) for name, each in times.items()},
        "stages": [_profile(side, workload) for side in sides],
    }


def _warm(sides: Sequence[Side], workload: Workload) -> None:
    for side in sides:
        side.train(side.prepare(workload.pairs))  # type: ignore[arg-type]


def encode(sides: Sequence[Side], settled: Ours, workload: Workload, repeats: int) -> dict[str, Any]:
    """Times of encoding each item once, by ours in packed chunks too; where items repeat, of all of them as they come."""
    sets = {"distinct": workload.distinct} | ({"as they come": workload.items} if len(workload.items) > len(workload.distinct) else {})
    found = {}
    for name, items in sets.items():
        rounds = in_turn([partial(_encode, side, items) for side in [settled, *sides]], repeats)
        packed, *plain = [[row["whole"] for row in rows] for rows in rounds]
        found[name] = {"items": len(items), **_summary(plain)}
        found[f"{name}, packed"] = {"items": len(items), **_summary([packed, *plain[1:]])}
    return found


def _summary(sides: Sequence[Sequence[Spent]]) -> dict[str, Any]:
    """Seconds of each side, and ratios of the second to the first where there are two."""
    found: dict[str, Any] = {kind: [[getattr(each, name) for each in side] for side in sides] for kind, name in KINDS.items()}
    if len(sides) == 2:
        found["ratio"] = Ratio.of(*([each.passed for each in side] for side in sides))
        found["computed"] = Ratio.of(*([each.computed for each in side] for side in sides))
    return found


def compare(
    setting: Setting,
    workload: Workload,
    ours: Ours,
    peer: Peer | None,
    repeats: int,
    only: str | None,
    memory: Callable[..., dict[str, int]] | None,
) -> dict[str, Any]:
    """All that is measured of a workload; `memory` starts a child for a side, or is None."""
    found: dict[str, Any] = {"name": workload.name, "meaning": workload.meaning, "pairs": len(workload.pairs)}
    if peer is not None:
        found["agreement"] = agree(ours, peer, workload, setting.precision)
    sides: list[Side] = [ours, *([peer] if peer is not None else [])]
    found["counts"], peers_memory = _count(ours, peer, workload)
    settled = Ours(setting, VARIANTS["settled"].recipe(setting.recipe))
    if only != "encoding":
        found["training"] = train(sides, settled, workload, repeats)
    if only != "training":
        found["encoding"] = encode(sides, settled, workload, repeats)
    if memory is not None:
        found["memory"] = [memory("ours"), *([memory("peer", **peers_memory)] if peer is not None else [])]
        found["settled memory"] = memory("settled")
    return found


def _count(ours: Ours, peer: Peer | None, workload: Workload) -> tuple[dict[str, Any], dict[str, Any]]:
    """Operations, tokens and padding of both sides, and what a child of the peer needs to know; tunes the peer."""
    batch, arithmetic = ours.prepare(workload.pairs), Arithmetic(ours)
    entries = arithmetic.entries(workload.distinct, batch.features)
    counts: dict[str, Any] = {
        "items": len(workload.items),
        "distinct": len(entries),
        "pictures": sum(len(entry.pictures) for entry in entries),
        "forward": arithmetic.forward(entries),
        "ours": arithmetic.ours(entries),
    }
    counts["bytes"] = arithmetic.bytes_read(counts["ours"]["chunks"])
    if peer is None:
        return counts, {}
    way = peer.tune(peer.prepare(workload.pairs))
    peer.tune_encode([entry.tokens for entry in entries])
    columns = [[entries[row] for row in rows.tolist()] for rows in (batch.query_B, batch.positive_B)]
    counts["peer"] = arithmetic.peer(columns, [way.cut([entry.tokens for entry in column]) for column in columns])
    counts["mini-batch"] = f"{way.rows} rows" if way.rows else f"{way.tokens} tokens"
    return counts, {"rows": way.rows, "tokens": way.tokens, "encode": peer.rows_of_encode}
